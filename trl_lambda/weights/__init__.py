r"""
Token aggregation as arrays in, array out: the loss is ``Σ_i f_i Σ_t v_it ℓ_it / Σ_i |o_i|`` over a generation batch,
with ℓ TRL's token loss, a length weight f > 0 per response and a token weight v >= 0 per token.

f (S = Σ|o| over the scope, μ the mean length there, of the batch for "grpo" and "dr_grpo"; G, and μ and σ in
h_i = 1 + r·(|o_i| - μ)/σ, are the group's, over its rows with tokens):

    "lambda_grpo"  f_i = G · softmax_i(h_i^λ)                             λ-GRPO, arXiv 2510.06870
    "power"        f_i = (|o_i|/μ)^λ · S / Σ_j |o_j|·(|o_j|/μ)^λ          this project's: λ = 0 DAPO, λ = -1 GRPO
    "grpo"         f_i = μ / |o_i|                                        GRPO, arXiv 2402.03300
    "dapo"         f_i = 1                                                DAPO, arXiv 2503.14476
    "dr_grpo"      f_i = μ / max_completion_length                        Dr. GRPO, arXiv 2503.20783
    "balanced"     f_i = m_group / m_sign(A_i), m the mean length         Balanced Aggregation, arXiv 2605.04077

The side of λ is s_i = 1 ("both"), sign(A_i) ("signed"), 1 where A_i > 0 ("positive") or where A_i < 0 ("negative"),
else 0. For the last three (this project's), and with features x centred in the group,

    "lambda_grpo"  f_i = G · softmax_i(h_i^(λ·s_i))
    "power"        f_i = p_i · S / Σ_j |o_j|·p_j,  p_i = exp(s_i · clamp(Σ_k λ_k·x_ik, ±2))

with x of ln|o|, mean_logp or min_logp. With any f, `positive_weight` makes a response with A > 0 count c times, the
token mass of the scope preserved.

v (π is the current policy's probability of the sampled token, a constant to autograd):

    "tr_grpo"      v = clip(α·σ(k·(π - p0)), L, U)                        TR-GRPO, arXiv 2511.00066
    "ar"           v = α·π + 1 - α                                        AR, arXiv 2505.12929

Both papers are read as this project understands them. A function or an object of your own takes the place of either
factor: see `LengthWeight` and `TokenWeight`. Nothing here knows a trainer.
"""

import torch

from .members import LENGTH_WEIGHTS, SCOPES, TOKEN_WEIGHTS, LengthWeight, Power, TokenWeight
from .rows import SIDES, ResponseRows, TokenRows, kind, probabilities
from .weighing import (
    as_length_weight,
    as_token_weight,
    groups_with_signal,
    sequence_mean_weights,
    weigh_responses,
    weigh_tokens,
    weight_from_name,
)

__all__ = [
    "LENGTH_WEIGHTS",
    "SCOPES",
    "SIDES",
    "TOKEN_WEIGHTS",
    "LengthWeight",
    "ResponseRows",
    "TokenRows",
    "TokenWeight",
    "as_length_weight",
    "as_token_weight",
    "groups_with_signal",
    "length_weights",
    "probabilities",
    "sequence_mean_weights",
    "token_weights",
    "weigh_responses",
    "weigh_tokens",
    "weight_from_name",
]


def length_weights(
    lengths: torch.Tensor,
    lam: torch.Tensor | float | None = None,
    *,
    length_weight: str,
    scope: str = "batch",
    length_scale: float = 1 / 9,
    max_completion_length: int | None = None,
    advantages: torch.Tensor | None = None,
    side: str = "both",
    features: torch.Tensor | None = None,
    positive_weight: float = 1.0,
) -> torch.Tensor:
    r"""
    Length weight f of every response, for the loss ``Σ_i f_i Σ_t ℓ_it / Σ_i |o_i|`` summed over a generation batch.

    In scope "batch", `"lambda_grpo"` preserves Σ_i f_i (the number of the group's rows with tokens) and `"power"`
    preserves the token mass Σ_i |o_i| f_i = S. In scope "prompt" each group's weights come times a factor of its own,
    so that Σ_i |o_i| f_i of a group is S_batch / P for `"dapo"` and `"power"`. λ = 0 is `"dapo"` in both, bit for bit.
    `"power"` at λ = -1 is `"grpo"` where every row has tokens (and else N / (rows with tokens) times it).

    Args:
        lengths (`torch.Tensor`):
            Response lengths |o_i| in tokens, shape (P, G): P prompts, G responses each, integer or float, >= 0. A 0
            marks a row without tokens. It gets weight 0 and takes no part in μ, σ and the normaliser of
            `"lambda_grpo"` and `"power"`. The fixed members count it as a row, as TRL does.
        lam (`torch.Tensor` or `float`, *optional*):
            λ, one element per feature, any finite real numbers. Required by `"lambda_grpo"` and `"power"`.
        length_weight (`str`):
            A name in `LENGTH_WEIGHTS`; the formulas are in this module's docstring.
        scope (`str`, defaults to `"batch"`):
            Scope of μ and S. `"batch"`: all rows, TRL's token mean. `"prompt"`: each group, the token mean of each
            prompt and then the mean over all P prompts, returned times ``(S_batch / P) / S_p``, so that the division
            by the batch's token count yields just that. `"grpo"` and `"dr_grpo"` are the same in both.
        length_scale (`float`, defaults to `1/9`):
            r of `"lambda_grpo"`, > 0 and below 1/√(G-1), so that every h_i > 0.
        max_completion_length (`int`, *optional*):
            Divisor of `"dr_grpo"`, in tokens, required there.
        advantages (`torch.Tensor`, *optional*):
            A_i, shape (P, G): required where the member, the side or `positive_weight` depends on its sign.
        side (`str`, defaults to `"both"`):
            Side of λ, for `"lambda_grpo"` and `"power"`: `"both"`, `"signed"`, `"positive"`, `"negative"`.
        features (`torch.Tensor`, *optional*):
            Raw values of the features beside length, shape (P, G, K), for `"power"` and a side other than `"both"`.
            `lam` then has 1 + K elements, length first, or K elements, without length.
        positive_weight (`float`, defaults to `1.0`):
            c > 0: a response with A > 0 counts c times, the token mass Σ|o|f of the scope preserved.

    Returns:
        `torch.Tensor`: weights, shape (P, G), differentiable in `lam`, positive where `lengths` is. The dtype is that
        of a floating `lam` tensor or of floating `lengths` (the wider of the two), else float32.

    Raises:
        `ValueError`: unknown member, scope or side, wrong shape or dtype, a negative or non-finite length or λ (looked
        at on the CPU only: on other devices the look would force a synchronisation), r out of range, a missing
        argument.
    """
    _check_lengths(lengths)
    for name, value, accepted in (
        ("length_weight", length_weight, LENGTH_WEIGHTS),
        ("scope", scope, SCOPES),
        ("side", side, SIDES),
    ):
        if value not in accepted:
            raise ValueError(f"{name}={value!r} is unknown; accepted: {', '.join(accepted)}.")
    if not 0 < positive_weight < float("inf"):
        raise ValueError(f"positive_weight={positive_weight} must be finite and > 0.")
    member: LengthWeight = weight_from_name(
        length_weight,
        {"length_scale": length_scale} if length_weight == "lambda_grpo" else None,
        {"side": side, "max_completion_length": max_completion_length},
        LENGTH_WEIGHTS,
        "length_weight",
    )
    member.check(lengths.size(1))
    named: dict[str, torch.Tensor] = {}
    if features is not None:
        if length_weight != "power" or side == "both":
            raise ValueError(f"features have no effect with length_weight={length_weight!r} and side={side!r}.")
        if not torch.is_tensor(features) or features.shape[:2] != lengths.shape or features.dim() != 3:
            raise ValueError(f"features must be a tensor of shape (P, G, K) beside lengths, got {kind(features)}.")
        named = {f"feature {k}": features[..., k] for k in range(features.size(2))}
        member = Power(side, (*(["length"] if torch.is_tensor(lam) and lam.numel() > len(named) else []), *named))
    if advantages is not None and advantages.shape != lengths.shape:
        raise ValueError(f"advantages must have the shape of lengths, got {kind(advantages)}.")
    if member.has_lambda:
        _check_lambda(member, lam)
    # float64 inside: exp(h^λ) magnifies rounding by h^λ, and (P, G) numbers cost nothing. MPS has no float64.
    work = torch.float32 if lengths.device.type == "mps" else torch.float64
    rows = ResponseRows(
        lengths.to(work),
        lengths.to(work).sum(),
        dim=(0, 1) if scope == "batch" else (1,),
        advantages=None if advantages is None else advantages.to(work),
        statistics={name: values.to(work) for name, values in named.items()},
    )
    lam = torch.as_tensor(lam, device=lengths.device) if member.has_lambda else None
    floating = (x.dtype for x in (lengths, lam) if isinstance(x, torch.Tensor) and x.is_floating_point())
    dtype = torch.float64 if torch.float64 in floating else torch.float32
    return weigh_responses(member, rows, lam, positive_weight=positive_weight, dtype=dtype)


def token_weights(
    logps: torch.Tensor,
    *,
    token_weight: str,
    alpha: float | None = None,
    slope: float = 9.0,
    center: float = 0.25,
    min: float = 1.0,
    max: float = 1.4,
) -> torch.Tensor:
    r"""
    Token weight v of every token, increasing in the policy's own probability π of it, a constant to autograd.

    Args:
        logps (`torch.Tensor`):
            Natural-log probabilities of the sampled tokens under the current policy, <= 0, floating, any shape.
        token_weight (`str`):
            `"tr_grpo"` or `"ar"`; the formulas are in this module's docstring.
        alpha (`float`, *optional*):
            α: > 0 for `"tr_grpo"` (2.0 if `None`), in [0, 1] for `"ar"` (0.2 if `None`).
        slope (`float`, defaults to `9.0`):
            k of `"tr_grpo"`, > 0.
        center (`float`, defaults to `0.25`):
            p0 of `"tr_grpo"`, a probability in [0, 1].
        min (`float`, defaults to `1.0`):
            L of `"tr_grpo"`, > 0.
        max (`float`, defaults to `1.4`):
            U of `"tr_grpo"`, >= L.

    Returns:
        `torch.Tensor`: weights, the shape of `logps`, detached, > 0; float64 for float64 input, else float32.

    Raises:
        `ValueError`: unknown member, a parameter out of its range, `logps` that is not floating or, on the CPU, holds
        values that cannot be log-probabilities.
    """
    if token_weight not in TOKEN_WEIGHTS:
        raise ValueError(f"token_weight={token_weight!r} is unknown; accepted: {', '.join(TOKEN_WEIGHTS)}.")
    given = {"slope": slope, "center": center, "min": min, "max": max} if token_weight == "tr_grpo" else {}
    member = TOKEN_WEIGHTS[token_weight](**given, **({} if alpha is None else {"alpha": alpha}))
    member.check()
    # 0.01 is what a low-precision log-softmax may exceed 0 by; a tensor of probabilities is above it at once.
    is_right = torch.is_tensor(logps) and logps.is_floating_point()
    if not is_right or (logps.device.type == "cpu" and (logps > 0.01).any()):
        raise ValueError(f"logps must be a floating tensor of natural-log probabilities (<= 0), got {kind(logps)}.")
    return weigh_tokens(member, TokenRows(probabilities(logps)))


def _check_lengths(lengths: torch.Tensor) -> None:
    is_right = torch.is_tensor(lengths) and lengths.dim() == 2 and lengths.numel() > 0
    if not is_right or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be a non-empty real tensor of shape (P, G), got {kind(lengths)}.")
    if lengths.device.type == "cpu" and not (lengths.isfinite() & (lengths >= 0)).all():
        raise ValueError("lengths must be finite and >= 0.")


def _check_lambda(member: LengthWeight, lam: torch.Tensor | float | None) -> None:
    size = len(member.features)
    if lam is None:
        raise ValueError(f"lam is required by length_weight={member.name!r}.")
    given = torch.as_tensor(lam)
    if given.numel() != size or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"lam must have {size} real elements, got {kind(lam)}.")
    if given.device.type == "cpu" and not given.isfinite().all():
        raise ValueError(f"lam={given.tolist()} must be finite.")
