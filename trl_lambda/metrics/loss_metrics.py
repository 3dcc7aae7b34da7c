"""What the weights do in training and evaluation, measured for TRL's logs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config_checks import CLIPPED_LOSS_TYPES
from ..lambda_grpo_config import LambdaGRPOConfig
from ..trl_seam.generation_batch import GenerationBatch, count_turns
from .diagnostics import clipped_by_weight, clipped_tokens
from .loss_tally import LossTally
from .turns import finish_turn_advantages, finish_turn_masses, turn_advantages, turn_masses

# Own tokens and padding that wait for a log at most, per process; above, they are counted at once.
_WAITING_TOKENS = 2**20


@dataclass(frozen=True)
class Surrogate:
    """The PPO clip of the run: its bounds, and whether the ratio is one per sequence or v stands in it."""

    epsilon_low: float
    epsilon_high: float
    delta: float | None
    per_sequence: bool
    regulation_inside: bool

    @classmethod
    def of(cls, args: LambdaGRPOConfig) -> "Surrogate | None":
        """That of a configuration; `None` for a surrogate without a clip."""
        if args.loss_type not in (*CLIPPED_LOSS_TYPES, "luspo"):
            return None
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        per_sequence = args.importance_sampling_level == "sequence"
        return cls(args.epsilon, high, args.delta, per_sequence, args.regulation_inside_clip)


@dataclass(frozen=True)
class Tokens:
    """One micro-batch at its loss, all detached and per token, (B, T), unless it says otherwise."""

    batch: GenerationBatch  # that it is of
    rows: Tensor  # places in it, (B,)
    length_weights: Tensor  # of all of it, (P, G)
    mask: Tensor
    left: Tensor  # the own tokens that TRL's corrections leave in the loss
    logps: Tensor
    old_logps: Tensor | None  # `None`: this very pass, ρ = 1
    advantages: Tensor  # unweighted, (B, 1 or T)
    token_weight: Tensor | None


class LossMetrics:
    """
    Metrics of the weights over a logging interval.

    The loss only hands over what it has in hand. The work is done when a log is due, or when so many tokens wait that
    keeping them would cost memory.

    Args:
        clip ([`Surrogate`], *optional*): the PPO clip; `None` for a surrogate that has none.
        token_bounds (`tuple[float, float]`, *optional*): the bounds of a v that is clipped to them.
        with_turns (`bool`, defaults to `False`): whether conversations may have several turns.
    """

    def __init__(
        self, clip: Surrogate | None, token_bounds: tuple[float, float] | None, *, with_turns: bool = False
    ) -> None:
        self._clip = clip
        self._with_turns = with_turns
        self._token_bounds = token_bounds
        self._tallies = {"train": LossTally(), "eval": LossTally()}
        self._batches: dict[str, list[GenerationBatch]] = {"train": [], "eval": []}
        self._weights: dict[str, list[tuple[Tensor, Tensor | None]]] = {"train": [], "eval": []}
        self._tokens: dict[str, list[Tokens]] = {"train": [], "eval": []}
        self._waiting = 0

    def note_generation_batch(self, mode: str, batch: GenerationBatch) -> None:
        """Take in a new generation batch; `mode` is `"train"` or `"eval"`."""
        self._batches[mode].append(batch)

    def note_length_weights(self, mode: str, weights: Tensor, advantages: Tensor | None) -> None:
        """Take in f of the generation batch at one loss, (P, G); with A where f looks at its sign."""
        self._weights[mode].append((weights.detach(), advantages))

    def note_tokens(self, mode: str, tokens: Tokens) -> None:
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
        for weights, advantages in self._weights[mode]:
            tally.add_length_weights(weights, advantages)
        for tokens in self._tokens[mode]:
            self._count_tokens(tally, tokens)
        self._batches[mode], self._weights[mode], self._tokens[mode], self._waiting = [], [], [], 0

    def _count_tokens(self, tally: LossTally, tokens: Tokens) -> None:
        mask, weights, advantages = tokens.mask, tokens.token_weight, tokens.advantages
        of_rows = tokens.length_weights.flatten()[tokens.rows]
        mass = (advantages.abs() * of_rows.unsqueeze(1)).expand_as(tokens.logps)
        if weights is not None:
            tally.add_token_weights(weights, mask, self._token_bounds)
            mass = mass * weights
        if self._clip is not None:
            old = tokens.logps if tokens.old_logps is None else tokens.old_logps
            self._count_clipped(tally, tokens.logps - old, tokens)
        tally.add_shares(mass, tokens.batch.quartiles[tokens.rows], tokens.logps, tokens.left)
        if self._with_turns:
            masses = turn_masses((mass * tokens.left).sum(dim=1), count_turns(mask))
            tally.add("share/turns", masses, finish_turn_masses)

    def _count_clipped(self, tally: LossTally, log_ratio: Tensor, tokens: Tokens) -> None:
        assert self._clip is not None
        mask, weights, advantages, clip = tokens.mask, tokens.token_weight, tokens.advantages, self._clip
        bounds = (clip.epsilon_low, clip.epsilon_high, clip.delta)
        if clip.regulation_inside and weights is not None:
            by_weight = clipped_by_weight(log_ratio, weights, advantages, *bounds)
            tally.add_clipped_by_regulation(by_weight, mask)
            log_ratio = log_ratio + weights.log()
        if clip.per_sequence:
            log_ratio = (log_ratio * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        tally.add_clipped(clipped_tokens(log_ratio.exp(), advantages, *bounds), advantages, mask)


def _known_turns(sums: list[float]) -> dict[str, float]:
    """Mean advantages of the numbers of turns that occurred: a rollout without tools has one turn throughout."""
    return {name: value for name, value in finish_turn_advantages(sums).items() if not math.isnan(value)}
