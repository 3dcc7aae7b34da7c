"""The members of f, how much a response counts, and of v, how much a token counts: a small class each, two tables."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch

from .rows import (
    FEATURES,
    ResponseRows,
    TokenRows,
    centred_features,
    group_mean,
    one_where_zero,
    sides,
    strictly_positive,
)

SCOPES = ("batch", "prompt")
# λ·x of a response is held inside ± this: a weight between e⁻² and e² before the token mass is restored.
PREFERENCE_BOUND = 2.0
# Keeps z finite where σ = 0. Lengths are integers, so that a σ other than 0 is at least 0.1: this is far below it.
_SIGMA_EPSILON = 1e-8


class LengthWeight(ABC):
    """
    One member f of the unified loss ``Σ_i f_i Σ_t ℓ_it / Σ_i |o_i|``.

    A subclass implements `__call__(self, rows, lam)`. `rows` is a [`~trl_lambda.weights.ResponseRows`] in float64,
    `lam` a tensor with one λ per feature, or `None` without λ. It returns weights, (P, G), finite and > 0: a CPU
    raises otherwise, other devices clamp. Rows without tokens and dtype are handled around the call.

    Instead, `__call__` may name any of these arguments, as a function passed to the trainer may:

        lengths      (P, G): own tokens |o_i|. A row without tokens has its group's mean length.
        advantages   (P, G): A_i, unweighted
        lam          λ, a tensor of one element
        mean_logp, min_logp   (P, G): mean and least log-probability of the own tokens under the sampling policy
        mean_entropy (P, G): mean entropy of the sampling policy over the own tokens, nats
        rewards      (P, G): the weighted sum of the reward functions
        step         optimizer steps so far

    In scope "prompt" it is then called once per prompt, with P = 1. `mean_logp` and `min_logp` come from TRL's old
    log-probabilities. Where TRL computes none, and for `mean_entropy`, they cost one forward pass without gradient
    per generation batch.

    Class attributes:
        name: as in `length_weight`.
        formula, source: for the model card.
        has_lambda: whether it reads λ.
        has_scope: whether scope "prompt" makes a mean over prompts of it. False where the formula fixes the scale.
        needs: the statistics that `rows.statistic` is asked for.
    """

    name = ""
    formula = ""
    source = "the user's"
    has_lambda = False
    has_scope = True
    needs: tuple[str, ...] = ()
    side: str = "both"  # of λ
    features: tuple[str, ...] = ("length",)  # what λ weighs, one λ each

    def check(self, group_size: int) -> None:  # noqa: B027  most members have nothing to check
        """Raise a `ValueError` if a parameter is out of its range for groups of `group_size` responses."""

    @abstractmethod
    def __call__(self, rows: ResponseRows, lam: torch.Tensor | None) -> torch.Tensor: ...


@dataclass(frozen=True)
class LambdaGRPO(LengthWeight):
    """
    f_i = G · softmax_i(h_i^(λ·s_i)), h_i = 1 + r·z_i, z_i = (|o_i| - μ)/σ; μ, σ, G of the group (arXiv 2510.06870).

    s_i = 1 in the paper (side "both"). The other sides are this project's.
    """

    length_scale: float = field(default=1 / 9, metadata={"symbol": "r"})
    side: str = field(default="both", metadata={"config": "lambda_side"})

    name = "lambda_grpo"
    formula = "λ-GRPO: G · softmax of h^λ"
    source = "arXiv 2510.06870"
    has_lambda = True

    def check(self, group_size: int) -> None:
        """h_i > 0 for every response needs r·√(G-1) < 1, since |z_i| <= √(G-1)."""
        if not 0 < self.length_scale * math.sqrt(max(group_size - 1, 1e-9)) < 1:
            raise ValueError(
                f"length_scale={self.length_scale:g} must be > 0 and, for groups of {group_size} responses, below "
                f"1/√(G-1) = {1 / math.sqrt(max(group_size - 1, 1e-9)):g}, so that h = 1 + r·z stays positive."
            )

    def __call__(self, rows: ResponseRows, lam: Any) -> torch.Tensor:
        count = rows.has_tokens.sum(dim=1, keepdim=True).clamp(min=1)
        deviation = (rows.lengths - rows.lengths.sum(dim=1, keepdim=True) / count) * rows.has_tokens
        std = (deviation.square().sum(dim=1, keepdim=True) / count).sqrt()
        log_h = (1 + self.length_scale * deviation / (std + _SIGMA_EPSILON)).log()
        # The softmax of g = h^λ is taken of g_i - g_top = g_top · ((h_i/h_top)^λ - 1), so that equal lengths cancel
        # exactly, in value and gradient, however large h^λ is. g_top is held at the square root of the float range:
        # a softmax with gaps of that size is one-hot.
        if self.side != "both":
            log_h = log_h * sides(rows.advantages, rows.has_tokens, self.side)  # log of h^s: the rest is the same
        top = (lam.detach() * log_h).masked_fill(~rows.has_tokens, -torch.inf).argmax(dim=1, keepdim=True)
        log_top = log_h.gather(1, top)
        g_top = (lam * log_top).clamp(max=math.log(torch.finfo(log_h.dtype).max) / 2).exp()
        exp = (g_top * torch.expm1(lam * (log_h - log_top))).exp() * rows.has_tokens
        return exp * count / one_where_zero(exp.sum(dim=1, keepdim=True))


@dataclass(frozen=True)
class Power(LengthWeight):
    """
    f_i = p_i · S / Σ_j |o_j|·p_j over the scope, which keeps the token mass S = Σ|o|.

    Side "both": p_i = (|o_i|/μ)^λ. The other sides use the sign s_i of the advantage and, in each group, the distance
    of a response's features from their mean: p_i = exp(s_i · clamp(Σ_k λ_k·x_ik, ±2)), with x = ln|o_i| for length
    and `rows.FEATURES` for the others. A response with A = 0 has p = 1.
    """

    side: str = field(default="both", metadata={"config": "lambda_side"})
    features: tuple[str, ...] = field(default=("length",), metadata={"config": "lambda_features"})

    name = "power"
    formula = "(length/μ)^λ, token mass preserved: λ = -1 is GRPO, λ = 0 the token mean"
    source = "this project's"
    has_lambda = True

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for name in self.features if name != "length")

    def check(self, group_size: int) -> None:
        known, chosen = ("length", *FEATURES), list(self.features)
        if not chosen or not set(chosen) <= set(known) or len(set(chosen)) < len(chosen):
            raise ValueError(f"lambda_features={chosen!r} must be a list of {known}, each at most once.")
        if self.side == "both" and chosen != ["length"]:
            raise ValueError(
                f"lambda_features={chosen!r} needs lambda_side='signed', 'positive' or 'negative': with side 'both' "
                "the weight is a power of the length alone."
            )

    def __call__(self, rows: ResponseRows, lam: Any) -> torch.Tensor:
        tokens = rows.total(rows.lengths)
        if self.side == "both":
            count = rows.total(rows.has_tokens).clamp(min=1)
            log_ratio = (one_where_zero(rows.lengths) * count / one_where_zero(tokens)).log()
            exponent = (lam * log_ratio).masked_fill(~rows.has_tokens, -torch.inf)
            top = exponent.detach().amax(dim=rows.dim, keepdim=True)
            powers = (exponent - top.masked_fill(top == -torch.inf, 0)).exp()
        else:
            x = centred_features(self.features, rows)  # (P, G, K)
            preference = (x * lam.reshape(-1)).sum(dim=-1).clamp(-PREFERENCE_BOUND, PREFERENCE_BOUND)
            powers = (sides(rows.advantages, rows.has_tokens, self.side) * preference).exp()
        mass = rows.total(rows.lengths * powers)
        return powers * tokens / mass.clamp(min=torch.finfo(mass.dtype).tiny)


@dataclass(frozen=True)
class Balanced(LengthWeight):
    """
    f_i = m_group/m_sign(A_i): right and wrong responses of a group each count for their number, whatever their length.

    Balanced Aggregation (arXiv 2605.04077), from notes on the paper. m_group is the mean length of the group's
    responses with A ≠ 0, m_sign that of those with the same sign; f = 1 where A = 0. The group's token mass is kept.
    """

    name = "balanced"
    formula = "Balanced Aggregation: mean length of the group / mean length of the same sign of A"
    source = "arXiv 2605.04077"

    def __call__(self, rows: ResponseRows, lam: torch.Tensor | None) -> torch.Tensor:
        sign = sides(rows.advantages, rows.has_tokens, "signed")
        mean, weights = group_mean(rows.lengths, sign != 0), torch.ones_like(rows.lengths)
        for of_sign in (sign > 0, sign < 0):
            weights = torch.where(of_sign, mean / one_where_zero(group_mean(rows.lengths, of_sign)), weights)
        return weights


@dataclass(frozen=True)
class GRPO(LengthWeight):
    """f_i = μ/|o_i|, μ = S/N over the batch, rows without tokens counted in N as TRL does (arXiv 2402.03300)."""

    name = "grpo"
    formula = "GRPO: mean over sequences of each sequence's mean"
    source = "arXiv 2402.03300"
    has_scope = False

    def __call__(self, rows: ResponseRows, lam: torch.Tensor | None) -> torch.Tensor:
        return rows.mean_length / one_where_zero(rows.lengths)


@dataclass(frozen=True)
class DAPO(LengthWeight):
    """f_i = 1: the token mean (arXiv 2503.14476)."""

    name = "dapo"
    formula = "DAPO: token mean"
    source = "arXiv 2503.14476"

    def __call__(self, rows: ResponseRows, lam: torch.Tensor | None) -> torch.Tensor:
        return torch.ones_like(rows.lengths)


@dataclass(frozen=True)
class DrGRPO(LengthWeight):
    """f_i = μ/max_completion_length, μ = S/N over the batch (arXiv 2503.20783)."""

    max_completion_length: Any = field(default=None, metadata={"symbol": "divisor", "config": "max_completion_length"})

    name = "dr_grpo"
    formula = "Dr. GRPO: divided by a constant length"
    source = "arXiv 2503.20783"
    has_scope = False

    def check(self, group_size: int) -> None:
        if not (self.max_completion_length or 0) > 0:
            raise ValueError(f"length_weight='dr_grpo' needs max_completion_length, got {self.max_completion_length}.")

    def __call__(self, rows: ResponseRows, lam: torch.Tensor | None) -> torch.Tensor:
        return (rows.mean_length / self.max_completion_length).expand_as(rows.lengths)


# The table of f: a member is added here.
LENGTH_WEIGHTS: dict[str, type[LengthWeight]] = {
    member.name: member for member in (LambdaGRPO, Power, GRPO, DAPO, DrGRPO, Balanced)
}


class TokenWeight(ABC):
    """
    One member v of the unified loss: a weight of each token, >= 0 and a constant to autograd.

    A subclass implements `__call__(self, rows)`, `rows` a [`~trl_lambda.weights.TokenRows`], and returns weights,
    (B, T). A weight of 0 takes the token out of the policy loss. The token stays in the denominator, and the KL term
    and the entropy bonus keep it.

    Instead, `__call__` may name any of these arguments, as a function passed to the trainer may; all broadcast to
    (B, T):

        probs        (B, T): π, the current policy's probability of each sampled token
        advantages   (B, 1), or (B, T) where the trainer has one per token: A, unweighted
        entropies    (B, T): entropy of the current policy's distribution, nats
        old_logps    (B, T): log-probabilities of the sampling policy; `None` on policy
        mask         (B, T): 1 for the policy's own tokens
        lengths      (B, 1): own tokens of the response, int32
        step         optimizer steps so far

    Class attributes:
        name: as in `token_weight`.
        formula, source: for the model card.
    """

    name = ""
    formula = ""
    source = "the user's"
    bounds: tuple[float, float] | None = None  # the least and largest weight of a member that is clipped to them

    def check(self) -> None:  # noqa: B027  a member may have nothing to check
        """Raise a `ValueError` if a parameter is out of its range."""

    @abstractmethod
    def __call__(self, rows: TokenRows) -> torch.Tensor: ...


@dataclass(frozen=True)
class TRGRPO(TokenWeight):
    """v = clip(α·σ(k·(π - p0)), L, U): TR-GRPO, arXiv 2511.00066, as this project reads its constants."""

    alpha: float = field(default=2.0, metadata={"symbol": "α"})
    slope: float = field(default=9.0, metadata={"symbol": "k"})
    center: float = field(default=0.25, metadata={"symbol": "p0"})
    min: float = field(default=1.0, metadata={"symbol": "L"})
    max: float = field(default=1.4, metadata={"symbol": "U"})

    name = "tr_grpo"
    formula = "TR-GRPO: clip(α·σ(k·(π - p0)), L, U)"
    source = "arXiv 2511.00066"

    @property
    def bounds(self) -> tuple[float, float]:  # type: ignore[override]
        return self.min, self.max

    def check(self) -> None:
        is_positive = 0 < self.alpha < math.inf and 0 < self.slope < math.inf
        if not (is_positive and 0 <= self.center <= 1 and 0 < self.min <= self.max < math.inf):
            raise ValueError(f"{self} needs finite alpha, slope > 0, center in [0, 1] and 0 < min <= max.")

    def __call__(self, rows: TokenRows) -> torch.Tensor:
        return (self.alpha * torch.sigmoid(self.slope * (rows.probs - self.center))).clamp(min=self.min, max=self.max)


@dataclass(frozen=True)
class AR(TokenWeight):
    """v = α·π + 1 - α: Advantage Reweighting, arXiv 2505.12929, with the current policy's π."""

    alpha: float = field(default=0.2, metadata={"symbol": "α"})

    name = "ar"
    formula = "AR: α·π + 1 - α"
    source = "arXiv 2505.12929"

    def check(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"{self} needs alpha in [0, 1].")

    def __call__(self, rows: TokenRows) -> torch.Tensor:
        return strictly_positive(self.alpha * rows.probs + (1 - self.alpha), rows.probs.dtype)


# The table of v: a member is added here.
TOKEN_WEIGHTS: dict[str, type[TokenWeight]] = {member.name: member for member in (TRGRPO, AR)}
