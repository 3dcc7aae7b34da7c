"""
The one way in which every f and every v is computed: rows without tokens, scope, tied groups, dtype, positivity.

A weight of the user's own is a function or object, inspected once when it is wrapped and called by argument name.
"""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from .members import LENGTH_WEIGHTS, TOKEN_WEIGHTS, LengthWeight, TokenWeight
from .rows import (
    SCORED_STATISTICS,
    ResponseRows,
    TokenRows,
    group_mean,
    kind,
    one_where_zero,
    sides,
    strictly_positive,
)

STATISTICS = (*SCORED_STATISTICS, "rewards")
LENGTH_ARGUMENTS = ("lengths", "advantages", "lam", *STATISTICS, "step")
# Equal rewards that were added up in another order differ by less than this part of the largest.
_EQUAL_REWARDS = 1e-6


def weigh_responses(
    member: LengthWeight,
    rows: ResponseRows,
    lam: torch.Tensor | None,
    *,
    positive_weight: float = 1.0,
    live: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
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
        weights = check_weights(member.name, weights, rows.lengths.shape, rows.has_tokens).to(rows.lengths)
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


def groups_with_signal(rewards: torch.Tensor) -> torch.Tensor:
    """
    Which groups have rewards that differ, bool, (P, 1), from rewards (P, G), NaN for a response without one.

    Rewards decide rather than advantages: TRL leaves advantages of up to 6e-4 where equal rewards are no binary
    fractions.
    """
    known = ~rewards.isnan()
    least = rewards.masked_fill(~known, torch.inf).amin(dim=1, keepdim=True)
    most = rewards.masked_fill(~known, -torch.inf).amax(dim=1, keepdim=True)
    return most - least > _EQUAL_REWARDS * torch.maximum(most.abs(), least.abs())


def sequence_mean_weights(weights: torch.Tensor, rows: ResponseRows) -> torch.Tensor:
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


def weigh_tokens(member: TokenWeight, rows: TokenRows, *, zero: bool = True) -> torch.Tensor:
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


class OwnLengthWeight(LengthWeight):
    """A user's function of named arguments as a member. It has a λ if it names `lam`."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function
        self.arguments = _named_arguments(function, LENGTH_ARGUMENTS)
        self.name = self.formula = _name_of(function)
        self.has_lambda = "lam" in self.arguments
        self.needs = tuple(name for name in STATISTICS if name in self.arguments)

    def __call__(self, rows: ResponseRows, lam: torch.Tensor | None) -> torch.Tensor:
        known = {**rows.statistics, "advantages": rows.advantages, "lengths": _fill_empty_rows(rows)}
        if missing := [name for name in self.arguments if name in known and known[name] is None]:
            raise ValueError(f"{self.name} requires {missing[0]} per response, and the batch has them per token.")
        prompts = [slice(None)] if rows.dim == (0, 1) else [slice(p, p + 1) for p in range(rows.lengths.size(0))]
        weights = []
        for part in prompts:
            # Copies: a function that writes into an argument changes nothing else.
            given = {name: known[name][part].clone() for name in self.arguments if name in known} | {
                "lam": lam if lam is None else lam.reshape(()),
                "step": rows.step,
            }
            made = self.function(**{name: given[name] for name in self.arguments})
            weights.append(check_weights(self.name, made, rows.lengths[part].shape, rows.has_tokens[part]))
        if lam is not None and lam.requires_grad and torch.is_grad_enabled() and not weights[0].requires_grad:
            raise ValueError(
                f"{self.name} names lam, and its weights have no gradient in it. Compute them from the tensor lam "
                "with torch, or set lambda_learnable=False."
            )
        return torch.cat(weights)


class OwnTokenWeight(TokenWeight):
    """A user's function of named arguments as a member."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function
        self.arguments = _named_arguments(function, tuple(f.name for f in fields(TokenRows)))
        self.name = self.formula = _name_of(function)

    def __call__(self, rows: TokenRows) -> torch.Tensor:
        given = {name: getattr(rows, name) for name in self.arguments}
        return self.function(**{n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in given.items()})


def as_length_weight(weight: Any) -> LengthWeight:
    """
    Make a member of what `length_weight=` takes: a function, a partial, an object or a [`LengthWeight`].

    Raises:
        `ValueError`: it cannot be called by the names of `LENGTH_ARGUMENTS`, or has the name of a built-in member.
    """
    is_member = isinstance(weight, LengthWeight) and set(inspect.signature(weight).parameters) == {"rows", "lam"}
    return _with_own_name(weight, weight if is_member else OwnLengthWeight(weight), LENGTH_WEIGHTS)


def as_token_weight(weight: Any) -> TokenWeight:
    """Make a member of what `token_weight=` takes, as `as_length_weight` does for f."""
    is_member = isinstance(weight, TokenWeight) and set(inspect.signature(weight).parameters) == {"rows"}
    return _with_own_name(weight, weight if is_member else OwnTokenWeight(weight), TOKEN_WEIGHTS)


def weight_from_name(
    name: str | None, kwargs: Any, options: dict[str, Any], members: dict[str, Any], option: str
) -> Any:
    """
    The member that a config field names, with its parameters; `None` for `None`.

    Args:
        name (`str`, *optional*): a member's name, or a dotted path to a function, an object or a class.
        kwargs (`dict`, *optional*): parameters of the member. A function is called with them by name.
        options (`dict`): parameters that have a config field of their own.
        members (`dict`): the table of members.
        option (`str`): `"length_weight"` or `"token_weight"`.

    Raises:
        `ValueError`: unknown name or parameter, or the path cannot be imported.
    """
    if name is None:
        return None
    kwargs = kwargs or {}
    if name in members:
        own = [f.name for f in fields(members[name]) if "config" not in f.metadata]
        for key, value in kwargs.items():
            if key not in own or isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(
                    f"{option}_kwargs has {key!r}: {value!r}; {name!r} accepts numbers for: "
                    f"{', '.join(own) or 'nothing'}."
                )
        return members[name](**kwargs, **{f.name: options[f.name] for f in fields(members[name]) if f.name in options})
    if "." not in name:
        raise ValueError(
            f"{option}={name!r} is unknown; accepted: {', '.join(members)}, a dotted path to a function, or None."
        )
    weight = import_path(name, option)
    if isinstance(weight, type):
        weight = weight(**kwargs)
    elif kwargs:
        weight = functools.partial(weight, **kwargs)
    return as_length_weight(weight) if option == "length_weight" else as_token_weight(weight)


def import_path(path: str, option: str) -> Any:
    """Import an object by its dotted path, from the current directory too; a `ValueError` names the option."""
    module, _, name = path.rpartition(".")
    sys.path += [] if os.getcwd() in sys.path else [os.getcwd()]
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # importing a user's module may raise anything
        raise ValueError(
            f"{option}={path!r} cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})."
        ) from error


def check_weights(
    name: str, weights: Any, shape: torch.Size, where: torch.Tensor, *, zero: bool = False
) -> torch.Tensor:
    """
    Check what a user's function returned: floating weights of `shape`, finite and > 0 (>= 0 with `zero`) at `where`.

    Values are looked at on the CPU only. On other devices the look would force a synchronisation.
    """
    if not isinstance(weights, torch.Tensor) or weights.shape != shape or not weights.is_floating_point():
        raise ValueError(f"{name} must return floating weights of shape {tuple(shape)}, got {kind(weights)}.")
    if weights.device.type == "cpu":
        values = weights.detach()[where]
        wrong = values[~(values.isfinite() & ((values >= 0) if zero else (values > 0)))]
        if wrong.numel():
            raise ValueError(f"{name} must return finite weights {'>=' if zero else '>'} 0, got {wrong[0].item()}.")
    return weights


def _with_own_name(given: Any, member: Any, members: dict[str, Any]) -> Any:
    if not member.name or not isinstance(member, members.get(member.name, object)):
        raise ValueError(
            f"{type(given).__name__} needs a name of its own, got name={member.name!r}: set its class attribute "
            "`name` to one that no built-in weight has."
        )
    if member is not given and isinstance(given, LengthWeight | TokenWeight):  # what its class says beside the call
        vars(member).update(
            (name, getattr(given, name))
            for name in ("formula", "source", "check", "has_scope", "bounds")
            if getattr(given, name, "") != ""
        )
    return member


def _fill_empty_rows(rows: ResponseRows) -> torch.Tensor:
    """Lengths with the group's mean in place of 0: neutral to a mean, and no division by zero."""
    mean = group_mean(rows.lengths, rows.has_tokens)
    everyones = one_where_zero(rows.lengths.sum() / one_where_zero(rows.has_tokens.sum()))  # for a group without any
    return torch.where(rows.has_tokens, rows.lengths, torch.where(mean > 0, mean, everyones))


def _name_of(function: Any) -> str:
    """
    The name for logs, the model card and `lambda.json`: a member's `name`, else module and qualified name. A
    `functools.partial` shows what it fixes too, since another value is another weight.
    """
    if isinstance(function, functools.partial):
        fixed = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"{_name_of(function.func)}({', '.join(fixed)})"
    if isinstance(function, LengthWeight | TokenWeight):
        return function.name
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _named_arguments(function: Any, accepted: tuple[str, ...]) -> tuple[str, ...]:
    """The arguments of `accepted` that a function names and that a partial has not fixed."""
    if not callable(function) or isinstance(function, type):
        raise ValueError(f"a weight must be a function or an object with __call__, got {function!r}.")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError) as error:  # compiled functions, such as torch.sigmoid
        raise ValueError(
            f"{_name_of(function)} hides its arguments, or does not take a fixed one: wrap it in a Python function."
        ) from error
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in fixed]
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    names = tuple(p.name for p in by_name if p.name in accepted)
    if not names or set(required) - set(names) - set(fixed):
        raise ValueError(
            f"{_name_of(function)} requires {', '.join(required) or 'nothing'}. A weight is called by name with any "
            f"of: {', '.join(accepted)}."
        )
    return names
