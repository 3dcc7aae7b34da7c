"""The metrics of the weights in training and evaluation, collected for TRL's logs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..generation_batch import GenerationBatch
from ..lambda_parameter import LambdaParameter
from ..trl_seam.contract import CLIPPED_LOSS_TYPES
from ..trl_seam.scoring import count_turns
from ..weights.sides import advantages_differ
from .diagnostics import clipped_by_weight, clipped_tokens, quartile_index
from .loss_tally import LossTally
from .turns import finish_turn_advantages, finish_turn_masses, turn_advantages, turn_masses

# Own tokens and padding that wait for a log at most, per process; above, they are counted at once.
_WAITING_TOKENS = 2**20


@dataclass(frozen=True)
class Clip:
    """The PPO clip as TRL has it at this loss, and whether the ratio is one per sequence or v stands in it."""

    epsilon_low: float
    epsilon_high: float
    delta: float | None
    per_sequence: bool
    has_weight_inside: bool

    @classmethod
    def of(cls, trainer: Any) -> "Clip | None":
        """That of a trainer; `None` for a surrogate without a clip."""
        if trainer.loss_type not in (*CLIPPED_LOSS_TYPES, "luspo"):
            return None
        per_sequence = trainer.importance_sampling_level == "sequence"
        args = trainer.args
        return cls(trainer.epsilon_low, trainer.epsilon_high, args.delta, per_sequence, args.token_weight_inside_clip)


@dataclass(frozen=True)
class Tokens:
    """One micro-batch at its loss, all detached and per token, (B, T), unless it says otherwise."""

    batch: GenerationBatch  # that it is of
    places: Tensor  # of its rows there, (B,)
    length_weights: Tensor  # of all of it, (P, G)
    mask: Tensor
    left: Tensor  # own tokens that TRL's corrections leave in the loss
    logps: Tensor
    old_logps: Tensor | None  # `None`: this very pass, ρ = 1
    advantages: Tensor  # unweighted, (B, 1 or T)
    token_weight: Tensor | None
    clip: Clip | None


class LossMetrics:
    """
    Metrics of the weights over a logging interval.

    The loss only hands over tensors. The work is done when a log is due, or when so many tokens wait that keeping them
    would cost memory.

    Args:
        token_bounds (`tuple[float, float]`, *optional*): the bounds of a v that is clipped to them.
        by_sign (`bool`): whether f differs by the sign of A, so that its metrics are apart.
        with_turns (`bool`): whether conversations may have several turns.
        with_ties (`bool`): whether tied groups are dropped, so that they are counted.
    """

    def __init__(
        self, token_bounds: tuple[float, float] | None, *, by_sign: bool, with_turns: bool, with_ties: bool
    ) -> None:
        self._token_bounds = token_bounds
        self._by_sign = by_sign
        self._with_turns = with_turns
        self._with_ties = with_ties
        self._tallies = {"train": LossTally(), "eval": LossTally()}
        self._batches: dict[str, list[GenerationBatch]] = {"train": [], "eval": []}
        self._weights: dict[str, list[tuple[Tensor, GenerationBatch, bool]]] = {"train": [], "eval": []}
        self._tokens: dict[str, list[Tokens]] = {"train": [], "eval": []}
        self._waiting = 0

    def record_generation_batch(self, mode: str, batch: GenerationBatch) -> None:
        """Take in a new generation batch; `mode` is `"train"` or `"eval"`."""
        self._batches[mode].append(batch)

    def record_length_weights(self, mode: str, weights: Tensor, batch: GenerationBatch, *, is_trls: bool) -> None:
        """Take in f of the generation batch at one loss, (P, G). Only masses are logged of TRL's own reduction."""
        self._weights[mode].append((weights.detach(), batch, is_trls))

    def record_tokens(self, mode: str, tokens: Tokens) -> None:
        """Take in the tokens of one micro-batch."""
        self._tokens[mode].append(tokens)
        self._waiting += tokens.mask.numel()
        if self._waiting > _WAITING_TOKENS:
            self._count(mode)

    def flush(self, mode: str, accelerator: Accelerator) -> Mapping[str, float]:
        """The metrics since the last call, reduced over the processes. Every process must call it."""
        self._count(mode)
        return self._tallies[mode].flush(accelerator)

    @torch.no_grad()
    def _count(self, mode: str) -> None:
        """Add all that waits to the sums."""
        tally = self._tallies[mode]
        for batch in self._batches[mode]:
            if batch.advantages is not None:
                tally.add_responses(batch.lengths, batch.advantages)
                if batch.turns is not None:
                    sums = turn_advantages(batch.advantages, batch.turns).flatten()
                    tally.add("advantage/turns", sums, _known_turns)
            if self._with_ties:
                tally.add_tied_groups(batch.statistics["rewards"])
        for weights, batch, is_trls in self._weights[mode]:
            if not is_trls:
                tally.add_length_weights(weights, batch.advantages if self._by_sign else None)
            if batch.advantages is not None:
                tally.add_masses(weights, batch.lengths, batch.advantages)
        for tokens in self._tokens[mode]:
            self._count_tokens(tally, tokens)
        self._batches[mode], self._weights[mode], self._tokens[mode], self._waiting = [], [], [], 0

    def _count_tokens(self, tally: LossTally, tokens: Tokens) -> None:
        mask, weights, batch = tokens.mask, tokens.token_weight, tokens.batch
        of_rows = tokens.length_weights.flatten()[tokens.places]
        if batch.advantages is not None:  # rounding around equal rewards is no share of the loss
            differ = advantages_differ(batch.advantages, batch.lengths > 0).expand_as(batch.lengths)
            of_rows = of_rows * differ.flatten()[tokens.places]
        mass = (tokens.advantages.abs() * of_rows.unsqueeze(1)).expand_as(tokens.logps)
        if weights is not None:
            tally.add_token_weights(weights, mask, self._token_bounds)
            mass = mass * weights
        if tokens.clip is not None:
            old = tokens.logps if tokens.old_logps is None else tokens.old_logps
            self._count_clipped(tally, tokens.logps - old, tokens, tokens.clip)
        quartiles = quartile_index(batch.lengths, batch.lengths > 0).flatten()
        tally.add_shares(mass, quartiles[tokens.places], tokens.logps, tokens.left)
        if self._with_turns:
            masses = turn_masses((mass * tokens.left).sum(dim=1), count_turns(mask))
            tally.add("share/turns", masses, finish_turn_masses)

    def _count_clipped(self, tally: LossTally, log_ratio: Tensor, tokens: Tokens, clip: Clip) -> None:
        mask, weights, advantages = tokens.mask, tokens.token_weight, tokens.advantages
        bounds = (clip.epsilon_low, clip.epsilon_high, clip.delta)
        if clip.has_weight_inside and weights is not None:
            tally.add_clipped_by_weight(clipped_by_weight(log_ratio, weights, advantages, *bounds), mask)
            log_ratio = log_ratio + weights.log()
        if clip.per_sequence:
            log_ratio = (log_ratio * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        tally.add_clipped(clipped_tokens(log_ratio.exp(), advantages, *bounds), advantages, mask)


def lambda_metrics(parameter: LambdaParameter) -> dict[str, float]:
    """
    λ of every feature now, its mean gradient since the last call, the count of skipped steps, and what its learning
    reports. Call it for a log only: it waits for the device.
    """
    names = ("lambda/value" if name == "length" else f"lambda/{name}" for name in parameter.features)
    metrics = dict(zip(names, parameter.values, strict=True)) | parameter.learning.metrics()
    if parameter.learnable:
        grads = [grad for grad in parameter.grads if math.isfinite(grad)]
        metrics["lambda/grad"] = sum(grads) / len(grads) if grads else math.nan
        metrics["lambda/skipped"] = float(parameter.skipped)
        parameter.grads.clear()
    return metrics


def _known_turns(sums: list[float]) -> dict[str, float]:
    """Mean advantages of the numbers of turns that occurred: a rollout without tools has one turn throughout."""
    return {name: value for name, value in finish_turn_advantages(sums).items() if not math.isnan(value)}
