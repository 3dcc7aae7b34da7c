r"""
Functions for `dataset_preparation`: from a hub dataset's columns to `prompt` and `solution`.

A preparation is a function of one row. Its parameters are the columns that it reads, and the columns that it returns
replace all others. Write one for another dataset in any module of the current directory. Prompts here are
conversational and ask for `\boxed{}`, where TRL's `accuracy_reward` finds the answer and checks it with math-verify.
"""

from typing import Any

REQUEST = "Reason step by step, and put the final answer within \\boxed{}."


def gsm8k(question: str, answer: str) -> dict[str, Any]:
    """
    Prepare `openai/gsm8k`, configurations `main` and `socratic`.

    Args:
        question (`str`):
            A word problem.
        answer (`str`):
            A worked answer whose last line is `#### N`.

    Returns:
        `dict`: `prompt` and `solution`, N without separators of thousands.

    Raises:
        ValueError: if the answer has no `#### N`.
    """
    _, mark, number = answer.rpartition("####")
    number = number.replace(",", "").strip()
    if not mark or not number:
        raise ValueError(f"gsm8k: no '#### N' at the end of the answer {answer!r}.")
    return _row(f"{question}\n\n{REQUEST}", number)


def math(problem: str, solution: str) -> dict[str, Any]:
    r"""
    Prepare MATH (arXiv 2103.03874) as `nlile/hendrycks-MATH-benchmark` has it, or any copy with its columns.

    Args:
        problem (`str`):
            A problem in LaTeX.
        solution (`str`):
            A worked solution with the answer in `\boxed{}`.

    Returns:
        `dict`: `prompt` and `solution`, the last `\boxed{}` alone.

    Raises:
        ValueError: if the solution has no `\boxed`.
    """
    return _row(f"{problem}\n\n{REQUEST}", _last_boxed(solution))


def knights_and_knaves(quiz: str, names: list[str], solution: list[bool]) -> dict[str, Any]:
    """
    Prepare `K-and-K/knights-and-knaves` (arXiv 2410.23123).

    The answer is a number with one digit per inhabitant, because math-verify compares numbers exactly, and lists of
    names as sets. The digits are 1 and 2 because a leading 0 would be lost.

    Args:
        quiz (`str`):
            The puzzle.
        names (`list[str]`):
            The inhabitants.
        solution (`list[bool]`):
            Who is a knight, in the order of `names`.

    Returns:
        `dict`: `prompt` and `solution`, such as `"121"` for knight, knave, knight.

    Raises:
        ValueError: if there is not one truth value per name.
    """
    if len(names) != len(solution):
        raise ValueError(f"knights_and_knaves: {len(solution)} truth values for the names {', '.join(names)}.")
    request = (
        f"{REQUEST} The final answer is one digit per inhabitant, in the order {', '.join(names)}, without spaces: 1 "
        "for a knight, 2 for a knave."
    )
    return _row(f"{quiz}\n\n{request}", "".join("1" if knight else "2" for knight in solution))


def _row(content: str, solution: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": content}], "solution": solution}


def _last_boxed(text: str) -> str:
    r"""Return the last `\boxed{...}` with its braces matched, or `\boxed 7` as a few of MATH's solutions have it."""
    start = text.rfind("\\boxed")
    if start < 0:
        raise ValueError(f"math: no \\boxed in the solution {text!r}.")
    depth = 0
    for end in range(start + len("\\boxed"), len(text)):
        if text[end - 1] == "\\" and text[end] in "{}$":  # \{, \} and \$ are signs of the answer itself
            continue
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0 and text[end] in "}$":
            return text[start : end + 1].rstrip("$").strip()
    return text[start:].strip()
