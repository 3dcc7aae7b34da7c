"""What the weighted loss does, as pure functions on tensors. `LossMetrics` adds up their sums between two logs."""

import itertools
import math
from bisect import bisect_left

import torch
from torch import Tensor

from ..weights.rows import advantages_differ, group_mean, sides

QUARTILES = 4
# Bins of -log π, evenly spaced in log(-log π): 0.85 % each. Below the least and above the most one bin takes all.
SURPRISE_BINS, _LEAST_SURPRISE, _MOST_SURPRISE = 2048, 1e-6, 32.0


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

    The edges are the values at ranks ⌈n/4⌉, ⌈n/2⌉ and ⌈3n/4⌉. A value equal to an edge belongs below it, so that
    equal values share a quartile. Meaningless outside `mask`.
    """
    values = values.float()
    ordered = values.masked_fill(~mask.bool(), torch.inf).flatten().sort().values
    ranks = torch.arange(1, QUARTILES, device=values.device) * mask.bool().sum()
    edges = ordered[(torch.div(ranks + QUARTILES - 1, QUARTILES, rounding_mode="floor") - 1).clamp(min=0)]
    return torch.bucketize(values.contiguous(), edges)


def probability_histogram(logps: Tensor, mass: Tensor, own: Tensor) -> Tensor:
    """Count and mass of the own tokens by bin of log π, the most probable first, (2048, 2), from three (B, T)."""
    width = math.log(_MOST_SURPRISE / _LEAST_SURPRISE) / SURPRISE_BINS
    bins = (logps.float().neg().clamp(min=_LEAST_SURPRISE) / _LEAST_SURPRISE).log() / width
    bins = bins.long().clamp(0, SURPRISE_BINS - 1)  # after the cast: a NaN is then a bin like any other
    values = torch.stack([own.float(), mass], dim=-1).view(-1, 2)
    return mass.new_zeros(SURPRISE_BINS, 2).index_add(0, bins.flatten(), values)


def quartile_shares(counts: list[float], masses: list[float]) -> list[float]:
    """
    Part of all mass in each quarter of the values, lowest first, from the number of values in each bin, lowest first,
    and their mass. A bin on an edge is split in proportion. NaN without values or without mass.
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


def advantage_length_sums(lengths: Tensor, advantages: Tensor) -> Tensor:
    """
    Sums behind the correlation of advantage and length within groups and the mean length by sign of A, (7,).

    From |o| in own tokens and unweighted A, both (P, G). Only rows with tokens count, and only groups with a signal.

    Returns:
        `torch.Tensor`: Σ a·l, Σ a², Σ l² with a and l centred on their group's mean, then the sum of lengths and the
        number of rows with A > 0, and the same with A < 0.
    """
    present = (lengths > 0) & advantages_differ(advantages, lengths > 0)
    lengths, advantages = lengths.float() * present, advantages.float() * present
    a, n = (values - group_mean(values, present) * present for values in (advantages, lengths))
    positive, negative = advantages > 0, advantages < 0
    sums = [a * n, a.square(), n.square(), lengths * positive, positive, lengths * negative, negative]
    return torch.stack([values.float().sum() for values in sums])


def mass_sums(weights: Tensor, lengths: Tensor, advantages: Tensor) -> Tensor:
    """
    |A|·f·|o| of right (A > 0) and of wrong answers over all tokens, by the group's share of right answers, flat (6,).

    From f, own-token lengths and A of a generation batch, all (P, G). The share is up to 1/3, up to 2/3 or above.
    """
    sign = sides(advantages, lengths > 0, "signed")
    mass = advantages.abs() * weights * lengths / lengths.sum().clamp(min=1)
    edges = torch.tensor([1 / 3, 2 / 3], device=lengths.device)
    bins = torch.bucketize(group_mean((sign > 0).float(), lengths > 0).squeeze(1), edges)
    of_sign = torch.stack([mass * (sign > 0), mass * (sign < 0)]).sum(dim=-1)  # (2, P)
    return mass.new_zeros(2, 3).index_add(1, bins, of_sign).flatten()
