"""Token aggregation as arrays in, array out: the length weight f(λ) and the probability weight v(π).

The per-token weight of the unified loss is ``w_it = f_i(λ) · v(π_it) > 0``: `length_weights` is f, one number per
response; `probability_weights` is v, one number per token. Nothing here knows a trainer. The project implements its
own reading of arXiv 2510.06870 and arXiv 2511.00066.
"""

import math

import torch

LENGTH_AGGREGATIONS = ("lambda", "power", "grpo", "dapo", "dr_grpo")
LEARNABLE_AGGREGATIONS = ("lambda", "power")
SCOPES = ("batch", "prompt")
TOKEN_REGULATIONS = ("sigmoid", "linear")
DEFAULT_REGULATION_ALPHA = {"sigmoid": 2.0, "linear": 0.2}

# Keeps z finite where σ = 0. Lengths are integers, so that a σ other than 0 is at least 0.1: this is far below it.
_SIGMA_EPSILON = 1e-8


def length_weights(
    lengths: torch.Tensor,
    lam: torch.Tensor | float | None = None,
    *,
    aggregation: str,
    scope: str = "batch",
    length_scale: float = 1 / 9,
    max_completion_length: int | None = None,
) -> torch.Tensor:
    r"""
    Length weight f of every response, for the loss ``Σ_i f_i Σ_t ℓ_it / Σ_i |o_i|`` summed over a generation batch.

    arXiv 2510.06870 (`"lambda"` and the three members it contains as choices of f); `"power"` is this project's own.
    With ``S = Σ|o|`` and ``μ`` over the scope, ``N`` the number of rows in it:

        "dapo"     f_i = 1
        "grpo"     f_i = μ / |o_i|                                        (μ = S / N, rows without tokens counted)
        "dr_grpo"  f_i = μ / max_completion_length
        "lambda"   f_i = G · softmax_i(h_i^λ),  h_i = 1 + r·z_i,  z_i = (|o_i| - μ) / σ   (μ, σ, G of the group)
        "power"    f_i = (|o_i|/μ)^λ · S / Σ_j |o_j|·(|o_j|/μ)^λ

    What is preserved in scope "batch": Σ_i f_i for `"lambda"` (it equals the number of the group's rows with tokens),
    the token mass Σ_i |o_i| f_i = S for `"power"`. In scope "prompt" each group's weights come times a factor of its
    own, so that Σ_i |o_i| f_i of a group is S_batch / P for `"dapo"` and `"power"`. λ = 0 is `"dapo"` in both, bit for bit; power λ = -1 is `"grpo"` where every row
    has tokens (and else N / (rows with tokens) times it).

    Args:
        lengths (`torch.Tensor`):
            Response lengths |o_i| in tokens, shape (P, G): P prompts, G responses each, integer or float, >= 0. A 0
            marks a row without tokens: it gets weight 0 and takes no part in μ, σ and the normaliser of `"lambda"`
            and `"power"`; the fixed members count it as a row, as TRL does.
        lam (`torch.Tensor` or `float`, *optional*):
            λ, one element, any finite real number. Required by `"lambda"` and `"power"`, without effect elsewhere.
        aggregation (`str`):
            One of `"lambda"`, `"power"`, `"grpo"`, `"dapo"`, `"dr_grpo"`.
        scope (`str`, defaults to `"batch"`):
            Where μ and S are taken. `"batch"`: over all rows, TRL's token mean. `"prompt"`: over each group, the
            token mean of each prompt and then the mean over all P prompts; returned times ``(S_batch / P) / S_p``, so
            that the division by the batch's token count above yields just that. `"grpo"` and `"dr_grpo"` come out
            the same in both.
        length_scale (`float`, defaults to `1/9`):
            r of `"lambda"`, > 0 and below 1/√(G-1), so that every h_i > 0.
        max_completion_length (`int`, *optional*):
            Divisor of `"dr_grpo"`, in tokens, required there.

    Returns:
        `torch.Tensor`: weights, shape (P, G), differentiable in `lam`, positive where `lengths` is. The dtype is that
        of a floating `lam` tensor or of floating `lengths` (the wider of the two), else float32.

    Raises:
        `ValueError`: unknown member or scope, wrong shape or dtype, a negative or non-finite length or λ (looked at on
        the CPU only: on other devices the look would force a synchronisation), r out of range, a missing argument.
    """
    _check_length_arguments(lengths, lam, aggregation, scope, length_scale, max_completion_length)
    # float64 inside: exp(h^λ) magnifies rounding by h^λ, and (P, G) numbers cost nothing. MPS has no float64.
    work = torch.float32 if lengths.device.type == "mps" else torch.float64
    dtype = _result_dtype(lengths, lam)
    rows = lengths.to(work)
    has_tokens = rows > 0
    batch_tokens = rows.sum()
    mean_length = batch_tokens / rows.numel()

    if aggregation == "grpo":
        weights = mean_length / _one_where_zero(rows)
    elif aggregation == "dr_grpo":
        weights = (mean_length / max_completion_length).expand_as(rows)
    else:
        if aggregation == "dapo":
            weights = torch.ones_like(rows)  # without λ: putting a number on a device would make the host wait for it
        else:
            lam = torch.as_tensor(lam, device=rows.device).to(work).reshape(())
            if aggregation == "lambda":
                weights = _softmax_weights(rows, has_tokens, lam, length_scale)
            else:
                weights = _power_weights(rows, has_tokens, lam, dim=(0, 1) if scope == "batch" else (1,))
        if scope == "prompt":
            weights = weights * (batch_tokens / rows.size(0)) / _one_where_zero(rows.sum(dim=1, keepdim=True))

    return _strictly_positive(weights, dtype) * has_tokens


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
    return weights * (lengths / _one_where_zero(lengths.sum()) * lengths.numel()).to(weights.dtype)


def _softmax_weights(
    rows: torch.Tensor, has_tokens: torch.Tensor, lam: torch.Tensor, length_scale: float
) -> torch.Tensor:
    """G · softmax of h^λ over the rows with tokens of each group; shapes (P, G), (P, G), ()."""
    count = has_tokens.sum(dim=1, keepdim=True).clamp(min=1)
    mean = rows.sum(dim=1, keepdim=True) / count
    deviation = (rows - mean) * has_tokens
    std = (deviation.square().sum(dim=1, keepdim=True) / count).sqrt()
    log_h = (1 + length_scale * deviation / (std + _SIGMA_EPSILON)).log()
    # The softmax of g = h^λ is taken of g_i - g_top = g_top · ((h_i/h_top)^λ - 1), so that equal lengths cancel
    # exactly, in value and gradient, however large h^λ is. g_top is held at the square root of the float range: a
    # softmax with gaps of that size is one-hot.
    top = (lam.detach() * log_h).masked_fill(~has_tokens, -torch.inf).argmax(dim=1, keepdim=True)
    log_top = log_h.gather(1, top)
    g_top = (lam * log_top).clamp(max=math.log(torch.finfo(rows.dtype).max) / 2).exp()
    exp = (g_top * torch.expm1(lam * (log_h - log_top))).exp() * has_tokens
    return exp * count / _one_where_zero(exp.sum(dim=1, keepdim=True))


def _power_weights(
    rows: torch.Tensor, has_tokens: torch.Tensor, lam: torch.Tensor, dim: tuple[int, ...]
) -> torch.Tensor:
    """(|o|/μ)^λ · S / Σ|o|(|o|/μ)^λ over the rows with tokens, sums over `dim`; shapes (P, G), (P, G), ()."""
    count = has_tokens.sum(dim=dim, keepdim=True).clamp(min=1)
    tokens = rows.sum(dim=dim, keepdim=True)
    log_ratio = (_one_where_zero(rows) * count / _one_where_zero(tokens)).log()
    exponent = (lam * log_ratio).masked_fill(~has_tokens, -torch.inf)
    top = exponent.detach().amax(dim=dim, keepdim=True)
    powers = (exponent - top.masked_fill(top == -torch.inf, 0)).exp()
    mass = (rows * powers).sum(dim=dim, keepdim=True)
    return powers * tokens / mass.clamp(min=torch.finfo(mass.dtype).tiny)


def probability_weights(
    logps: torch.Tensor,
    *,
    regulation: str,
    alpha: float | None = None,
    slope: float = 9.0,
    center: float = 0.25,
    min: float = 1.0,
    max: float = 1.4,
) -> torch.Tensor:
    r"""
    Probability weight v of every token, increasing in the policy's own probability π of it, a constant to autograd.

        "sigmoid"  v = clip(α · σ(k · (π - p0)), L, U)   arXiv 2511.00066, as this project reads its constants
        "linear"   v = α · π + 1 - α                     arXiv 2505.12929, with the current policy's π

    Args:
        logps (`torch.Tensor`):
            Natural-log probabilities of the sampled tokens under the current policy, <= 0, floating, any shape.
        regulation (`str`):
            `"sigmoid"` or `"linear"`.
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
    alpha = check_probability_arguments(regulation, alpha, slope, center, min, max)
    if not torch.is_tensor(logps) or not logps.is_floating_point():
        raise ValueError(f"logps must be a floating tensor of log-probabilities, got {_kind(logps)}.")
    logps = logps.detach().to(torch.float64 if logps.dtype == torch.float64 else torch.float32)
    # 0.01 is what a low-precision log-softmax may exceed 0 by; a tensor of probabilities is above it at once.
    if logps.device.type == "cpu" and (logps > 0.01).any():
        raise ValueError(f"logps must be natural-log probabilities (<= 0), got a value of {logps.max().item()}.")
    probs = logps.exp().clamp(max=1)
    if regulation == "sigmoid":
        return (alpha * torch.sigmoid(slope * (probs - center))).clamp(min=min, max=max)
    return _strictly_positive(alpha * probs + (1 - alpha), probs.dtype)


def check_probability_arguments(
    regulation: str, alpha: float | None, slope: float, center: float, min: float, max: float, prefix: str = ""
) -> float:
    """
    Check the parameters of v, naming each as `prefix` + its name, and return α with its default filled in.

    Raises:
        `ValueError`: a parameter is out of the range that `probability_weights` documents.
    """
    if regulation not in TOKEN_REGULATIONS:
        name = "token_regulation" if prefix else "regulation"
        raise ValueError(f"{name}={regulation!r} is unknown; accepted: {_listing(TOKEN_REGULATIONS)}.")
    alpha = DEFAULT_REGULATION_ALPHA[regulation] if alpha is None else alpha
    if regulation == "linear":
        if not 0 <= alpha <= 1:
            raise ValueError(f"{prefix}alpha={alpha} must be in [0, 1] for the linear weight.")
        return alpha
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"{prefix}alpha={alpha} must be finite and > 0 for the sigmoid weight.")
    if not (math.isfinite(slope) and slope > 0):
        raise ValueError(f"{prefix}slope={slope} must be finite and > 0: the weight increases in the probability.")
    if not 0 <= center <= 1:
        raise ValueError(f"{prefix}center={center} must be a probability in [0, 1].")
    if not (math.isfinite(min) and min > 0):
        raise ValueError(f"{prefix}min={min} must be finite and > 0: a token weight is strictly positive.")
    if not (math.isfinite(max) and max >= min):
        raise ValueError(f"{prefix}max={max} must be finite and >= {prefix}min={min}.")
    return alpha


def check_length_scale(length_scale: float, group_size: int) -> None:
    """
    Check r against the group size G: h_i > 0 for every response needs r·√(G-1) < 1, since |z_i| <= √(G-1).

    Raises:
        `ValueError`: r is not positive and finite, or too large for groups of `group_size` responses.
    """
    if not (math.isfinite(length_scale) and length_scale > 0):
        raise ValueError(f"length_scale={length_scale} must be finite and > 0.")
    if length_scale * math.sqrt(group_size - 1) >= 1:
        raise ValueError(
            f"length_scale={length_scale:g} is too large for groups of {group_size} responses: h = 1 + r·z stays "
            f"positive only for length_scale < 1/√(G-1) = {1 / math.sqrt(group_size - 1):g}."
        )


def _check_length_arguments(
    lengths: torch.Tensor,
    lam: torch.Tensor | float | None,
    aggregation: str,
    scope: str,
    length_scale: float,
    max_completion_length: int | None,
) -> None:
    """Raise a `ValueError` that names the argument; values of tensors are looked at on the CPU only."""
    if aggregation not in LENGTH_AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r} is unknown; accepted: {_listing(LENGTH_AGGREGATIONS)}.")
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; accepted: {_listing(SCOPES)}.")
    if not torch.is_tensor(lengths) or lengths.dim() != 2 or lengths.numel() == 0:
        raise ValueError(f"lengths must be a non-empty tensor of shape (P, G), got {_kind(lengths)}.")
    if lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be integer or float, got {lengths.dtype}.")
    if lengths.device.type == "cpu" and not (lengths.isfinite() & (lengths >= 0)).all():
        raise ValueError("lengths must be finite and >= 0.")
    if aggregation in LEARNABLE_AGGREGATIONS:
        if lam is None:
            raise ValueError(f"lam is required by aggregation={aggregation!r}.")
        if torch.is_tensor(lam) and (lam.numel() != 1 or lam.is_complex() or lam.dtype == torch.bool):
            raise ValueError(f"lam must be one real number, got {_kind(lam)}.")
        on_host = not torch.is_tensor(lam) or lam.device.type == "cpu"
        if on_host and not torch.as_tensor(lam).isfinite().all():
            raise ValueError(f"lam={float(torch.as_tensor(lam).detach())} must be finite.")
    if aggregation == "lambda":
        check_length_scale(length_scale, lengths.size(1))
    if aggregation == "dr_grpo" and (max_completion_length is None or max_completion_length <= 0):
        raise ValueError(f"max_completion_length={max_completion_length} must be > 0 for aggregation='dr_grpo'.")


def _one_where_zero(x: torch.Tensor) -> torch.Tensor:
    """A divisor that is safe where there are no tokens; what it divides there is masked afterwards."""
    return x.masked_fill(x == 0, 1)


def _strictly_positive(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast, held inside the range in which an advantage times the weight neither vanishes nor overflows."""
    info = torch.finfo(dtype)
    return weights.clamp(min=info.tiny**0.75, max=info.max**0.75).to(dtype)


def _result_dtype(lengths: torch.Tensor, lam: torch.Tensor | float | None) -> torch.dtype:
    """float64 where an argument asks for it, else float32: weights are never kept in half precision."""
    floating = (x.dtype for x in (lengths, lam) if torch.is_tensor(x) and x.is_floating_point())
    return torch.float64 if torch.float64 in floating else torch.float32


def _kind(value: object) -> str:
    """What a wrong argument is, for an error message."""
    if torch.is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{type(value).__name__}"


def _listing(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)
