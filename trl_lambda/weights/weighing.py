"""The one way in which every f and every v is computed: checks, rows without tokens, scope, dtype and positivity."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .custom import LENGTH_ARGUMENTS, arguments_of, check_follows_lambda, check_result, named_arguments
from .length_weight import LENGTH_WEIGHTS, SCOPES, LengthWeight
from .sides import sides
from .tensors import group_mean, kind, listing, one_where_zero, strictly_positive
from .token_weight import TOKEN_WEIGHTS, TokenWeight


def weigh_responses(
    member: LengthWeight,
    lengths: Tensor,
    lam: Tensor | float | None = None,
    *,
    scope: str = "batch",
    advantages: Tensor | None = None,
    features: Mapping[str, Tensor] | None = None,
    positive_weight: float = 1.0,
) -> Tensor:
    """
    f of every response by any member.

    Args:
        member ([`LengthWeight`]): f.
        lengths, lam, scope, advantages: as for `length_weights`.
        features (`Mapping[str, Tensor]`, *optional*): name -> (P, G), further arguments that a member may name.
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
    columns = {name: values.to(work) for name, values in (features or {}).items()}
    known: dict[str, Any] = {"lengths": rows, "has_tokens": has_tokens, "features": columns, **columns}
    known["dim"] = (0, 1) if scope == "batch" else (1,)
    known["advantages"] = None if advantages is None else advantages.to(work)
    if member.has_lambda:  # without λ none is made: putting a number on a device would make the host wait for it
        lam_shape = () if len(member.lambda_features) == 1 else (-1,)
        known["lam"] = torch.as_tensor(lam, device=rows.device, dtype=work).reshape(lam_shape)
    names = arguments_of(member)
    given = {name: known.get(name) for name in names}
    required = named_arguments(member, LENGTH_ARGUMENTS, required=True)
    missing = [name for name in required if name != "lam" and given.get(name) is None]
    if missing:
        raise ValueError(f"{member.name} requires {', '.join(missing)}, and the call gives none.")
    if "has_tokens" not in names and "lengths" in names:
        given["lengths"] = _fill_empty_rows(rows, has_tokens)
    if scope == "prompt" and member.has_scope and "dim" not in names:
        weights = _one_prompt_at_a_time(member, given, has_tokens)
    else:
        weights = member(**given)
        if type(member) not in LENGTH_WEIGHTS.values():
            check_result(member.name, weights, rows.shape, has_tokens)
    check_follows_lambda(member.name, weights, given.get("lam"))
    if positive_weight != 1:
        favour = 1 + (positive_weight - 1) * sides(known["advantages"], has_tokens, "positive")
        weights = _with_mass_of(weights, weights * favour, rows, known["dim"] if member.has_scope else (0, 1))
    if scope == "prompt" and member.has_scope:
        weights = weights * (rows.sum() / rows.size(0)) / one_where_zero(rows.sum(dim=1, keepdim=True))
    return strictly_positive(weights, _result_dtype(lengths, lam)).masked_fill(~has_tokens, 0)


def sequence_mean_weights(weights: Tensor, lengths: Tensor) -> Tensor:
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


def weigh_tokens(member: TokenWeight, logps: Tensor) -> Tensor:
    """
    v of every token by any member, from log-probabilities as `probability_weights` takes them and in its form.

    Raises:
        `ValueError`: as `probability_weights`; or a function of the user's returned something else than positive
            weights like its argument.
    """
    if not torch.is_tensor(logps) or not logps.is_floating_point():
        raise ValueError(f"logps must be a floating tensor of log-probabilities, got {kind(logps)}.")
    logps = logps.detach().to(torch.float64 if logps.dtype == torch.float64 else torch.float32)
    # 0.01 is what a low-precision log-softmax may exceed 0 by; a tensor of probabilities is above it at once.
    if logps.device.type == "cpu" and (logps > 0.01).any():
        raise ValueError(f"logps must be natural-log probabilities (<= 0), got a value of {logps.max().item()}.")
    probs = logps.exp().clamp(max=1)
    if type(member) in TOKEN_WEIGHTS.values():
        return member(probs)
    # A policy that has diverged has probabilities of NaN: TRL's loss shows that, and the function is not to blame.
    weights = check_result(member.name, member(probs), probs.shape, probs.isfinite())
    return strictly_positive(weights.detach(), probs.dtype)


def _one_prompt_at_a_time(member: LengthWeight, given: Mapping[str, Any], has_tokens: Tensor) -> Tensor:
    """Call a member that knows no scope with one group after the other, (1, G) each."""
    groups = []
    for p in range(has_tokens.size(0)):
        one = {n: x[p : p + 1] if isinstance(x, Tensor) and x.dim() == 2 else x for n, x in given.items()}
        groups.append(check_result(member.name, member(**one), has_tokens[:1].shape, has_tokens[p : p + 1]))
    return torch.cat(groups)


def _fill_empty_rows(rows: Tensor, has_tokens: Tensor) -> Tensor:
    """Show a row without tokens as its group's mean length: neutral to a mean, and no division by zero."""
    mean = group_mean(rows, has_tokens)
    everyones = one_where_zero(rows.sum() / one_where_zero(has_tokens.sum()))  # for a group without any tokens
    return torch.where(has_tokens, rows, torch.where(mean > 0, mean, everyones))


def _with_mass_of(weights: Tensor, favoured: Tensor, lengths: Tensor, dim: tuple[int, ...]) -> Tensor:
    """`favoured` with the token mass Σ|o|f of `weights` over the scope; all (P, G)."""
    mass, before = ((lengths * w).sum(dim=dim, keepdim=True) for w in (favoured, weights))
    return favoured * before / one_where_zero(mass)


def _check_arguments(member: LengthWeight, lengths: Tensor, lam: Tensor | float | None, scope: str) -> None:
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
        if isinstance(lam, Tensor) and (lam.numel() != size or lam.is_complex() or lam.dtype == torch.bool):
            what = "one real number" if size == 1 else f"{size} real numbers"
            raise ValueError(f"lam must be {what}, got {kind(lam)}.")
        on_host = not isinstance(lam, Tensor) or lam.device.type == "cpu"
        if on_host and not torch.as_tensor(lam).isfinite().all():
            raise ValueError(f"lam={torch.as_tensor(lam).tolist()} must be finite.")
    member.check(lengths.size(1))


def _result_dtype(lengths: Tensor, lam: Tensor | float | None) -> torch.dtype:
    """float64 where an argument asks for it, else float32: weights are never kept in half precision."""
    floating = (x.dtype for x in (lengths, lam) if isinstance(x, Tensor) and x.is_floating_point())
    return torch.float64 if torch.float64 in floating else torch.float32
