"""Reward functions of the playground, in TRL's signature."""

import math
from collections.abc import Callable
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


def short_right_answers(alpha: float, num_generations: int = 8) -> Callable[..., list[float]]:
    """
    Make the reward that, added to `exact_answer`, is the length reward of GRPO-LEAD (arXiv 2504.09696).

    A right answer's reward is exp(-α·z), z its length standardised among the right answers of its group (0 where they
    have one length); a wrong one's is 0. What is returned is the difference to `exact_answer`.

    Args:
        alpha (`float`): α.
        num_generations (`int`): answers of a group, which TRL passes one after the other.

    Returns:
        `Callable`: a reward function, for completions, their `completion_ids` and `solution`.
    """

    def short_right_answers(
        completions: list[Any], completion_ids: list[list[int]], solution: list[str], **kwargs: Any
    ) -> list[float]:
        right = [i for i, reward in enumerate(exact_answer(completions, solution)) if reward > 0]
        groups: dict[int, list[int]] = {}
        for i in right:
            groups.setdefault(i // num_generations, []).append(len(completion_ids[i]))
        rewards = [0.0] * len(completions)
        for i in right:
            lengths = groups[i // num_generations]
            mean = math.fsum(lengths) / len(lengths)
            sd = math.sqrt(math.fsum((n - mean) ** 2 for n in lengths) / len(lengths))
            z = (len(completion_ids[i]) - mean) / sd if sd > 0 else 0.0
            rewards[i] = math.exp(-alpha * z) - 1
        return rewards

    return short_right_answers
