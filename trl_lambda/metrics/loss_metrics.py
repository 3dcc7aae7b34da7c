"""The metrics of the weights, collected for TRL's logs in training and evaluation, and a warning of a dead run."""

import math
import warnings
from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from ..generation_batch import GenerationBatch
from ..lambda_parameter import LambdaParameter
from ..weights import groups_with_signal
from ..weights.rows import advantages_differ, sides
from .diagnostics import (
    QUARTILES,
    advantage_length_sums,
    effective_sample_size,
    mass_sums,
    probability_histogram,
    quartile_index,
    quartile_shares,
    ratio,
)

# Own tokens and padding that wait for a log at most, per process; above, they are counted at once.
_WAITING_TOKENS = 2**20
# The commonest dead run: so many generation batches in a row with so many answers cut, and all groups tied.
BATCHES, CUT = 20, 0.9


class LossMetrics:
    """
    Metrics of the weights over a logging interval: sums, least and largest values over micro-batches and processes.

    A metric is a ratio of sums, not a mean of ratios, so it is the same however the batch is cut. The loss only hands
    over tensors. The work is done when a log is due, or when so many tokens wait that keeping them would cost memory.
    """

    def __init__(self) -> None:
        self._work: list[Callable[[], None]] = []
        self._waiting = 0
        self._sums: dict[str, Tensor] = {}
        self._finish: dict[str, Callable[[list[float]], dict[str, float]]] = {}
        self._least: dict[str, Tensor] = {}  # of the largest values the negatives

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

    def add_length_weights(self, weights: Tensor, batch: GenerationBatch, by_sign: bool) -> None:
        """Take in f of a generation batch at one loss, (P, G); its metrics are split by the sign of A if asked."""
        advantages, ess = batch.advantages, effective_sample_size(weights)
        self._add_mean("length_weight/ess", ess.nan_to_num(), ~ess.isnan())
        self._add_range("length_weight", weights, weights > 0)
        if by_sign and advantages is not None:
            sign = sides(advantages, batch.lengths > 0, "signed")  # rounding around equal rewards has none
            for name, of_sign in (("positive", sign > 0), ("negative", sign < 0)):
                self._add_mean(f"length_weight/{name}/mean", weights, of_sign & (weights > 0))
                self._add_range(f"length_weight/{name}", weights, of_sign & (weights > 0))

    def add_masses(self, weights: Tensor, batch: GenerationBatch) -> None:
        """Take in the masses on right and wrong answers of a generation batch at one loss, from f, (P, G)."""
        if batch.advantages is not None:
            sums = mass_sums(weights, batch.lengths, batch.advantages)
            self._add("mass", torch.cat([sums, torch.ones_like(sums[:1])]), _masses)

    def add_tokens(
        self,
        batch: GenerationBatch,
        places: Tensor,
        length_weights: Tensor,
        advantages: Tensor,
        logps: Tensor,
        mask: Tensor,
        token_weights: Tensor | None,
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

    def _add(self, name: str, sums: Tensor, finish: Callable[[list[float]], dict[str, float]]) -> None:
        """Add to the sums under `name`, 1-d. `finish` turns their totals into metrics, name -> value."""
        self._sums[name] = self._sums[name] + sums.float() if name in self._sums else sums.float()
        self._finish[name] = finish

    def _add_mean(self, name: str, values: Tensor, where: Tensor) -> None:
        sums = torch.stack([(values * where).float().sum(), where.float().sum()])
        self._add(name, sums, lambda sums: {name: ratio(*sums)})

    def _add_range(self, name: str, values: Tensor, where: Tensor) -> None:
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


def lambda_metrics(parameter: LambdaParameter) -> dict[str, float]:
    """
    λ of every feature now, its mean gradient since the last call, the count of skipped steps, and the metrics of its
    learning. Call it for a log only: it waits for the device.
    """
    names = ("lambda/value" if name == "length" else f"lambda/{name}" for name in parameter.features)
    metrics = dict(zip(names, parameter.values, strict=True)) | parameter.learning.metrics()
    if parameter.learning.is_learnable:
        grads = [grad for grad in parameter.grads if math.isfinite(grad)]
        metrics |= {"lambda/grad": ratio(sum(grads), len(grads)), "lambda/skipped": float(parameter.skipped)}
        parameter.grads.clear()
    return metrics


def _advantage_and_length(sums: list[float]) -> dict[str, float]:
    """From the sums of `advantage_length_sums`."""
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
    shares = quartile_shares(histogram[-2::-2], histogram[-1::-2])
    return {f"share/probability_q{q}": share for q, share in enumerate(shares, start=1)}
