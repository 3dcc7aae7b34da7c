r"""
Token aggregation as arrays in, array out: the loss is ``Σ_i f_i Σ_t v_it ℓ_it / Σ_i |o_i|`` over a generation batch,
with ℓ TRL's token loss and a weight ``w_it = f_i · v_it > 0`` per token.

f, one number per response (S = Σ|o| and μ = S/N over the scope, h_i = 1 + r·(|o_i| - μ)/σ of the group):

    "lambda"   f_i = G · softmax_i(h_i^λ)                             λ-GRPO, arXiv 2510.06870
    "power"    f_i = (|o_i|/μ)^λ · S / Σ_j |o_j|·(|o_j|/μ)^λ          this project's: λ = 0 DAPO, λ = -1 GRPO
    "grpo"     f_i = μ / |o_i|                                        GRPO, arXiv 2402.03300
    "dapo"     f_i = 1                                                DAPO, arXiv 2503.14476
    "dr_grpo"  f_i = μ / max_completion_length                        Dr. GRPO, arXiv 2503.20783
    "balanced" f_i = m_group / m_sign(A_i), m the mean length         Balanced Aggregation, arXiv 2605.04077

Whose lengths λ weighs is its side: s_i = 1 ("both"), sign(A_i) ("signed"), 1 where A_i > 0 ("positive") or where
A_i < 0 ("negative"), else 0. For the last three (this project's), and with features x centred in the group,

    "lambda"   f_i = G · softmax_i(h_i^(λ·s_i))
    "power"    f_i = p_i · S / Σ_j |o_j|·p_j,  p_i = exp(s_i · clamp(Σ_k λ_k·x_ik, ±2)),  x: ln|o|, mean_logp, min_logp

and with any f a response with A > 0 may count c times (`positive_weight`), the token mass of the scope preserved.

v, one number per token (`probability_weights`; π the policy's own probability of the sampled token, a constant):

    "sigmoid"  v = clip(α·σ(k·(π - p0)), L, U)                        TR-GRPO, arXiv 2511.00066
    "linear"   v = α·π + 1 - α                                        AR, arXiv 2505.12929

The two papers are read as this project understands them. A function or an object of your own takes the place of either
factor: see `LengthWeight` and `TokenWeight`. Nothing here knows a trainer.
"""

import torch
from torch import Tensor

from .custom import as_length_weight, as_token_weight
from .length_weight import LENGTH_WEIGHTS, SCOPES, LengthWeight, Power, make_length_weight
from .sides import SIDES
from .tensors import kind, listing
from .token_weight import TOKEN_WEIGHTS, TokenWeight, make_token_weight
from .weighing import sequence_mean_weights, weigh_responses, weigh_tokens

LENGTH_AGGREGATIONS = tuple(LENGTH_WEIGHTS)
LEARNABLE_AGGREGATIONS = tuple(name for name, member in LENGTH_WEIGHTS.items() if member.has_lambda)
TOKEN_REGULATIONS = tuple(TOKEN_WEIGHTS)

__all__ = [
    "LEARNABLE_AGGREGATIONS",
    "LENGTH_AGGREGATIONS",
    "SCOPES",
    "SIDES",
    "TOKEN_REGULATIONS",
    "LengthWeight",
    "TokenWeight",
    "as_length_weight",
    "as_token_weight",
    "length_weights",
    "make_length_weight",
    "make_token_weight",
    "probability_weights",
    "sequence_mean_weights",
    "weigh_responses",
    "weigh_tokens",
]


def length_weights(
    lengths: Tensor,
    lam: Tensor | float | None = None,
    *,
    aggregation: str,
    scope: str = "batch",
    length_scale: float = 1 / 9,
    max_completion_length: int | None = None,
    advantages: Tensor | None = None,
    side: str = "both",
    features: Tensor | None = None,
    positive_weight: float = 1.0,
) -> Tensor:
    r"""
    Length weight f of every response, for the loss ``Σ_i f_i Σ_t ℓ_it / Σ_i |o_i|`` summed over a generation batch.

    What is preserved in scope "batch": Σ_i f_i for `"lambda"` (it equals the number of the group's rows with tokens),
    the token mass Σ_i |o_i| f_i = S for `"power"`. In scope "prompt" each group's weights come times a factor of its
    own, so that Σ_i |o_i| f_i of a group is S_batch / P for `"dapo"` and `"power"`. λ = 0 is `"dapo"` in both, bit for
    bit; power λ = -1 is `"grpo"` where every row has tokens (and else N / (rows with tokens) times it).

    Args:
        lengths (`torch.Tensor`):
            Response lengths |o_i| in tokens, shape (P, G): P prompts, G responses each, integer or float, >= 0. A 0
            marks a row without tokens: it gets weight 0 and takes no part in μ, σ and the normaliser of `"lambda"`
            and `"power"`; the fixed members count it as a row, as TRL does.
        lam (`torch.Tensor` or `float`, *optional*):
            λ, one element, any finite real number. Required by `"lambda"` and `"power"`, without effect elsewhere.
        aggregation (`str`):
            One of `LENGTH_AGGREGATIONS`; the formulas are in this module's docstring.
        scope (`str`, defaults to `"batch"`):
            Where μ and S are taken. `"batch"`: over all rows, TRL's token mean. `"prompt"`: over each group, the
            token mean of each prompt and then the mean over all P prompts; returned times ``(S_batch / P) / S_p``, so
            that the division by the batch's token count above yields just that. `"grpo"` and `"dr_grpo"` come out
            the same in both.
        length_scale (`float`, defaults to `1/9`):
            r of `"lambda"`, > 0 and below 1/√(G-1), so that every h_i > 0.
        max_completion_length (`int`, *optional*):
            Divisor of `"dr_grpo"`, in tokens, required there.
        advantages (`torch.Tensor`, *optional*):
            A_i, shape (P, G): required where the member, the side or `positive_weight` looks at its sign.
        side (`str`, defaults to `"both"`):
            Whose lengths λ weighs, for `"lambda"` and `"power"`: `"both"`, `"signed"`, `"positive"`, `"negative"`.
        features (`torch.Tensor`, *optional*):
            Raw values of what λ weighs beside length, shape (P, G, K), for `"power"` and a side other than `"both"`.
            `lam` then has 1 + K elements, length first, or K elements, without length.
        positive_weight (`float`, defaults to `1.0`):
            c > 0: a response with A > 0 counts c times, the token mass Σ|o|f of the scope preserved.

    Returns:
        `torch.Tensor`: weights, shape (P, G), differentiable in `lam`, positive where `lengths` is. The dtype is that
        of a floating `lam` tensor or of floating `lengths` (the wider of the two), else float32.

    Raises:
        `ValueError`: unknown member or scope, wrong shape or dtype, a negative or non-finite length or λ (looked at on
        the CPU only: on other devices the look would force a synchronisation), r out of range, a missing argument.
    """
    named: dict[str, Tensor] = {}
    if features is not None:
        if aggregation != "power" or side == "both":
            raise ValueError(f"features have no effect with aggregation={aggregation!r} and side={side!r}.")
        if not torch.is_tensor(features) or features.shape[:2] != lengths.shape or features.dim() != 3:
            raise ValueError(f"features must be a tensor of shape (P, G, K) beside lengths, got {kind(features)}.")
        named = {f"feature {k}": features[..., k] for k in range(features.size(2))}
    if not 0 < positive_weight < float("inf"):
        raise ValueError(f"positive_weight={positive_weight} must be finite and > 0.")
    if side not in SIDES:
        raise ValueError(f"side={side!r} is unknown; accepted: {listing(SIDES)}.")
    options = {"length_scale": length_scale, "max_completion_length": max_completion_length, "side": side}
    member = make_length_weight(aggregation, options)
    if named:
        size = lam.numel() if isinstance(lam, Tensor) else 1
        member = _AnyFeatures(side, (*(("length",) if size == len(named) + 1 else ()), *named))
    for given in (advantages, *named.values()):
        if given is not None and given.shape != lengths.shape:
            raise ValueError(f"advantages and features must have the shape of lengths, got {kind(given)}.")
    return weigh_responses(
        member, lengths, lam, scope=scope, advantages=advantages, features=named, positive_weight=positive_weight
    )


class _AnyFeatures(Power):
    """`"power"` over features that are given as arrays, under no name of the table."""

    def check(self, group_size: int) -> None:
        return


def probability_weights(
    logps: Tensor,
    *,
    regulation: str,
    alpha: float | None = None,
    slope: float = 9.0,
    center: float = 0.25,
    min: float = 1.0,
    max: float = 1.4,
) -> Tensor:
    r"""
    Probability weight v of every token, increasing in the policy's own probability π of it, a constant to autograd.

    Args:
        logps (`torch.Tensor`):
            Natural-log probabilities of the sampled tokens under the current policy, <= 0, floating, any shape.
        regulation (`str`):
            `"sigmoid"` or `"linear"`; the formulas are in this module's docstring.
        alpha (`float`, *optional*):
            α: > 0 for `"sigmoid"` (2.0 if `None`), in [0, 1] for `"linear"` (0.2 if `None`).
        slope (`float`, defaults to `9.0`):
            k of the sigmoid, > 0.
        center (`float`, defaults to `0.25`):
            p0 of the sigmoid, a probability in [0, 1].
        min (`float`, defaults to `1.0`):
            L of the sigmoid, > 0.
        max (`float`, defaults to `1.4`):
            U of the sigmoid, >= L.

    Returns:
        `torch.Tensor`: weights, the shape of `logps`, detached, strictly positive; float64 for float64 input, else
        float32.

    Raises:
        `ValueError`: unknown shape of v, a parameter out of its range, `logps` that is not floating or, on the CPU,
        holds values that cannot be log-probabilities.
    """
    options = {"alpha": alpha, "slope": slope, "center": center, "min": min, "max": max}
    return weigh_tokens(make_token_weight(regulation, options), logps)
