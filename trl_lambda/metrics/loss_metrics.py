"""The metrics of the weights, collected for TRL's logs in training and evaluation, and a warning of a dead run."""

import itertools
import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator

from ..generation_batch import GenerationBatch
from ..lambda_parameter import LambdaParameter
from ..weights import groups_with_signal
from ..weights.rows import advantages_differ, group_mean, sides

# Own tokens and padding that wait for a log at most, per process; above, they are counted at once.
_WAITING_TOKENS = 2**20
# The commonest dead run: so many generation batches in a row with so many answers cut, and all groups tied.
BATCHES, CUT = 20, 0.9
QUARTILES = 4
# Bins of -log π, evenly spaced in log(-log π): 0.85 % each. Below the least and above the most one bin takes all.
SURPRISE_BINS, _LEAST_SURPRISE, _MOST_SURPRISE = 2048, 1e-6, 32.0


class LossMetrics:
    """
    Metrics of the weights over a logging interval: sums, least and largest values over micro-batches and processes.

    A metric is a ratio of sums, not a mean of ratios, so it is the same however the batch is cut. The loss only hands
    over tensors. The work is done when a log is due, or when so many tokens wait that keeping them would cost memory.
    """

    def __init__(self) -> None:
        self._work: list[Callable[[], None]] = []
        self._waiting = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._finish: dict[str, Callable[[list[float]], dict[str, float]]] = {}
        self._least: dict[str, torch.Tensor] = {}  # of the largest values the negatives
        self._dead_batches = 0  # in a row

    def defer(self, work: Callable[[], None], tokens: int = 0) -> None:
        """Call `work`, which keeps `tokens` tokens in memory, at the next log or when too many wait."""
        self._work.append(work)
        self._waiting += tokens
        if self._waiting > _WAITING_TOKENS:
            self._do_work()

    @torch.no_grad()
    def _do_work(self) -> None:
        for work in self._work:
            work()
        self._work, self._waiting = [], 0

    def add_generation_batch(self, batch: GenerationBatch) -> None:
        """Take in a new generation batch."""
        if batch.advantages is not None:
            self._add("advantage", advantage_length_sums(batch.lengths, batch.advantages), _advantage_and_length)
        if "rewards" in batch.statistics:
            tied = ~groups_with_signal(batch.statistics["rewards"])
            self._add_mean("groups/tied", tied, torch.ones_like(tied))

    def warn_of_dead_run(self, logged: Mapping[str, list[float]]) -> None:
        """Warn once, after 20 generation batches in a row from which nothing can be learned, by TRL's metrics."""
        cut, tied = (logged.get(name) or [0.0] for name in ("completions/clipped_ratio", "frac_reward_zero_std"))
        self._dead_batches = self._dead_batches + 1 if cut[-1] >= CUT and tied[-1] == 1 else 0
        if self._dead_batches == BATCHES:
            warnings.warn(
                f"Nothing can be learned: in {BATCHES} generation batches in a row at least {CUT:.0%} of the answers "
                "were cut at max_completion_length and every group had equal rewards. No weight changes that. Raise "
                "max_completion_length, shorten the task, or give a reward for partial answers.",
                UserWarning,
                stacklevel=2,
            )

    def add_length_weights(self, weights: torch.Tensor, batch: GenerationBatch, has_factor: bool) -> None:
        """Take in f of a generation batch at one loss, (P, G), and the masses on right and on wrong answers."""
        if has_factor:  # f is more than the loss's own reduction
            ess = effective_sample_size(weights)
            self._add_mean("length_weight/ess", ess.nan_to_num(), ~ess.isnan())
            self._add_range("length_weight", weights, weights > 0)
        if batch.advantages is not None:
            sums = mass_sums(weights, batch.lengths, batch.advantages)
            self._add("mass", torch.cat([sums, torch.ones_like(sums[:1])]), _masses)

    def add_tokens(
        self,
        batch: GenerationBatch,
        places: torch.Tensor,
        length_weights: torch.Tensor,
        advantages: torch.Tensor,
        logps: torch.Tensor,
        mask: torch.Tensor,
        token_weights: torch.Tensor | None,
        bounds: tuple[float, float] | None,
    ) -> None:
        """
        Take in one micro-batch.

        Args:
            batch, places, length_weights: its generation batch, its rows' places there, (B,), and f of it, (P, G).
            advantages: unweighted A, (B, 1) or (B, T).
            logps, mask: log-probabilities and the mask of own tokens, (B, T).
            token_weights, bounds: v, (B, T), and the bounds of a v that is clipped to them.
        """
        mass = advantages.abs() * length_weights.flatten()[places].unsqueeze(1) * mask
        if batch.advantages is not None:  # rounding around equal rewards is no share of the loss
            differ = advantages_differ(batch.advantages, batch.lengths > 0).expand_as(batch.lengths)
            mass = mass * differ.flatten()[places].unsqueeze(1)
        if token_weights is not None:
            mass = mass * token_weights
            self._add_mean("token_weight/mean", token_weights, mask)
            self._add_range("token_weight", token_weights, mask.bool())
            if bounds is not None:
                self._add_mean("token_weight/at_min", token_weights <= bounds[0], mask)
                self._add_mean("token_weight/at_max", token_weights >= bounds[1], mask)
        mass = mass.float()
        quartiles = quartile_index(batch.lengths, batch.lengths > 0).flatten()[places]
        self._add("share/length", mass.new_zeros(QUARTILES).index_add(0, quartiles, mass.sum(dim=1)), _length_shares)
        self._add("share/probability", probability_histogram(logps, mass, mask).flatten(), _probability_shares)

    def _add(self, name: str, sums: torch.Tensor, finish: Callable[[list[float]], dict[str, float]]) -> None:
        """Add to the sums under `name`, 1-d. `finish` turns their totals into metrics, name -> value."""
        self._sums[name] = self._sums[name] + sums.float() if name in self._sums else sums.float()
        self._finish[name] = finish

    def _add_mean(self, name: str, values: torch.Tensor, where: torch.Tensor) -> None:
        self._add(
            name,
            torch.stack([(values * where).float().sum(), where.float().sum()]),
            lambda sums: {name: ratio(*sums)},
        )

    def _add_range(self, name: str, values: torch.Tensor, where: torch.Tensor) -> None:
        for key, signed in ((f"{name}/min", values), (f"{name}/max", -values)):
            least = signed.masked_fill(~where, torch.inf).min().float()
            self._least[key] = torch.minimum(self._least.get(key, least), least)

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """
        The metrics since the last call by name, reduced over the processes, NaN over nothing. Every process calls it.
        """
        self._do_work()
        if not self._sums:
            return {}
        local = torch.cat([*self._sums.values(), *(value.unsqueeze(0) for value in self._least.values())])
        everywhere = accelerator.gather(local.unsqueeze(0))  # (processes, all of it): one collective, one transfer
        count = local.numel() - len(self._least)
        values = torch.cat([everywhere[:, :count].sum(dim=0), everywhere[:, count:].amin(dim=0)]).tolist()
        metrics: dict[str, float] = {}
        for name, sums in self._sums.items():
            metrics |= self._finish[name](values[: sums.numel()])
            values = values[sums.numel() :]
        for name, value in zip(self._least, values, strict=True):
            metrics[name] = math.nan if math.isinf(value) else -value if name.endswith("/max") else value
        self._sums, self._finish, self._least = {}, {}, {}
        return metrics


def lambda_metrics(parameter: LambdaParameter) -> dict[str, float]:
    """
    λ of every feature now, its mean gradient since the last call, the count of skipped steps, and the metrics of its
    learning. Call it for a log only: it waits for the device.
    """
    metrics = parameter.learning.metrics() | {
        "lambda/value" if name == "length" else f"lambda/{name}": value
        for name, value in zip(parameter.features, parameter.values, strict=True)
    }
    if parameter.learning.is_learnable:
        grads = [grad for grad in parameter.grads if math.isfinite(grad)]
        metrics |= {"lambda/grad": ratio(sum(grads), len(grads)), "lambda/skipped": float(parameter.skipped)}
        parameter.grads.clear()
    return metrics


def _advantage_and_length(sums: list[float]) -> dict[str, float]:
    return {
        "advantage/length_correlation": ratio(sums[0], math.sqrt(sums[1]) * math.sqrt(sums[2])),
        "advantage/positive_mean_length": ratio(sums[3], sums[4]),
        "advantage/negative_mean_length": ratio(sums[5], sums[6]),
    }


def _masses(sums: list[float]) -> dict[str, float]:
    """From the sums of `mass_sums` and the number of losses; hard, middle, easy: few to many right answers."""
    masses = [value / sums[6] for value in sums[:6]]
    names = [f"mass/{sign}_{group}" for sign in ("positive", "negative") for group in ("hard", "middle", "easy")]
    return {"mass/positive": sum(masses[:3]), "mass/negative": sum(masses[3:])} | dict(zip(names, masses, strict=True))


def _length_shares(masses: list[float]) -> dict[str, float]:
    return {f"share/length_q{q}": ratio(mass, sum(masses)) for q, mass in enumerate(masses, start=1)}


def _probability_shares(histogram: list[float]) -> dict[str, float]:
    """From count and mass in each bin, the most probable first; the quarters begin with the least."""
    counts, masses = histogram[-2::-2], histogram[-1::-2]
    return {f"share/probability_q{q}": share for q, share in enumerate(quartile_shares(counts, masses), start=1)}


# ---- What the weighted loss does, as pure functions on tensors ----


def ratio(part: float, whole: float) -> float:
    """`part` of `whole`; NaN for a ratio over nothing."""
    return part / whole if whole else math.nan


def effective_sample_size(weights: torch.Tensor) -> torch.Tensor:
    """
    Effective sample size of each group's f, (P, G), as a part of its rows with tokens: ``(Σf)² / (n · Σf²)``.

    In (0, 1], (P,); 1 where f is uniform, NaN for a group without tokens.
    """
    return weights.sum(dim=1).square() / ((weights > 0).sum(dim=1) * weights.square().sum(dim=1))


def quartile_index(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
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


def probability_histogram(logps: torch.Tensor, mass: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
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


def advantage_length_sums(lengths: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
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
    sums = (a * n, a.square(), n.square(), lengths * positive, positive, lengths * negative, negative)
    return torch.stack([values.float().sum() for values in sums])


def mass_sums(weights: torch.Tensor, lengths: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
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
