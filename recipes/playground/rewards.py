"""Reward functions of the playground, in TRL's signature."""

from typing import Any


def _text(completion: Any) -> str:
    """
    Return the text of a completion in TRL's standard (str) or conversational (list of messages) form, else ''.

    A conversation that was cut off ends with a tool's answer or with a call, and neither is an answer of the model.
    """
    if isinstance(completion, list) and completion and isinstance(completion[-1], dict):
        last = completion[-1]
        if last.get("role", "assistant") != "assistant" or last.get("tool_calls"):
            return ""
        completion = last.get("content")
    if isinstance(completion, list):  # a message may hold typed parts instead of a string
        parts = [part.get("text") for part in completion if isinstance(part, dict)]
        completion = "".join(part for part in parts if isinstance(part, str))
    return completion if isinstance(completion, str) else ""


def exact_answer(completions: list[Any], solution: list[str], **kwargs: Any) -> list[float]:
    """
    Reward 1.0 for the right final answer, else 0.0.

    The answer is what follows the last `=`, or the whole completion when it has none; it has to be the solution and
    nothing else, so that `164;` or `164+` is wrong.

    Args:
        completions (`list`):
            Completions, (B,), each a string or a list of messages.
        solution (`list[str]`):
            The dataset's `solution` column, (B,), repeated by TRL for every completion.

    Returns:
        `list[float]`: rewards, (B,).

    Raises:
        ValueError: if the two lists differ in length.
    """
    if len(completions) != len(solution):
        raise ValueError(f"solution has {len(solution)} entries for {len(completions)} completions; need one each.")
    answers = [_text(completion).rpartition("=")[2].strip() for completion in completions]
    return [
        float(answer != "" and answer == str(right).strip()) for answer, right in zip(answers, solution, strict=True)
    ]
