"""f: how much a response counts. One small class per member, in one table."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .features import FEATURES, centred_features
from .sides import check_side, sides
from .tensors import group_mean, listing, one_where_zero

SCOPES = ("batch", "prompt")
# λ·x of a response is held inside ± this: a weight between e⁻² and e² before the token mass is restored.
PREFERENCE_BOUND = 2.0
# Keeps z finite where σ = 0. Lengths are integers, so that a σ other than 0 is at least 0.1: this is far below it.
_SIGMA_EPSILON = 1e-8


class LengthWeight(ABC):
    """
    One member f of the unified loss ``Σ_i f_i Σ_t ℓ_it / Σ_i |o_i|``.

    A subclass is called by name with those of these arguments that its `__call__` names, in float64:

        lengths      (P, G): own tokens |o_i| of P prompts with G responses each. Without `has_tokens` among the
                     arguments a row without tokens is shown with its group's mean length.
        advantages   (P, G): A_i, unweighted
        lam          λ, a tensor of one element, or None
        has_tokens   (P, G), bool; who names it sees rows without tokens as lengths of 0
        dim          the dimensions that sums go over: (0, 1) in scope "batch", (1,) in scope "prompt". A member that
                     does not name it is called once per prompt in scope "prompt".
        mean_logp, min_logp   (P, G): mean and least log-probability of the own tokens under the sampling policy
        features     all of these, name -> (P, G)

    and returns positive weights, (P, G). `**kwargs` get lengths and advantages. Rows without tokens, scope, dtype and
    positivity are not its business.

    Class attributes: `name`, as in `aggregation`; `formula` and `source` for the model card; `has_lambda`, whether it
    reads λ; `has_scope`, whether μ and Σ|o| depend on `aggregation_scope`.
    """

    name = ""
    formula = ""
    source = ""
    has_lambda = False
    has_scope = True

    @property
    def lambda_features(self) -> tuple[str, ...]:
        """What λ weighs, one λ each; empty without λ."""
        return ("length",) if self.has_lambda else ()

    def check(self, group_size: int) -> None:  # noqa: B027  most members have nothing to check
        """Raise a `ValueError` if a parameter is out of its range for groups of `group_size` responses."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...


@dataclass(frozen=True)
class LambdaGRPO(LengthWeight):
    """
    f_i = G · softmax_i(h_i^(λ·s_i)), h_i = 1 + r·z_i, z_i = (|o_i| - μ)/σ; μ, σ, G of the group (arXiv 2510.06870).

    s_i = 1 as in the paper (side "both"); the other sides are this project's: see `sides`.
    """

    length_scale: float = field(default=1 / 9, metadata={"symbol": "r"})
    side: str = field(default="both", metadata={"symbol": "side", "option": "lambda_side"})

    name = "lambda"
    formula = "λ-GRPO: G · softmax of h^λ"
    source = "arXiv 2510.06870"
    has_lambda = True

    def check(self, group_size: int) -> None:
        """h_i > 0 for every response needs r·√(G-1) < 1, since |z_i| <= √(G-1)."""
        check_side(self.side)
        if not (math.isfinite(self.length_scale) and self.length_scale > 0):
            raise ValueError(f"length_scale={self.length_scale} must be finite and > 0.")
        if self.length_scale * math.sqrt(group_size - 1) >= 1:
            raise ValueError(
                f"length_scale={self.length_scale:g} is too large for groups of {group_size} responses: h = 1 + r·z "
                f"stays positive only for length_scale < 1/√(G-1) = {1 / math.sqrt(group_size - 1):g}."
            )

    def __call__(
        self, lengths: Tensor, lam: Tensor, has_tokens: Tensor, dim: Any, advantages: Tensor | None = None
    ) -> Tensor:
        count = has_tokens.sum(dim=1, keepdim=True).clamp(min=1)
        mean = lengths.sum(dim=1, keepdim=True) / count
        deviation = (lengths - mean) * has_tokens
        std = (deviation.square().sum(dim=1, keepdim=True) / count).sqrt()
        log_h = (1 + self.length_scale * deviation / (std + _SIGMA_EPSILON)).log()
        # The softmax of g = h^λ is taken of g_i - g_top = g_top · ((h_i/h_top)^λ - 1), so that equal lengths cancel
        # exactly, in value and gradient, however large h^λ is. g_top is held at the square root of the float range:
        # a softmax with gaps of that size is one-hot.
        if self.side != "both":
            log_h = log_h * sides(advantages, has_tokens, self.side)  # log of h^s: the rest is the same
        top = (lam.detach() * log_h).masked_fill(~has_tokens, -torch.inf).argmax(dim=1, keepdim=True)
        log_top = log_h.gather(1, top)
        g_top = (lam * log_top).clamp(max=math.log(torch.finfo(lengths.dtype).max) / 2).exp()
        exp = (g_top * torch.expm1(lam * (log_h - log_top))).exp() * has_tokens
        return exp * count / one_where_zero(exp.sum(dim=1, keepdim=True))


@dataclass(frozen=True)
class Power(LengthWeight):
    """
    f_i = p_i · S / Σ_j |o_j|·p_j over the scope, which keeps the token mass S = Σ|o|.

    Side "both": p_i = (|o_i|/μ)^λ. The other sides look at the sign s_i of the advantage (`sides`) and, in each group,
    at how far a response's features are from their mean: p_i = exp(s_i · clamp(Σ_k λ_k·x_ik, ±2)), with x of length
    ln|o_i|, the others as in `features.FEATURES`. A response with A = 0 has p = 1.
    """

    side: str = field(default="both", metadata={"symbol": "side", "option": "lambda_side"})
    features: tuple[str, ...] = field(
        default=("length",), metadata={"symbol": "features", "option": "lambda_features"}
    )

    name = "power"
    formula = "(length/μ)^λ, token mass preserved: λ = -1 is GRPO, λ = 0 the token mean"
    source = "this project's"
    has_lambda = True

    @property
    def lambda_features(self) -> tuple[str, ...]:
        return tuple(self.features)

    def check(self, group_size: int) -> None:
        check_side(self.side)
        known, chosen = ("length", *FEATURES), self.features
        if isinstance(chosen, str) or not chosen or not all(name in known for name in chosen):
            raise ValueError(f"lambda_features={chosen!r} must be a list of {listing(known)}.")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"lambda_features={list(chosen)} names a feature twice.")
        if self.side == "both" and tuple(chosen) != ("length",):
            raise ValueError(
                f"lambda_features={list(chosen)} needs a lambda_side other than 'both', whose weight is a power of "
                "the length alone. Use 'signed', 'positive' or 'negative'."
            )

    def __call__(
        self,
        lengths: Tensor,
        lam: Tensor,
        has_tokens: Tensor,
        dim: Any,
        advantages: Tensor | None = None,
        features: Mapping[str, Tensor | None] | None = None,
    ) -> Tensor:
        tokens = lengths.sum(dim=dim, keepdim=True)
        if self.side == "both":
            count = has_tokens.sum(dim=dim, keepdim=True).clamp(min=1)
            log_ratio = (one_where_zero(lengths) * count / one_where_zero(tokens)).log()
            exponent = (lam * log_ratio).masked_fill(~has_tokens, -torch.inf)
            top = exponent.detach().amax(dim=dim, keepdim=True)
            powers = (exponent - top.masked_fill(top == -torch.inf, 0)).exp()
        else:
            x = centred_features(self.features, lengths, has_tokens, features or {})  # (P, G, K)
            preference = (x * lam.reshape(-1)).sum(dim=-1).clamp(-PREFERENCE_BOUND, PREFERENCE_BOUND)
            powers = (sides(advantages, has_tokens, self.side) * preference).exp()
        mass = (lengths * powers).sum(dim=dim, keepdim=True)
        return powers * tokens / mass.clamp(min=torch.finfo(mass.dtype).tiny)


@dataclass(frozen=True)
class Balanced(LengthWeight):
    """
    f_i = m_group/m_sign(A_i): right and wrong responses of a group each count for their number, whatever their length.

    Balanced Aggregation (arXiv 2605.04077), as its abstract reads. m_group is the mean length of the group's responses
    with A ≠ 0, m_sign that of those with the same sign; f = 1 where A = 0. The token mass of the group is kept.
    """

    name = "balanced"
    formula = "Balanced Aggregation: mean length of the group / mean length of the same sign of A"
    source = "arXiv 2605.04077"

    def __call__(self, lengths: Tensor, has_tokens: Tensor, dim: Any, advantages: Tensor | None = None) -> Tensor:
        sign = sides(advantages, has_tokens, "signed")
        mean, weights = group_mean(lengths, sign != 0), torch.ones_like(lengths)
        for rows in (sign > 0, sign < 0):
            weights = torch.where(rows, mean / one_where_zero(group_mean(lengths, rows)), weights)
        return weights


@dataclass(frozen=True)
class GRPO(LengthWeight):
    """f_i = μ/|o_i|, μ = S/N over the batch, rows without tokens counted in N as TRL does (arXiv 2402.03300)."""

    name = "grpo"
    formula = "GRPO: mean over sequences of each sequence's mean"
    source = "arXiv 2402.03300"
    has_scope = False

    def __call__(self, lengths: Tensor, has_tokens: Tensor) -> Tensor:
        return (lengths.sum() / lengths.numel()) / one_where_zero(lengths)


@dataclass(frozen=True)
class DAPO(LengthWeight):
    """f_i = 1: the token mean (arXiv 2503.14476)."""

    name = "dapo"
    formula = "DAPO: token mean"
    source = "arXiv 2503.14476"

    def __call__(self, lengths: Tensor, has_tokens: Tensor, dim: Any) -> Tensor:
        return torch.ones_like(lengths)


@dataclass(frozen=True)
class DrGRPO(LengthWeight):
    """f_i = μ/max_completion_length, μ = S/N over the batch (arXiv 2503.20783)."""

    max_completion_length: int | None = field(default=None, metadata={"symbol": "divisor"})

    name = "dr_grpo"
    formula = "Dr. GRPO: divided by a constant length"
    source = "arXiv 2503.20783"
    has_scope = False

    def check(self, group_size: int) -> None:
        if self.max_completion_length is None or self.max_completion_length <= 0:
            raise ValueError(
                f"max_completion_length={self.max_completion_length} must be > 0 for aggregation='dr_grpo'."
            )

    def __call__(self, lengths: Tensor, has_tokens: Tensor) -> Tensor:
        assert self.max_completion_length is not None  # `check` has seen to it
        return (lengths.sum() / lengths.numel() / self.max_completion_length).expand_as(lengths)


# The one table: a member is added here.
LENGTH_WEIGHTS: dict[str, type[LengthWeight]] = {
    member.name: member for member in (LambdaGRPO, Power, GRPO, DAPO, DrGRPO, Balanced)
}


def make_length_weight(name: str, options: Mapping[str, Any]) -> LengthWeight:
    """The member of that name with those of `options`, by field name, that are parameters of it."""
    if name not in LENGTH_WEIGHTS:
        raise ValueError(f"aggregation={name!r} is unknown; accepted: {listing(LENGTH_WEIGHTS)}.")
    member = LENGTH_WEIGHTS[name]
    return member(**{f.name: options[f.name] for f in fields(member) if f.name in options})  # type: ignore[arg-type]
