"""What the weighted loss does, as numbers: where Σ|w·A| goes by length and by probability, and how even f is.

Pure functions on tensors, and `LossTally`, which adds up a logging interval on the device and reduces it once.
"""

import torch
from accelerate import Accelerator

QUARTILES = 4


def effective_sample_size(weights: torch.Tensor) -> torch.Tensor:
    """
    Effective sample size of each group's weights, as a part of its rows with tokens: ``(Σf)² / (n · Σf²)``.

    Args:
        weights (`torch.Tensor`): f, shape (P, G), 0 where a row has no tokens.

    Returns:
        `torch.Tensor`: shape (P,), in (0, 1]; 1 where f is uniform, NaN for a group without tokens.
    """
    count = (weights > 0).sum(dim=1)
    return weights.sum(dim=1).square() / (count * weights.square().sum(dim=1))


def quartile_index(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Quartile of each value among the values under `mask`: 0 for the lowest quarter, 3 for the highest.

    The edges are the values at ranks ⌈n/4⌉, ⌈n/2⌉ and ⌈3n/4⌉; a value equal to an edge belongs below it, so that
    equal values share a quartile.

    Args:
        values (`torch.Tensor`): any shape.
        mask (`torch.Tensor`): same shape, true where a value counts.

    Returns:
        `torch.Tensor`: long, the shape of `values`; meaningless outside `mask`.
    """
    values = values.float()
    ordered = values.masked_fill(~mask.bool(), torch.inf).flatten().sort().values
    count = mask.bool().sum()
    ranks = torch.arange(1, QUARTILES, device=values.device) * count
    edges = ordered[(torch.div(ranks + QUARTILES - 1, QUARTILES, rounding_mode="floor") - 1).clamp(min=0)]
    return torch.bucketize(values.contiguous(), edges)


def mass_by_bin(mass: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """
    Sum of `mass` in each quartile.

    Args:
        mass (`torch.Tensor`): any shape, 0 where nothing counts.
        bins (`torch.Tensor`): long, same shape, values 0..3.

    Returns:
        `torch.Tensor`: shape (4,), float32.
    """
    total = torch.zeros(QUARTILES, dtype=torch.float32, device=mass.device)
    return total.index_add(0, bins.flatten(), mass.flatten().float())


def clipped_by_weight(
    log_ratio: torch.Tensor, weights: torch.Tensor, advantages: torch.Tensor, epsilon_low: float, epsilon_high: float
) -> torch.Tensor:
    """
    Which tokens lose their gradient only because v stands inside the clip: vρ is clipped and ρ is not.

    Args:
        log_ratio (`torch.Tensor`): log ρ, shape (B, T).
        weights (`torch.Tensor`): v, shape (B, T).
        advantages (`torch.Tensor`): A, shape (B, 1) or (B, T).
        epsilon_low, epsilon_high (`float`): the clip is [1 - epsilon_low, 1 + epsilon_high].

    Returns:
        `torch.Tensor`: bool, shape (B, T).
    """

    def clipped(ratio: torch.Tensor) -> torch.Tensor:
        return ((ratio > 1 + epsilon_high) & (advantages > 0)) | ((ratio < 1 - epsilon_low) & (advantages < 0))

    ratio = log_ratio.exp()
    return clipped(ratio * weights) & ~clipped(ratio)


class LossTally:
    """
    Sums over the micro-batches of a logging interval, kept on the device: no synchronisation before `flush`.

    A share is a ratio of sums over all tokens of all micro-batches and processes, not a mean of ratios.
    """

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self._minima: dict[str, torch.Tensor] = {}

    def add_length_weights(self, weights: torch.Tensor) -> None:
        """Take in f of a whole generation batch, shape (P, G), the same on every process."""
        weights = weights.detach().float()
        has_tokens = weights > 0
        ess = effective_sample_size(weights)
        known = ~ess.isnan()
        self._add("length_weight/ess", torch.stack([ess.nan_to_num().sum(), known.sum()]))
        self._least("length_weight/min", weights.masked_fill(~has_tokens, torch.inf).min())
        self._least("length_weight/max", -weights.max())

    def add_token_weights(self, weights: torch.Tensor, mask: torch.Tensor) -> None:
        """Take in v of a micro-batch and its mask of own tokens, both (B, T)."""
        own = mask.bool()
        self._add("token_weight/mean", torch.stack([(weights * own).sum(), own.sum()]))
        self._least("token_weight/min", weights.masked_fill(~own, torch.inf).min())
        self._least("token_weight/max", -weights.masked_fill(~own, -torch.inf).max())

    def add_clipped(self, clipped: torch.Tensor, mask: torch.Tensor) -> None:
        """Take in which tokens are clipped because of v, and the mask of own tokens, both (B, T)."""
        self._add("token_weight/clipped_by_regulation", torch.stack([(clipped * mask).sum(), mask.sum()]))

    def add_shares(
        self, mass: torch.Tensor, length_bins: torch.Tensor, logps: torch.Tensor, mask: torch.Tensor
    ) -> None:
        """
        Take in |w·A| of a micro-batch.

        Args:
            mass (`torch.Tensor`): |w·A|, shape (B, T).
            length_bins (`torch.Tensor`): quartile of each response's length in its generation batch, (B,).
            logps (`torch.Tensor`): log-probabilities, (B, T); their quartiles are those of this micro-batch.
            mask (`torch.Tensor`): own tokens, (B, T).
        """
        own = mask.bool()
        mass = mass.detach() * own
        self._add("share/length", mass_by_bin(mass, length_bins.unsqueeze(1).expand_as(mass)))
        bins = quartile_index(logps.detach().float(), own).masked_fill(~own, 0)
        self._add("share/probability", mass_by_bin(mass, bins))

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Reduce over the processes, empty the tally and return the metrics. Every process must call it.

        Returns:
            `dict[str, float]`: metric name -> value; NaN for a ratio over nothing.
        """
        if not self._sums:
            return {}
        sums = torch.cat(list(self._sums.values()))
        sums = accelerator.reduce(sums, reduction="sum").tolist()
        metrics = {}
        for name, local in self._sums.items():
            values, sums = sums[: local.numel()], sums[local.numel() :]
            if name.startswith("share/"):
                metrics |= {f"{name}_q{q + 1}": _ratio(value, sum(values)) for q, value in enumerate(values)}
            else:
                metrics[name] = _ratio(*values)
        if self._minima:
            minima = accelerator.gather(torch.stack(list(self._minima.values())).unsqueeze(0)).amin(dim=0).tolist()
            for name, least in zip(self._minima, minima, strict=True):
                value = -least if name.endswith("/max") else least
                metrics[name] = value if abs(value) != float("inf") else float("nan")
        self._sums, self._minima = {}, {}
        return metrics

    def _add(self, name: str, values: torch.Tensor) -> None:
        values = values.float()
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def _least(self, name: str, value: torch.Tensor) -> None:
        value = value.float()
        self._minima[name] = torch.minimum(self._minima[name], value) if name in self._minima else value


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
