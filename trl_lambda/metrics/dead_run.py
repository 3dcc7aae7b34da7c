"""The commonest dead run: nearly every answer is cut, and no group has rewards that differ."""

import warnings
from collections.abc import Mapping

BATCHES = 20
CUT = 0.9


class DeadRunWarning:
    """Warns once, after 20 generation batches in a row from which nothing can be learned."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def observe(self, metrics: Mapping[str, list[float]]) -> None:
        """Take in TRL's metrics of a new generation batch."""
        cut, tied = (metrics.get(name) or [0.0] for name in ("completions/clipped_ratio", "frac_reward_zero_std"))
        self._in_a_row = self._in_a_row + 1 if cut[-1] >= CUT and tied[-1] == 1 else 0
        if self._in_a_row == BATCHES:
            warnings.warn(
                f"Nothing can be learned: in {BATCHES} generation batches in a row at least {CUT:.0%} of the answers "
                "were cut at max_completion_length and every group had equal rewards. No weight changes that. Raise "
                "max_completion_length, shorten the task, or give a reward for partial answers.",
                UserWarning,
                stacklevel=2,
            )
