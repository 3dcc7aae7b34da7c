"""
What the weighted loss does by number of turns: how often the policy itself spoke in a conversation with tools.

A turn is a maximal run of own tokens (`count_turns`): what a tool answered, with the chat template's frame around it,
stands between two of them. Sums are added up over a logging interval and finished once per log.
"""

import torch
from torch import Tensor

from .diagnostics import ratio

TURN_BINS = ("turns_1", "turns_2", "turns_3plus")


def turn_bins(turns: Tensor) -> Tensor:
    """Place in `TURN_BINS` of each number of turns, long, any shape; meaningless where there is no turn."""
    return turns.long().clamp(1, len(TURN_BINS)) - 1


def turn_masses(masses: Tensor, turns: Tensor) -> Tensor:
    """Σ_t |w·A| of each response, (B,), summed by its number of turns, (B,), in the order of `TURN_BINS`, (3,)."""
    masses = masses.detach().float() * (turns > 0)
    return masses.new_zeros(len(TURN_BINS)).index_add(0, turn_bins(turns), masses)


def turn_advantages(advantages: Tensor, turns: Tensor) -> Tensor:
    """Sum of unweighted advantages and number of responses by number of turns, both any shape, as (3, 2)."""
    present = (turns > 0).flatten().float()
    values = torch.stack([advantages.detach().flatten().float() * present, present], dim=1)
    return values.new_zeros(len(TURN_BINS), 2).index_add(0, turn_bins(turns).flatten(), values)


def finish_turn_masses(sums: list[float]) -> dict[str, float]:
    """`share/turns_…`, parts of Σ|w·A|, from sums of `turn_masses`; NaN without any mass."""
    return {f"share/{name}": ratio(value, sum(sums)) for name, value in zip(TURN_BINS, sums, strict=True)}


def finish_turn_advantages(sums: list[float]) -> dict[str, float]:
    """`advantage/turns_…`, means, from sums of `turn_advantages`, flat; NaN for a number that no response has."""
    pairs = zip(sums[0::2], sums[1::2], strict=True)
    return {f"advantage/{name}": ratio(*pair) for name, pair in zip(TURN_BINS, pairs, strict=True)}
