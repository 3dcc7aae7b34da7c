"""What the weighted loss does by number of turns: how often the policy itself spoke in a conversation with tools.

A turn is a maximal run of own tokens: what a tool answered, with the chat template's frame around it, stands between
two of them. Pure functions on tensors; sums are added up over a logging interval and finished once per log.
"""

import torch

from ..trl_seam.generation_batch import count_turns

__all__ = [
    "count_turns",
    "finish_turn_advantages",
    "finish_turn_masses",
    "turn_advantages",
    "turn_bins",
    "turn_masses",
]
TURN_BINS = ("turns_1", "turns_2", "turns_3plus")


def turn_bins(turns: torch.Tensor) -> torch.Tensor:
    """
    Place in `TURN_BINS` of each number of turns.

    Args:
        turns (`torch.Tensor`): numbers of turns, any shape.

    Returns:
        `torch.Tensor`: long, same shape; meaningless where there is no turn.
    """
    return turns.long().clamp(1, len(TURN_BINS)) - 1


def turn_masses(masses: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """
    Sum of mass by number of turns: what `share/turns_…` are ratios of.

    Args:
        masses (`torch.Tensor`): Σ_t |w·A| of each response over its own tokens, (B,).
        turns (`torch.Tensor`): numbers of turns, (B,).

    Returns:
        `torch.Tensor`: (3,), in the order of `TURN_BINS`.
    """
    masses = masses.detach().float() * (turns > 0)
    return masses.new_zeros(len(TURN_BINS)).index_add(0, turn_bins(turns), masses)


def turn_advantages(advantages: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """
    Sum of advantages and number of responses by number of turns: what `advantage/turns_…` are ratios of.

    Args:
        advantages (`torch.Tensor`): A of each response, unweighted, any shape.
        turns (`torch.Tensor`): numbers of turns, same shape.

    Returns:
        `torch.Tensor`: (3, 2), rows in the order of `TURN_BINS`.
    """
    present = (turns > 0).flatten().float()
    values = torch.stack([advantages.detach().flatten().float() * present, present], dim=1)
    return values.new_zeros(len(TURN_BINS), 2).index_add(0, turn_bins(turns).flatten(), values)


def finish_turn_masses(sums: list[float]) -> dict[str, float]:
    """
    Parts of Σ|w·A| by number of turns, from sums of `turn_masses`.

    Returns:
        `dict[str, float]`: `share/turns_1`, `share/turns_2`, `share/turns_3plus`; NaN without any mass.
    """
    return {f"share/{name}": _ratio(value, sum(sums)) for name, value in zip(TURN_BINS, sums, strict=True)}


def finish_turn_advantages(sums: list[float]) -> dict[str, float]:
    """
    Mean advantages by number of turns, from sums of `turn_advantages`, flat.

    Returns:
        `dict[str, float]`: `advantage/turns_1`, `advantage/turns_2`, `advantage/turns_3plus`; NaN for a number of
        turns that no response has.
    """
    pairs = zip(sums[0::2], sums[1::2], strict=True)
    return {f"advantage/{name}": _ratio(*pair) for name, pair in zip(TURN_BINS, pairs, strict=True)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
