"""The one way in which every f and every v is computed: rows without tokens, scope, tied groups, dtype, positivity."""

from dataclasses import replace

import torch
from torch import Tensor

from .members import LENGTH_WEIGHTS, TOKEN_WEIGHTS, LengthWeight, TokenWeight
from .own_functions import check_weights
from .rows import ResponseRows, TokenRows, one_where_zero, sides, strictly_positive

# Equal rewards that were added up in another order differ by less than this part of the largest.
_EQUAL_REWARDS = 1e-6


def weigh_responses(
    member: LengthWeight,
    rows: ResponseRows,
    lam: Tensor | None,
    *,
    positive_weight: float = 1.0,
    live: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """
    f of every response by any member.

    Args:
        member ([`LengthWeight`]): f.
        rows ([`ResponseRows`]): the generation batch.
        lam (`torch.Tensor`, *optional*): λ, one element per feature.
        positive_weight (`float`): c, a response with A > 0 counts c times, the token mass of the scope preserved.
        live (`torch.Tensor`, *optional*): bool, (P, 1): groups with a signal; the others leave numerator and
            denominator.
        dtype (`torch.dtype`): of the result.

    Returns:
        `torch.Tensor`: weights, (P, G), 0 for rows without tokens and for groups that are not live.

    Raises:
        `ValueError`: the member needs one advantage per response, or a weight of the user's is not > 0.
    """
    everyones = rows.lengths
    if live is not None:  # tied groups are rows without tokens to the member, its normaliser included
        rows = replace(rows, lengths=rows.lengths * live)
    weights = member(rows, None if lam is None else lam.to(rows.lengths))
    if type(member) not in LENGTH_WEIGHTS.values():
        shape, where = rows.lengths.shape, rows.has_tokens
        weights = check_weights(member.name, weights, shape, where, zero=False).to(rows.lengths)
    if positive_weight != 1:
        favoured = weights * (1 + (positive_weight - 1) * sides(rows.advantages, rows.has_tokens, "positive"))
        scope = rows if member.has_scope else replace(rows, dim=(0, 1))
        mass, before = scope.total(rows.lengths * favoured), scope.total(rows.lengths * weights)
        weights = favoured * before / one_where_zero(mass)
    of_prompts = rows.dim == (1,) and member.has_scope
    if of_prompts:  # the loss divides by S; the mean over prompts of token means is wanted
        weights = weights * (rows.token_count / rows.lengths.size(0)) / one_where_zero(rows.total(rows.lengths))
    if live is not None:  # and the loss's denominator is theirs no longer: S/S_live, N/N_live or P/P_live
        counted = everyones if member.has_scope and not of_prompts else torch.ones_like(everyones)
        weights = weights * (counted.sum() / one_where_zero((counted * live).sum()))
    return strictly_positive(weights, dtype).masked_fill(~rows.has_tokens, 0)


def groups_with_signal(rewards: Tensor) -> Tensor:
    """
    Which groups have rewards that differ, bool, (P, 1), from rewards (P, G), NaN for a response without one.

    Rewards decide rather than advantages: TRL leaves advantages of up to 6e-4 where equal rewards are no binary
    fractions.
    """
    known = ~rewards.isnan()
    least = rewards.masked_fill(~known, torch.inf).amin(dim=1, keepdim=True)
    most = rewards.masked_fill(~known, -torch.inf).amax(dim=1, keepdim=True)
    return most - least > _EQUAL_REWARDS * torch.maximum(most.abs(), least.abs())


def sequence_mean_weights(weights: Tensor, rows: ResponseRows) -> Tensor:
    """
    Restate weights of a token mean for a loss that is reduced as a mean of per-sequence means (TRL's `"sapo"`).

    ``Σ_i f_i Σ_t ℓ_it / S = 1/N Σ_i (f_i · |o_i| · N / S) · (1/|o_i|) Σ_t ℓ_it`` with N rows and the token count S.

    Args:
        weights (`torch.Tensor`): f, (P, G).
        rows ([`ResponseRows`]): the rows that it was made from.

    Returns:
        `torch.Tensor`: f_i · |o_i| / μ, (P, G), in the dtype of `weights`.
    """
    return weights * (rows.lengths / one_where_zero(rows.mean_length)).to(weights.dtype)


def weigh_tokens(member: TokenWeight, rows: TokenRows, *, zero: bool = True) -> Tensor:
    """
    v of every token by any member, (B, T), detached; a weight of the user's may be 0 only with `zero`.

    Raises:
        `ValueError`: a weight of the user's is not of the shape of `rows.probs`, or not finite and >= 0.
    """
    weights = member(rows)
    if type(member) in TOKEN_WEIGHTS.values():
        return weights
    # A policy that has diverged has probabilities of NaN: TRL's loss shows that, and the function is not to blame.
    where = rows.probs.isfinite() if rows.mask is None else rows.probs.isfinite() & (rows.mask > 0)
    weights = check_weights(member.name, weights, rows.probs.shape, where, zero=zero).detach().to(rows.probs.dtype)
    return weights.masked_fill(~where, 1).clamp(min=0, max=torch.finfo(weights.dtype).max ** 0.75)
