"""Two length rewards that users meet: LACONIC's, and the distance to a target. Both are added to the task's reward."""

import statistics
from collections.abc import Callable
from typing import Any

# The published rule bounds the penalty and λ. With rewards of 0 and 1 a right answer never falls below a wrong one.
LACONIC_CAP = LACONIC_CEILING = 1.0


def laconic(budget: float, eta: float = 2e-3) -> Callable[..., list[float]]:
    """
    Make the penalty of LACONIC (arXiv 2602.14468), with λ from 0 and raised while replies are longer than a budget:

        penalty = -min(λ·max(0, (L - B)/B), cap)        λ ← clip(λ + η·(mean L/B - 1), 0, ceiling)   per batch

    Bounds of penalty and λ are this study's choice: 1.

    Args:
        budget (`float`): B, tokens.
        eta (`float`): η. The published one is 0.002, for runs of many more batches.
    """
    lam = 0.0

    def laconic(completions: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        nonlocal lam
        lengths = [len(ids) for ids in completion_ids]
        penalties = [-min(lam * max(0.0, (length - budget) / budget), LACONIC_CAP) for length in lengths]
        lam = min(max(lam + eta * (statistics.fmean(lengths) / budget - 1), 0.0), LACONIC_CEILING)
        return penalties

    return laconic


def distance(target: float) -> Callable[..., list[float]]:
    """
    Make the reward -|target - L|/target, the length reward that most newcomers meet, scaled to the task's 0 and 1.

    Args:
        target (`float`): tokens.
    """

    def distance(completions: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [-abs(target - len(ids)) / target for ids in completion_ids]

    return distance
