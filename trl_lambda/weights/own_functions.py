"""Weights of the user's own: a function or object, inspected once when it is wrapped, called by argument name."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .members import LENGTH_WEIGHTS, TOKEN_WEIGHTS, LengthWeight, TokenWeight
from .rows import SCORED_STATISTICS, ResponseRows, TokenRows, group_mean, kind, one_where_zero

STATISTICS = (*SCORED_STATISTICS, "rewards")
LENGTH_ARGUMENTS = ("lengths", "advantages", "lam", *STATISTICS, "step")
TOKEN_ARGUMENTS = tuple(f.name for f in fields(TokenRows))


class OwnLengthWeight(LengthWeight):
    """A user's function of named arguments as a member. It has a λ if it names `lam`."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.arguments = _named_arguments(function, LENGTH_ARGUMENTS)
        self.name = self.formula = _name_of(function)
        self.has_lambda = "lam" in self.arguments
        self.needs = tuple(name for name in STATISTICS if name in self.arguments)

    def __call__(self, rows: ResponseRows, lam: Tensor | None) -> Tensor:
        known = {**rows.statistics, "advantages": rows.advantages, "lengths": _fill_empty_rows(rows)}
        if missing := [name for name in self.arguments if name in known and known[name] is None]:
            raise ValueError(f"{self.name} requires {missing[0]} per response, and the batch has them per token.")
        prompts = [slice(None)] if rows.dim == (0, 1) else [slice(p, p + 1) for p in range(rows.lengths.size(0))]
        weights = []
        for part in prompts:
            # Copies: a function that writes into an argument changes nothing else.
            given: dict[str, Any] = {name: known[name][part].clone() for name in self.arguments if name in known}
            given |= {"lam": lam if lam is None else lam.reshape(()), "step": rows.step}
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

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.arguments = _named_arguments(function, TOKEN_ARGUMENTS)
        self.name = self.formula = _name_of(function)

    def __call__(self, rows: TokenRows) -> Tensor:
        given = {name: getattr(rows, name) for name in self.arguments}
        return self.function(**{n: x.clone() if isinstance(x, Tensor) else x for n, x in given.items()})


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
                accepted = f"numbers for: {', '.join(own) or 'nothing'}"
                raise ValueError(f"{option}_kwargs has {key!r}: {value!r}; {name!r} accepts {accepted}.")
        return members[name](**kwargs, **{f.name: options[f.name] for f in fields(members[name]) if f.name in options})
    if "." not in name:
        accepted = f"{', '.join(members)}, a dotted path to a function, or None"
        raise ValueError(f"{option}={name!r} is unknown; accepted: {accepted}.")
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
        text = " ".join(str(error).split())
        raise ValueError(f"{option}={path!r} cannot be imported ({type(error).__name__}: {text}).") from error


def check_weights(name: str, weights: Any, shape: torch.Size, where: Tensor, *, zero: bool = False) -> Tensor:
    """
    Check what a user's function returned: floating weights of `shape`, finite and > 0 (>= 0 with `zero`) at `where`.

    Values are looked at on the CPU only. On other devices the look would force a synchronisation.
    """
    if not isinstance(weights, Tensor) or weights.shape != shape or not weights.is_floating_point():
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
    return member


def _fill_empty_rows(rows: ResponseRows) -> Tensor:
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
        raise ValueError(f"{_name_of(function)} hides its arguments: wrap it in a Python function.") from error
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
