"""The loss's metrics over a logging interval: sums kept on the device, reduced over the processes once per log."""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from ..weights import groups_with_signal
from ..weights.rows import group_mean
from ..weights.sides import sides
from .diagnostics import (
    SURPRISE_BINS,
    advantage_length_sums,
    effective_sample_size,
    mass_by_bin,
    probability_bins,
    quartile_shares,
    ratio,
)

# Groups by their share of right answers: below 1/3, up to 2/3, above.
_PASS_RATES = ("hard", "middle", "easy")
Finish = Callable[[list[float]], dict[str, float]]


class LossTally:
    """
    Sums, least and largest values over the micro-batches and processes of a logging interval.

    A metric is a ratio of sums, not a mean of ratios: however the batch is cut, it comes out the same. Nothing waits
    for the device before `flush`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._finish: dict[str, Finish] = {}
        self._least: dict[str, Tensor] = {}
        self._most: dict[str, Tensor] = {}

    def add(self, name: str, sums: Tensor, finish: Finish) -> None:
        """Add to the sums under `name`, 1-d; `finish` turns their totals into metrics, name -> value."""
        sums = sums.float()
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._finish[name] = finish

    def add_ratio(self, name: str, part: Tensor, whole: Tensor) -> None:
        """Add to a metric that is one sum over another, both 0-d."""
        self.add(name, torch.stack([part.float(), whole.float()]), lambda sums: {name: ratio(*sums)})

    def add_range(self, name: str, values: Tensor, where: Tensor) -> None:
        """Take `values` under the mask `where` into `name`/min and `name`/max."""
        least = values.masked_fill(~where, torch.inf).min().float()
        most = values.masked_fill(~where, -torch.inf).max().float()
        self._least[name] = torch.minimum(self._least.get(name, least), least)
        self._most[name] = torch.maximum(self._most.get(name, most), most)

    def add_responses(self, lengths: Tensor, advantages: Tensor) -> None:
        """Take in lengths and advantages of a whole generation batch, both (P, G), the same on every process."""
        sums, by_sign = advantage_length_sums(lengths, advantages)
        self.add("advantage/length_correlation", sums, _correlation)
        for name, (length, rows) in zip(("positive", "negative"), by_sign, strict=True):
            self.add_ratio(f"advantage/{name}_mean_length", length, rows)

    def add_length_weights(self, weights: Tensor, advantages: Tensor | None = None) -> None:
        """Take in f of a whole generation batch, (P, G), the same on every process. Split by sign of A if given."""
        weights = weights.detach().float()
        by_sign = {} if advantages is None else {"positive": advantages > 0, "negative": advantages < 0}
        for name, of_sign in by_sign.items():
            rows = of_sign & (weights > 0)
            self.add_ratio(f"length_weight/{name}/mean", (weights * rows).sum(), rows.sum())
            self.add_range(f"length_weight/{name}", weights, rows)
        ess = effective_sample_size(weights)
        self.add_ratio("length_weight/ess", ess.nan_to_num().sum(), (~ess.isnan()).sum())
        self.add_range("length_weight", weights, weights > 0)

    def add_token_weights(self, weights: Tensor, mask: Tensor, bounds: tuple[float, float] | None = None) -> None:
        """Take in v of a micro-batch and its mask of own tokens, both (B, T), and the bounds of a v that has them."""
        own = mask.bool()
        count = own.sum()
        self.add_ratio("token_weight/mean", (weights * own).sum(), count)
        self.add_range("token_weight", weights, own)
        if bounds is not None:
            self.add_ratio("token_weight/at_min", ((weights <= bounds[0]) & own).sum(), count)
            self.add_ratio("token_weight/at_max", ((weights >= bounds[1]) & own).sum(), count)

    def add_clipped(self, clipped: Tensor, advantages: Tensor, mask: Tensor) -> None:
        """Take in which tokens have no gradient, (B, T) or (B, 1), A, (B, 1), and the mask of own tokens, (B, T)."""
        for name, of_sign in (("positive", mask * (advantages > 0)), ("negative", mask * (advantages < 0))):
            self.add_ratio(f"clipped/advantage_{name}", (clipped * of_sign).sum(), of_sign.sum())

    def add_clipped_by_weight(self, clipped: Tensor, mask: Tensor) -> None:
        """Take in which tokens are clipped only because v stands inside the clip, and own tokens, both (B, T)."""
        self.add_ratio("token_weight/clipped_by_weight", (clipped * mask).sum(), mask.sum())

    def add_tied_groups(self, rewards: Tensor) -> None:
        """Take in the rewards of a generation batch, (P, G): the share of groups whose rewards are all equal."""
        live = groups_with_signal(rewards)
        self.add_ratio("groups/tied", (~live).sum(), torch.ones_like(live).sum())

    def add_masses(self, weights: Tensor, lengths: Tensor, advantages: Tensor) -> None:
        """
        Take in f, own-token lengths and A of a generation batch at one loss, all (P, G): |A|·f·|o| of right (A > 0)
        and wrong answers over all tokens, in sum and by the group's share of right answers.
        """
        sign = sides(advantages, lengths > 0, "signed")
        mass = advantages.abs() * weights * lengths / lengths.sum().clamp(min=1)
        share = group_mean((sign > 0).float(), lengths > 0)  # (P, 1)
        bins = torch.bucketize(share, torch.tensor([1 / 3, 2 / 3], device=share.device, dtype=share.dtype))
        of_sign = torch.stack([mass * (sign > 0), mass * (sign < 0)]).sum(dim=-1)  # (2, P)
        sums = mass.new_zeros(2, 3).index_add(1, bins.squeeze(1), of_sign)
        self.add("mass", torch.cat([sums.flatten(), sums.new_ones(1)]), _masses)

    def add_shares(self, mass: Tensor, length_bins: Tensor, logps: Tensor, mask: Tensor) -> None:
        """
        Take in |w·A| of a micro-batch, (B, T), with the quartile of each response's length in its generation batch,
        (B,), log-probabilities, (B, T), whose quartiles are those of the interval, and the mask of own tokens, (B, T).
        """
        own = mask.float()
        mass = mass.detach().float() * own
        self.add("share/length", mass_by_bin(mass.sum(dim=1), length_bins), _length_shares)
        bins = probability_bins(logps.detach()).flatten()
        values = torch.stack([own, mass], dim=-1).view(-1, 2)
        histogram = mass.new_zeros(SURPRISE_BINS, 2).index_add(0, bins, values)
        self.add("share/probability", histogram.flatten(), _probability_shares)

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Reduce over the processes, empty the tally and return the metrics by name, NaN for a ratio, least or largest
        value over nothing. Every process must call it.
        """
        if not self._sums:
            return {}
        ranges = [*self._least.values(), *(-value for value in self._most.values())]
        local = torch.cat([*self._sums.values(), *(value.unsqueeze(0) for value in ranges)])
        everywhere = accelerator.gather(local.unsqueeze(0))  # (processes, all of it): one collective, one transfer
        count = local.numel() - len(ranges)
        values = torch.cat([everywhere[:, :count].sum(dim=0), everywhere[:, count:].amin(dim=0)]).tolist()
        metrics: dict[str, float] = {}
        for name, sums in self._sums.items():
            metrics |= self._finish[name](values[: sums.numel()])
            values = values[sums.numel() :]
        for name, least in zip(self._least, values, strict=False):
            metrics[f"{name}/min"] = least if math.isfinite(least) else math.nan
        for name, negated in zip(self._most, values[len(self._least) :], strict=True):
            metrics[f"{name}/max"] = -negated if math.isfinite(negated) else math.nan
        self._sums, self._finish, self._least, self._most = {}, {}, {}, {}
        return metrics


def _correlation(sums: list[float]) -> dict[str, float]:
    """From Σ a·l, Σ a² and Σ l²."""
    return {"advantage/length_correlation": ratio(sums[0], math.sqrt(sums[1]) * math.sqrt(sums[2]))}


def _masses(sums: list[float]) -> dict[str, float]:
    """From the mass of right and of wrong answers in groups with few, some and many right ones, and the losses."""
    count = sums[-1]
    metrics = {}
    for name, masses in (("positive", sums[:3]), ("negative", sums[3:6])):
        metrics[f"mass/{name}"] = sum(masses) / count
        metrics |= {f"mass/{name}_{bin_}": m / count for bin_, m in zip(_PASS_RATES, masses, strict=True)}
    return metrics


def _length_shares(masses: list[float]) -> dict[str, float]:
    """From the mass in each quartile."""
    return {f"share/length_q{q}": ratio(mass, sum(masses)) for q, mass in enumerate(masses, start=1)}


def _probability_shares(histogram: list[float]) -> dict[str, float]:
    """From count and mass in each bin, the most probable first; the quarters begin with the least."""
    histogram = histogram[::-1]
    shares = quartile_shares(histogram[1::2], histogram[0::2])
    return {f"share/probability_q{q}": share for q, share in enumerate(shares, start=1)}
