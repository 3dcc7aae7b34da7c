"""f: how much a response counts. One small class per member, and the one way they are all computed."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from .custom import USERS, check_follows_lambda, check_result, function_name, named_arguments
from .features import FEATURES
from .tensors import kind, listing, one_where_zero, strictly_positive

SCOPES = ("batch", "prompt")
# What a length weight may name among its arguments; see `LengthWeight`.
LENGTH_ARGUMENTS = ("lengths", "advantages", "lam", "has_tokens", "dim", "features", *FEATURES)
SIDES = ("both", "signed", "positive", "negative")
# λ·x of a response is held inside ± this: a weight between e⁻² and e² before the token mass is restored.
PREFERENCE_BOUND = 2.0
# A group whose advantages differ by less than this part of the largest has equal rewards and rounding.
_ROUNDING, _FAINT = 1e-5, 1e-2
# What `**kwargs` get unasked: who names another one is called in another way by it.
_KWARGS = ("lengths", "advantages")
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
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...


@dataclass(frozen=True)
class LambdaGRPO(LengthWeight):
    """
    f_i = G · softmax_i(h_i^(λ·s_i)), h_i = 1 + r·z_i, z_i = (|o_i| - μ)/σ; μ, σ, G of the group (arXiv 2510.06870).

    s_i = 1 as in the paper (side "both"); the other sides, `SIDES`, are this project's: see `sides`.
    """

    length_scale: float = field(default=1 / 9, metadata={"symbol": "r"})
    side: str = field(default="both", metadata={"symbol": "side", "option": "lambda_side"})

    name = "lambda"
    formula = "λ-GRPO: G · softmax of h^λ"
    source = "arXiv 2510.06870"
    has_lambda = True

    def check(self, group_size: int) -> None:
        """h_i > 0 for every response needs r·√(G-1) < 1, since |z_i| <= √(G-1)."""
        _check_side(self.side)
        if not (math.isfinite(self.length_scale) and self.length_scale > 0):
            raise ValueError(f"length_scale={self.length_scale} must be finite and > 0.")
        if self.length_scale * math.sqrt(group_size - 1) >= 1:
            raise ValueError(
                f"length_scale={self.length_scale:g} is too large for groups of {group_size} responses: h = 1 + r·z "
                f"stays positive only for length_scale < 1/√(G-1) = {1 / math.sqrt(group_size - 1):g}."
            )

    def __call__(
        self,
        lengths: torch.Tensor,
        lam: torch.Tensor,
        has_tokens: torch.Tensor,
        dim: Any,
        advantages: torch.Tensor | None = None,
    ) -> torch.Tensor:
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
        _check_side(self.side)
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
        lengths: torch.Tensor,
        lam: torch.Tensor,
        has_tokens: torch.Tensor,
        dim: Any,
        advantages: torch.Tensor | None = None,
        features: Mapping[str, torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
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

    def __call__(
        self, lengths: torch.Tensor, has_tokens: torch.Tensor, dim: Any, advantages: torch.Tensor | None = None
    ) -> torch.Tensor:
        sign = sides(advantages, has_tokens, "signed")
        chosen = sign != 0
        mean = (lengths * chosen).sum(dim=1, keepdim=True) / one_where_zero(chosen.sum(dim=1, keepdim=True))
        weights = torch.ones_like(lengths)
        for value in (1, -1):
            rows = sign == value
            own = (lengths * rows).sum(dim=1, keepdim=True) / one_where_zero(rows.sum(dim=1, keepdim=True))
            weights = torch.where(rows, mean / one_where_zero(own), weights)
        return weights


@dataclass(frozen=True)
class GRPO(LengthWeight):
    """f_i = μ/|o_i|, μ = S/N over the batch, rows without tokens counted in N as TRL does (arXiv 2402.03300)."""

    name = "grpo"
    formula = "GRPO: mean over sequences of each sequence's mean"
    source = "arXiv 2402.03300"
    has_scope = False

    def __call__(self, lengths: torch.Tensor, has_tokens: torch.Tensor) -> torch.Tensor:
        return (lengths.sum() / lengths.numel()) / one_where_zero(lengths)


@dataclass(frozen=True)
class DAPO(LengthWeight):
    """f_i = 1: the token mean (arXiv 2503.14476)."""

    name = "dapo"
    formula = "DAPO: token mean"
    source = "arXiv 2503.14476"

    def __call__(self, lengths: torch.Tensor, has_tokens: torch.Tensor, dim: Any) -> torch.Tensor:
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

    def __call__(self, lengths: torch.Tensor, has_tokens: torch.Tensor) -> torch.Tensor:
        assert self.max_completion_length is not None  # `check` has seen to it
        return (lengths.sum() / lengths.numel() / self.max_completion_length).expand_as(lengths)


# The one table: a member is added here.
LENGTH_WEIGHTS: dict[str, type[LengthWeight]] = {
    member.name: member for member in (LambdaGRPO, Power, GRPO, DAPO, DrGRPO, Balanced)
}


def sides(advantages: torch.Tensor | None, has_tokens: torch.Tensor, side: str) -> torch.Tensor:
    """
    s_i: whose lengths λ weighs.

        "both"       1
        "signed"     sign(A_i)
        "positive"   1 where A_i > 0, else 0
        "negative"   1 where A_i < 0, else 0

    A row without tokens has s = 0, and so have a group of equal rewards and a row whose reward is its group's mean:
    their advantages are rounding around 0.

    Args:
        advantages (`torch.Tensor`, *optional*): A, (P, G); required for all but "both".
        has_tokens (`torch.Tensor`): bool, (P, G).
        side (`str`): one of `SIDES`.

    Returns:
        `torch.Tensor`: (P, G), in the dtype of `advantages`.

    Raises:
        `ValueError`: no advantages.
    """
    if side == "both":
        return has_tokens.float()
    if advantages is None:
        raise ValueError(f"advantages are required by side={side!r} and aggregation='balanced': one per response.")
    magnitude = advantages.abs() * has_tokens
    count = one_where_zero(has_tokens.sum(dim=1, keepdim=True))
    mean = (advantages * has_tokens).sum(dim=1, keepdim=True) / count
    spread = ((advantages - mean).abs() * has_tokens).amax(dim=1, keepdim=True)
    largest = magnitude.amax(dim=1, keepdim=True)
    differ = spread > _ROUNDING * largest
    # A reward that is its group's mean leaves rounding around 0: a sign by chance.
    known = (magnitude > _ROUNDING * largest) & (differ | (magnitude > _FAINT * magnitude.amax()))
    sign = advantages.sign() * (has_tokens & known)
    if side == "signed":
        return sign
    return (sign > 0).to(sign.dtype) if side == "positive" else (sign < 0).to(sign.dtype)


def centred_features(
    names: tuple[str, ...],
    lengths: torch.Tensor,
    has_tokens: torch.Tensor,
    features: Mapping[str, torch.Tensor | None],
) -> torch.Tensor:
    """
    x: each feature of each response, minus its mean over the group's rows with tokens; 0 for a row without.

    Args:
        names (`tuple[str, ...]`): `"length"`, which is ln|o|, and names in `features`; K of them.
        lengths (`torch.Tensor`): (P, G).
        has_tokens (`torch.Tensor`): bool, (P, G).
        features (`Mapping[str, torch.Tensor]`): name -> raw values, (P, G).

    Returns:
        `torch.Tensor`: (P, G, K).

    Raises:
        `ValueError`: a feature is not given.
    """
    raw = []
    for name in names:
        values = one_where_zero(lengths).log() if name == "length" else features.get(name)
        if values is None:
            raise ValueError(f"features are required for {name}: the policy's log-probabilities.")
        raw.append(values.to(lengths))
    x, present = torch.stack(raw, dim=-1), has_tokens.unsqueeze(-1)
    mean = (x * present).sum(dim=1, keepdim=True) / one_where_zero(present.sum(dim=1, keepdim=True))
    return (x - mean) * present


def favour_positive(
    weights: torch.Tensor,
    positive_weight: float,
    lengths: torch.Tensor,
    has_tokens: torch.Tensor,
    advantages: torch.Tensor | None,
    dim: tuple[int, ...],
) -> torch.Tensor:
    """c times f of every response with A > 0, then the token mass Σ|o|f of the scope restored; all (P, G)."""
    favoured = weights * (1 + (positive_weight - 1) * sides(advantages, has_tokens, "positive"))
    mass, before = ((lengths * w).sum(dim=dim, keepdim=True) for w in (favoured, weights))
    return favoured * before / one_where_zero(mass)


def _check_side(side: str) -> None:
    if side not in SIDES:
        raise ValueError(f"lambda_side={side!r} is unknown; accepted: {listing(SIDES)}.")


class FunctionLengthWeight(LengthWeight):
    """A function of the user's as a member: `name` is the function's, and it has a λ if it names `lam`."""

    source = USERS

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function
        self.name = self.formula = function_name(function)
        self.takes = named_arguments(function, LENGTH_ARGUMENTS, to_kwargs=_KWARGS)
        self.has_lambda = "lam" in self.takes

    def __call__(self, **known: Any) -> torch.Tensor:
        return self.function(**known)


def as_length_weight(weight: object) -> LengthWeight:
    """
    A member from what the trainer's `length_weight=` takes.

    Raises:
        `ValueError`: it is neither a `LengthWeight` nor a function whose arguments there are, or it names `lam` and
            says that it has no λ.
    """
    if isinstance(weight, type):
        raise ValueError(f"length_weight={weight.__name__} is a class: pass an object, {weight.__name__}().")
    if not isinstance(weight, LengthWeight):
        return FunctionLengthWeight(weight)  # type: ignore[arg-type]  checked there
    if ("lam" in arguments_of(weight)) != weight.has_lambda:
        names = "names lam, and there is no λ" if not weight.has_lambda else "does not name lam, and there is a λ"
        raise ValueError(f"{function_name(weight)} {names}: set its has_lambda = {not weight.has_lambda}.")
    if not weight.name:
        raise ValueError(f"{function_name(weight)} has no name: set its class attribute name.")
    if type(weight) is not LENGTH_WEIGHTS.get(weight.name, type(weight)):
        raise ValueError(f"{function_name(weight)} has the name {weight.name!r} of another member: give it its own.")
    return weight


def arguments_of(member: LengthWeight) -> tuple[str, ...]:
    """The arguments that a member is called with."""
    if isinstance(member, FunctionLengthWeight):
        return member.takes
    return named_arguments(member, LENGTH_ARGUMENTS, to_kwargs=_KWARGS)


def features_of(member: LengthWeight | None) -> tuple[str, ...]:
    """The features, beside length, that a member is called with or that its λ weighs."""
    if member is None:
        return ()
    wanted = {*member.lambda_features, *(arguments_of(member) if isinstance(member, FunctionLengthWeight) else ())}
    return tuple(name for name in FEATURES if name in wanted)


def make_length_weight(name: str, options: Mapping[str, Any]) -> LengthWeight:
    """The member of that name with those of `options`, by field name, that are parameters of it."""
    if name not in LENGTH_WEIGHTS:
        raise ValueError(f"aggregation={name!r} is unknown; accepted: {listing(LENGTH_WEIGHTS)}.")
    member = LENGTH_WEIGHTS[name]
    return member(**{f.name: options[f.name] for f in fields(member) if f.name in options})  # type: ignore[arg-type]


def weigh_responses(
    member: LengthWeight,
    lengths: torch.Tensor,
    lam: torch.Tensor | float | None = None,
    *,
    scope: str = "batch",
    advantages: torch.Tensor | None = None,
    features: Mapping[str, torch.Tensor] | None = None,
    positive_weight: float = 1.0,
) -> torch.Tensor:
    """
    f of every response by any member: the one place that knows rows without tokens, scope, dtype and positivity.

    Args:
        member ([`LengthWeight`]): f.
        lengths, lam, scope, advantages: as for `length_weights`.
        features (`Mapping[str, torch.Tensor]`, *optional*): name -> (P, G), further arguments that a member may name.
        positive_weight (`float`, defaults to 1.0): c: a response with A > 0 counts c times, token mass preserved.

    Returns:
        `torch.Tensor`: weights, (P, G), as `length_weights` returns them.

    Raises:
        `ValueError`: as `length_weights`; or a function of the user's returned something else than positive weights.
    """
    _check_arguments(member, lengths, lam, scope)
    # float64 inside: exp(h^λ) magnifies rounding by h^λ, and (P, G) numbers cost nothing. MPS has no float64.
    work = torch.float32 if lengths.device.type == "mps" else torch.float64
    rows = lengths.to(work)
    has_tokens = rows > 0
    known: dict[str, Any] = {"lengths": rows, "has_tokens": has_tokens, "dim": (0, 1) if scope == "batch" else (1,)}
    if member.has_lambda:  # without λ none is made: putting a number on a device would make the host wait for it
        lam_shape = () if len(member.lambda_features) == 1 else (-1,)
        known["lam"] = torch.as_tensor(lam, device=rows.device, dtype=work).reshape(lam_shape)
    known["features"] = {name: values.to(work) for name, values in (features or {}).items()}
    for name, values in {"advantages": advantages, **(features or {})}.items():
        known[name] = None if values is None else values.to(work)
    names = arguments_of(member)
    given = {name: known.get(name) for name in names}
    missing = [name for name in named_arguments(member, LENGTH_ARGUMENTS, required=True) if given.get(name) is None]
    missing = [name for name in missing if name != "lam"]
    if missing:
        raise ValueError(f"{member.name} requires {', '.join(missing)}, and the call gives none.")
    if "has_tokens" not in names and "lengths" in names:
        given["lengths"] = _fill_empty_rows(rows, has_tokens)
    if scope == "prompt" and member.has_scope and "dim" not in names:
        weights = _one_prompt_at_a_time(member, given, has_tokens)
    else:
        weights = member(**given)
        if isinstance(member, FunctionLengthWeight) or type(member) not in LENGTH_WEIGHTS.values():
            check_result(member.name, weights, rows.shape, has_tokens)
    check_follows_lambda(member.name, weights, given.get("lam"))
    if positive_weight != 1:
        dim = known["dim"] if member.has_scope else (0, 1)
        weights = favour_positive(weights, positive_weight, rows, has_tokens, known["advantages"], dim)
    if scope == "prompt" and member.has_scope:
        weights = weights * (rows.sum() / rows.size(0)) / one_where_zero(rows.sum(dim=1, keepdim=True))
    return strictly_positive(weights, _result_dtype(lengths, lam)).masked_fill(~has_tokens, 0)


def sequence_mean_weights(weights: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """
    Restate weights of a token mean for a loss that is reduced as a mean of per-sequence means (TRL's `"sapo"`).

    ``Σ_i f_i Σ_t ℓ_it / S = 1/N Σ_i (f_i · |o_i| · N / S) · (1/|o_i|) Σ_t ℓ_it`` with S = Σ|o| over the N rows.

    Args:
        weights (`torch.Tensor`): f as `length_weights` returns it, shape (P, G).
        lengths (`torch.Tensor`): the lengths it was made from, shape (P, G).

    Returns:
        `torch.Tensor`: f_i · |o_i| / μ, shape (P, G), in the dtype of `weights`.
    """
    return weights * (lengths / one_where_zero(lengths.sum()) * lengths.numel()).to(weights.dtype)


def _one_prompt_at_a_time(member: LengthWeight, given: Mapping[str, Any], has_tokens: torch.Tensor) -> torch.Tensor:
    """Call a member that knows no scope with one group after the other, (1, G) each."""
    groups = []
    for p in range(has_tokens.size(0)):
        one = {n: x[p : p + 1] if isinstance(x, torch.Tensor) and x.dim() == 2 else x for n, x in given.items()}
        groups.append(check_result(member.name, member(**one), has_tokens[:1].shape, has_tokens[p : p + 1]))
    return torch.cat(groups)


def _fill_empty_rows(rows: torch.Tensor, has_tokens: torch.Tensor) -> torch.Tensor:
    """Show a row without tokens as its group's mean length: neutral to a mean, and no division by zero."""
    mean = rows.sum(dim=1, keepdim=True) / one_where_zero(has_tokens.sum(dim=1, keepdim=True))
    everyones = one_where_zero(rows.sum() / one_where_zero(has_tokens.sum()))  # for a group without any tokens
    return torch.where(has_tokens, rows, torch.where(mean > 0, mean, everyones))


def _check_arguments(
    member: LengthWeight, lengths: torch.Tensor, lam: torch.Tensor | float | None, scope: str
) -> None:
    """Raise a `ValueError` that names the argument; values of tensors are looked at on the CPU only."""
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; accepted: {listing(SCOPES)}.")
    if not torch.is_tensor(lengths) or lengths.dim() != 2 or lengths.numel() == 0:
        raise ValueError(f"lengths must be a non-empty tensor of shape (P, G), got {kind(lengths)}.")
    if lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be integer or float, got {lengths.dtype}.")
    if lengths.device.type == "cpu" and not (lengths.isfinite() & (lengths >= 0)).all():
        raise ValueError("lengths must be finite and >= 0.")
    if member.has_lambda:
        if lam is None:
            raise ValueError(f"lam is required by aggregation={member.name!r}.")
        size = len(member.lambda_features)
        if isinstance(lam, torch.Tensor) and (lam.numel() != size or lam.is_complex() or lam.dtype == torch.bool):
            what = "one real number" if size == 1 else f"{size} real numbers"
            raise ValueError(f"lam must be {what}, got {kind(lam)}.")
        on_host = not isinstance(lam, torch.Tensor) or lam.device.type == "cpu"
        if on_host and not torch.as_tensor(lam).isfinite().all():
            raise ValueError(f"lam={torch.as_tensor(lam).tolist()} must be finite.")
    member.check(lengths.size(1))


def _result_dtype(lengths: torch.Tensor, lam: torch.Tensor | float | None) -> torch.dtype:
    """float64 where an argument asks for it, else float32: weights are never kept in half precision."""
    floating = (x.dtype for x in (lengths, lam) if isinstance(x, torch.Tensor) and x.is_floating_point())
    return torch.float64 if torch.float64 in floating else torch.float32
