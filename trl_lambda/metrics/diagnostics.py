"""What the weighted loss does, as numbers: where Σ|w·A| goes by length and by probability, how even f is, what is
clipped, and the correlation of advantage and length that λ follows.

Pure functions on tensors; `LossTally` adds their sums up over a logging interval.
"""

import itertools
import math
from bisect import bisect_left

import torch
from torch import Tensor

QUARTILES = 4
# Bins of -log π, evenly spaced in log(-log π): 0.85 % each. Below the least and above the most one bin takes all.
SURPRISE_BINS, _LEAST_SURPRISE, _MOST_SURPRISE = 2048, 1e-6, 32.0
# Equal rewards leave advantages that differ by rounding, at most this part of the largest.
_ROUNDING = 1e-5


def ratio(part: float, whole: float) -> float:
    """`part` of `whole`; NaN for a ratio over nothing."""
    return part / whole if whole else math.nan


def effective_sample_size(weights: Tensor) -> Tensor:
    """
    Effective sample size of each group's f, (P, G), as a part of its rows with tokens: ``(Σf)² / (n · Σf²)``.

    In (0, 1], (P,); 1 where f is uniform, NaN for a group without tokens.
    """
    count = (weights > 0).sum(dim=1)
    return weights.sum(dim=1).square() / (count * weights.square().sum(dim=1))


def quartile_index(values: Tensor, mask: Tensor) -> Tensor:
    """
    Quartile of each value among the values under `mask`, any shape: 0 for the lowest quarter, 3 for the highest.

    The edges are the values at ranks ⌈n/4⌉, ⌈n/2⌉ and ⌈3n/4⌉; a value equal to an edge belongs below it, so that
    equal values share a quartile. Meaningless outside `mask`.
    """
    values = values.float()
    ordered = values.masked_fill(~mask.bool(), torch.inf).flatten().sort().values
    count = mask.bool().sum()
    ranks = torch.arange(1, QUARTILES, device=values.device) * count
    edges = ordered[(torch.div(ranks + QUARTILES - 1, QUARTILES, rounding_mode="floor") - 1).clamp(min=0)]
    return torch.bucketize(values.contiguous(), edges)


def mass_by_bin(mass: Tensor, bins: Tensor) -> Tensor:
    """Sum of `mass`, any shape and 0 where nothing counts, in each quartile, float32, (4,); `bins` are its like."""
    total = torch.zeros(QUARTILES, dtype=torch.float32, device=mass.device)
    return total.index_add(0, bins.flatten(), mass.flatten().float())


def probability_bins(logps: Tensor) -> Tensor:
    """Bin of each token's log π, any shape, long: 0 for the most probable, 2047 for the least."""
    width = math.log(_MOST_SURPRISE / _LEAST_SURPRISE) / SURPRISE_BINS
    places = (logps.float().neg().clamp(min=_LEAST_SURPRISE) / _LEAST_SURPRISE).log() / width
    return places.long().clamp(0, SURPRISE_BINS - 1)  # after the cast: a NaN is then a bin like any other


def quartile_shares(counts: list[float], masses: list[float]) -> list[float]:
    """
    Part of all mass in each quarter of the values, lowest first, from the number of values in each bin, lowest first,
    and their mass; a bin on an edge is split in proportion. NaN without values or without mass.
    """
    below, mass_below = list(itertools.accumulate(counts)), list(itertools.accumulate(masses))
    if not below[-1] or not mass_below[-1]:
        return [math.nan] * QUARTILES
    cuts = [0.0]
    for quarter in range(1, QUARTILES):
        edge = below[-1] * quarter / QUARTILES
        i = bisect_left(below, edge)
        cuts.append(mass_below[i] - masses[i] * (below[i] - edge) / counts[i])
    return [(high - low) / mass_below[-1] for low, high in itertools.pairwise([*cuts, mass_below[-1]])]


def advantage_length_sums(lengths: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """
    What the correlation of advantage and length within groups, and the mean length by sign of A, are ratios of.

    From |o| in own tokens and unweighted A, both (P, G). Only rows with tokens count, and only groups in which their
    advantages differ by more than rounding: elsewhere A is 0 and says nothing about length.

    Returns:
        `torch.Tensor`: (3,): Σ a·l, Σ a², Σ l² with a and l centred on their group's mean.
        `torch.Tensor`: (2, 2): by A > 0 and A < 0, the sum of lengths and the number of rows.
    """
    present = lengths > 0
    lengths, advantages = lengths.float() * present, advantages.float() * present
    count = present.sum(dim=1, keepdim=True).clamp(min=1)
    a = (advantages - advantages.sum(dim=1, keepdim=True) / count) * present
    differ = a.abs().amax(dim=1, keepdim=True) > _ROUNDING * advantages.abs().amax(dim=1, keepdim=True)
    a = a * differ
    centred = (lengths - lengths.sum(dim=1, keepdim=True) / count) * present * differ
    by_sign = torch.stack([(advantages > 0) & differ, (advantages < 0) & differ])
    rows_by_sign = torch.stack([(by_sign * lengths).sum(dim=(1, 2)), by_sign.sum(dim=(1, 2))], dim=1)
    return torch.stack([(a * centred).sum(), a.square().sum(), centred.square().sum()]), rows_by_sign


def clipped_tokens(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> Tensor:
    """
    Which tokens have no gradient in min(ρA, clip(ρ, 1 - ε_low, 1 + ε_high)A), the first ρ at most δ if given.

    ρ and A are (B, T) or (B, 1); the result, bool, is the broadcast of both.
    """
    high = 1 + epsilon_high
    delta = math.inf if delta is None else delta
    negative = (ratio < 1 - epsilon_low) | (ratio > max(delta, high))
    return ((ratio > min(delta, high)) & (advantages > 0)) | (negative & (advantages < 0))


def clipped_by_weight(
    log_ratio: Tensor,
    weights: Tensor,
    advantages: Tensor,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
) -> Tensor:
    """Which tokens lose their gradient only because v, (B, T), stands inside the clip: vρ is clipped and ρ is not."""

    def clipped(ratio: Tensor) -> Tensor:
        return clipped_tokens(ratio, advantages, epsilon_low, epsilon_high, delta)

    ratio = log_ratio.exp()
    return clipped(ratio * weights) & ~clipped(ratio)
