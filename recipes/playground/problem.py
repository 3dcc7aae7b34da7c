"""What a problem of the playground is, whatever its task."""

import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

EOS = "<eos>"  # the playground's end token as text; it ends a turn


@dataclass(frozen=True)
class Problem:
    """
    One verifiable problem with the two ways of answering it that the base model is taught.

    Args:
        key (`Hashable`):
            Identity of the problem. Two problems with equal keys count as the same and never sit in different splits.
        prompt (`str`):
            Text the model is given; its first character is the task's letter.
        solution (`str`):
            The right answer.
        short (`str`):
            The shorter way to answer.
        long (`str`):
            The longer way to answer.
    """

    key: Hashable
    prompt: str
    solution: str
    short: str
    long: str

    # What TRL's `environment_factory` takes, for a task that is a conversation.
    environment: ClassVar[Callable[[], Any] | None] = None

    def row(self) -> dict[str, Any]:
        """The problem as a row of its data file."""
        return {"prompt": self.prompt, "solution": self.solution}

    def demonstration(self, rng: random.Random) -> list[tuple[str, bool]]:
        """A completion to be taught, in pieces: a text, and whether the model is to write it itself."""
        return [(rng.choice((self.short, self.long)) + EOS, True)]
