"""
Rewards for conversations with tools, in TRL's signature. They read the policy's last message.

TRL's own `accuracy_reward` reads the *first* message of a completion, the one before the first call.
"""

import re
import string
from typing import Any

from trl.rewards import accuracy_reward


def last_message(completion: Any) -> str:
    """
    Return the text of the policy's last message.

    Args:
        completion (`list[dict]`):
            A conversation as TRL passes it to rewards.

    Returns:
        `str`: the text, empty where the conversation was cut off after a call or a tool's answer.
    """
    last = completion[-1] if isinstance(completion, list) and completion else {}
    is_answer = last.get("role") == "assistant" and not last.get("tool_calls")
    return last["content"] if is_answer and isinstance(last.get("content"), str) else ""


def final_accuracy(completions: list[Any], solution: list[str], **kwargs: Any) -> list[float | None]:
    r"""
    Apply TRL's `accuracy_reward` to the last message: math-verify compares its `\boxed{}` with the solution.

    Args:
        completions (`list`):
            Conversations, (B,).
        solution (`list[str]`):
            Right answers, (B,).

    Returns:
        `list[float | None]`: rewards, (B,); `None` where the solution itself cannot be read.
    """
    return accuracy_reward([[{"content": last_message(completion)}] for completion in completions], solution)


def answer_match(completions: list[Any], solution: list[str], **kwargs: Any) -> list[float]:
    """
    Reward an answer with 1.0 if it equals the solution up to case, punctuation and articles (SQuAD's exact match).

    Args:
        completions (`list`):
            Conversations, (B,). The answer stands in the last `<answer>` of the policy's last message.
        solution (`list[str]`):
            Right answers, (B,).

    Returns:
        `list[float]`: rewards, (B,).
    """
    answers = [re.findall(r"<answer>(.*?)</answer>", last_message(each), re.DOTALL)[-1:] for each in completions]
    pairs = zip(answers, solution, strict=True)
    return [float(bool(answer) and _normal(answer[0]) == _normal(right) != "") for answer, right in pairs]


def _normal(text: str) -> str:
    words = text.lower().translate(str.maketrans("", "", string.punctuation)).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))
