"""The loss's metrics over a logging interval: sums kept on the device, reduced over the processes once per log."""

import math

import torch
from accelerate import Accelerator

from .diagnostics import (
    SURPRISE_BINS,
    advantage_length_sums,
    effective_sample_size,
    mass_by_bin,
    probability_bins,
    quartile_shares,
)


class LossTally:
    """
    Sums over the micro-batches of a logging interval, kept on the device: no synchronisation before `flush`.

    A share is a ratio of sums over all tokens of all micro-batches and processes, not a mean of ratios.
    """

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self._minima: dict[str, torch.Tensor] = {}

    def add_responses(self, lengths: torch.Tensor, advantages: torch.Tensor) -> None:
        """Take in lengths and advantages of a whole generation batch, both (P, G), the same on every process."""
        sums, by_sign = advantage_length_sums(lengths, advantages)
        self._add("advantage/length_correlation", sums)
        self._add("advantage/positive_mean_length", by_sign[0])
        self._add("advantage/negative_mean_length", by_sign[1])

    def add_length_weights(self, weights: torch.Tensor) -> None:
        """Take in f of a whole generation batch, shape (P, G), the same on every process."""
        weights = weights.detach().float()
        has_tokens = weights > 0
        ess = effective_sample_size(weights)
        known = ~ess.isnan()
        self._add("length_weight/ess", torch.stack([ess.nan_to_num().sum(), known.sum()]))
        self._least("length_weight/min", weights.masked_fill(~has_tokens, torch.inf).min())
        self._least("length_weight/max", -weights.masked_fill(~has_tokens, -torch.inf).max())

    def add_token_weights(
        self, weights: torch.Tensor, mask: torch.Tensor, bounds: tuple[float, float] | None = None
    ) -> None:
        """Take in v of a micro-batch and its mask of own tokens, both (B, T), and the bounds of a v that has them."""
        own = mask.bool()
        count = own.sum()
        self._add("token_weight/mean", torch.stack([(weights * own).sum(), count]))
        self._least("token_weight/min", weights.masked_fill(~own, torch.inf).min())
        self._least("token_weight/max", -weights.masked_fill(~own, -torch.inf).max())
        if bounds is not None:
            self._add("token_weight/at_min", torch.stack([((weights <= bounds[0]) & own).sum(), count]))
            self._add("token_weight/at_max", torch.stack([((weights >= bounds[1]) & own).sum(), count]))

    def add_clipped(self, clipped: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> None:
        """Take in which tokens have no gradient, (B, T) or (B, 1), A, (B, 1), and the mask of own tokens, (B, T)."""
        for name, of_sign in (
            ("clipped/advantage_positive", mask * (advantages > 0)),
            ("clipped/advantage_negative", mask * (advantages < 0)),
        ):
            self._add(name, torch.stack([(clipped * of_sign).sum(), of_sign.sum()]))

    def add_clipped_by_regulation(self, clipped: torch.Tensor, mask: torch.Tensor) -> None:
        """Take in which tokens are clipped only because v stands inside the clip, and own tokens, both (B, T)."""
        self._add("token_weight/clipped_by_regulation", torch.stack([(clipped * mask).sum(), mask.sum()]))

    def add_shares(
        self, mass: torch.Tensor, length_bins: torch.Tensor, logps: torch.Tensor, mask: torch.Tensor
    ) -> None:
        """
        Take in |w·A| of a micro-batch.

        Args:
            mass (`torch.Tensor`): |w·A|, shape (B, T).
            length_bins (`torch.Tensor`): quartile of each response's length in its generation batch, (B,).
            logps (`torch.Tensor`): log-probabilities, (B, T); their quartiles are those of the interval.
            mask (`torch.Tensor`): own tokens, (B, T).
        """
        own = mask.float()
        mass = mass.detach().float() * own
        self._add("share/length", mass_by_bin(mass.sum(dim=1), length_bins))
        bins = probability_bins(logps.detach()).flatten()
        histogram = mass.new_zeros(SURPRISE_BINS, 2)
        values = torch.stack([own, mass], dim=-1).view(-1, 2)
        self._add("share/probability", histogram.index_add(0, bins, values).flatten())

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Reduce over the processes, empty the tally and return the metrics. Every process must call it.

        Returns:
            `dict[str, float]`: metric name -> value; NaN for a ratio over nothing.
        """
        if not self._sums:
            return {}
        local = torch.cat([*self._sums.values(), *(value.unsqueeze(0) for value in self._minima.values())])
        everywhere = accelerator.gather(local.unsqueeze(0))  # (processes, all of it): one collective, one transfer
        count = local.numel() - len(self._minima)
        values = torch.cat([everywhere[:, :count].sum(dim=0), everywhere[:, count:].amin(dim=0)]).tolist()
        metrics = {}
        for name, sums in self._sums.items():
            metrics |= _finish(name, values[: sums.numel()])
            values = values[sums.numel() :]
        for name, least in zip(self._minima, values, strict=True):
            value = -least if name.endswith("/max") else least
            metrics[name] = value if math.isfinite(value) else float("nan")
        self._sums, self._minima = {}, {}
        return metrics

    def _add(self, name: str, values: torch.Tensor) -> None:
        values = values.float()
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def _least(self, name: str, value: torch.Tensor) -> None:
        value = value.float()
        self._minima[name] = torch.minimum(self._minima[name], value) if name in self._minima else value


def _finish(name: str, sums: list[float]) -> dict[str, float]:
    """Turn the sums kept under `name` into the metrics they stand for."""
    if name == "share/probability":
        histogram = sums[::-1]  # now the least probable first, and mass before count
        shares = quartile_shares(histogram[1::2], histogram[0::2])
    elif name == "share/length":
        shares = [_ratio(value, sum(sums)) for value in sums]
    elif name == "advantage/length_correlation":
        return {name: _ratio(sums[0], math.sqrt(sums[1]) * math.sqrt(sums[2]))}
    else:
        return {name: _ratio(*sums)}
    return {f"{name}_q{q}": share for q, share in enumerate(shares, start=1)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
