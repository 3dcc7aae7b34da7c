"""Weights of the user's own: a function or object, inspected once when it is wrapped, called by argument name."""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .features import SCORED_STATISTICS
from .length_weight import LENGTH_WEIGHTS, LengthWeight
from .rows import ResponseRows, TokenRows, group_mean, kind, listing, one_where_zero
from .token_weight import TOKEN_WEIGHTS, TokenWeight

STATISTICS = (*SCORED_STATISTICS, "rewards")
LENGTH_ARGUMENTS = ("lengths", "advantages", "lam", *STATISTICS, "step")
TOKEN_ARGUMENTS = ("probs", "advantages", "entropies", "old_logps", "mask", "lengths", "step")


class OwnLengthWeight(LengthWeight):
    """A user's function of named arguments as a member. It has a λ if it names `lam`."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.arguments = _named_arguments(function, LENGTH_ARGUMENTS)
        self.name = _name_of(function)
        self.formula = getattr(function, "formula", "") or self.name
        self.source = getattr(function, "source", self.source)
        self.has_lambda = "lam" in self.arguments
        self.needs = tuple(name for name in STATISTICS if name in self.arguments)

    def __call__(self, rows: ResponseRows, lam: Tensor | None) -> Tensor:
        if rows.dim == (0, 1):
            return self._call(rows, lam)
        return torch.cat([self._call(rows, lam, slice(p, p + 1)) for p in range(rows.lengths.size(0))])

    def _call(self, rows: ResponseRows, lam: Tensor | None, prompts: slice = slice(None)) -> Tensor:
        given: dict[str, Any] = {"lam": lam if lam is None else lam.reshape(()), "step": rows.step}
        for name in set(self.arguments) - set(given):
            values = rows.statistics.get(name, rows.advantages)
            if name == "lengths":
                values = _fill_empty_rows(rows)
            if values is None:
                raise ValueError(f"{self.name} requires one advantage per response, and the batch has one per token.")
            given[name] = values[prompts].clone()  # a function that writes into it changes its copy alone
        weights = self.function(**{name: given[name] for name in self.arguments})
        if lam is not None and lam.requires_grad and torch.is_grad_enabled() and not weights.requires_grad:
            raise ValueError(
                f"{self.name} names lam, and its weights have no gradient in it. Compute them from the tensor lam "
                "with torch, or set lambda_learnable=False."
            )
        return check_weights(self.name, weights, rows.lengths[prompts].shape, rows.has_tokens[prompts], zero=False)


class OwnTokenWeight(TokenWeight):
    """A user's function of named arguments as a member."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.arguments = _named_arguments(function, TOKEN_ARGUMENTS)
        self.name = _name_of(function)
        self.formula = getattr(function, "formula", "") or self.name
        self.source = getattr(function, "source", self.source)

    def __call__(self, rows: TokenRows) -> Tensor:
        given = {name: getattr(rows, name) for name in self.arguments}
        return self.function(**{n: x.clone() if isinstance(x, Tensor) else x for n, x in given.items()})


def as_length_weight(weight: object) -> LengthWeight:
    """
    Make a member of what `length_weight=` takes: a function, a partial, an object or a [`LengthWeight`].

    Raises:
        `ValueError`: it cannot be called by the names of `LENGTH_ARGUMENTS`, or has the name of a built-in member.
    """
    return _as_member(weight, LengthWeight, OwnLengthWeight, LENGTH_WEIGHTS, {"rows", "lam"})


def as_token_weight(weight: object) -> TokenWeight:
    """Make a member of what `token_weight=` takes, as `as_length_weight` does for f."""
    return _as_member(weight, TokenWeight, OwnTokenWeight, TOKEN_WEIGHTS, {"rows"})


def _as_member(weight: Any, base: type, wrapper: type, members: dict[str, Any], fixed_call: set[str]) -> Any:
    if isinstance(weight, base):
        if not weight.name:
            raise ValueError(f"{type(weight).__name__} has no name: set its class attribute name.")
        if not isinstance(weight, members.get(weight.name, object)):
            raise ValueError(f"{type(weight).__name__}.name={weight.name!r} is a built-in member's: choose another.")
        if set(inspect.signature(weight).parameters) == fixed_call:
            return weight
    return wrapper(weight)


def weight_from_name(
    name: str, kwargs: dict[str, Any] | None, options: dict[str, Any], members: dict[str, Any], field_name: str
) -> Any:
    """
    The member that a config field names, with its parameters.

    Args:
        name (`str`): a member's name, or a dotted path to a function, an object or a class.
        kwargs (`dict`, *optional*): parameters of the member; a function is called with them by name.
        options (`dict`): parameters that have a config field of their own.
        members (`dict`): the table of members.
        field_name (`str`): `"length_weight"` or `"token_weight"`, for messages.

    Raises:
        `ValueError`: unknown name or parameter, or the path cannot be imported.
    """
    kwargs = kwargs or {}
    as_member = as_length_weight if field_name == "length_weight" else as_token_weight
    if name in members:
        own = {f.name for f in fields(members[name]) if "config" not in f.metadata}
        if unknown := sorted(set(kwargs) - own):
            accepted = f"accepted: {listing(sorted(own))}" if own else f"{field_name}={name!r} has none"
            raise ValueError(f"{field_name}_kwargs has {unknown[0]!r}; {accepted}.")
        for key, value in kwargs.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{field_name}_kwargs[{key!r}]={value!r} must be a number.")
        from_fields = {f.name: options[f.name] for f in fields(members[name]) if f.name in options}
        return members[name](**kwargs, **from_fields)
    if "." not in name:
        raise ValueError(
            f"{field_name}={name!r} is unknown; accepted: {listing(members)}, a dotted path to a function, or None."
        )
    weight = import_path(name, field_name)
    try:
        if isinstance(weight, type):
            return as_member(weight(**kwargs))
        return as_member(functools.partial(weight, **kwargs) if kwargs else weight)
    except TypeError as error:  # the user's class or function does not take these kwargs
        raise ValueError(f"{field_name}={name!r} does not take {field_name}_kwargs={kwargs}: {error}.") from error


def import_path(path: str, option: str) -> Any:
    """Import an object by its dotted path, from the current directory too; a `ValueError` names the option."""
    module, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # importing a user's module may raise anything
        text = " ".join(str(error).split())
        raise ValueError(f"{option}={path!r} cannot be imported ({type(error).__name__}: {text}).") from error


def check_weights(name: str, weights: object, shape: torch.Size, where: Tensor, *, zero: bool) -> Tensor:
    """
    Check what a user's function returned: floating weights of `shape`, finite and > 0 (>= 0 with `zero`) at `where`.

    Values are looked at on the CPU only. On other devices the look would force a synchronisation.
    """
    if not isinstance(weights, Tensor) or weights.shape != shape or not weights.is_floating_point():
        raise ValueError(f"{name} must return floating weights of shape {tuple(shape)}, got {kind(weights)}.")
    if weights.device.type == "cpu":
        values = weights.detach()[where.expand(shape)]
        right = values.isfinite() & ((values >= 0) if zero else (values > 0))
        if not right.all():
            sign = ">= 0" if zero else "> 0"
            raise ValueError(f"{name} must return finite weights {sign}, got {values[~right][0].item()}.")
    return weights


def _fill_empty_rows(rows: ResponseRows) -> Tensor:
    """Lengths with the group's mean in place of 0: neutral to a mean, and no division by zero."""
    mean = group_mean(rows.lengths, rows.has_tokens)
    everyones = one_where_zero(rows.lengths.sum() / one_where_zero(rows.has_tokens.sum()))  # for a group without any
    return torch.where(rows.has_tokens, rows.lengths, torch.where(mean > 0, mean, everyones))


def _name_of(function: Any) -> str:
    """
    The name for logs, the model card and `lambda.json`: an object's `name`, else module and qualified name. A
    `functools.partial` shows what it fixes too, since another value is another weight.
    """
    if isinstance(function, functools.partial):
        fixed = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"{_name_of(function.func)}({', '.join(fixed)})"
    if isinstance(name := getattr(function, "name", None), str) and name:
        return name
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _named_arguments(function: Any, accepted: Iterable[str]) -> tuple[str, ...]:
    """The arguments of `accepted` that a function names and that a partial has not fixed."""
    if not callable(function) or isinstance(function, type):
        found = function.__name__ if isinstance(function, type) else type(function).__name__
        raise ValueError(f"a weight must be a function or an object with __call__, got {found}.")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError) as error:  # compiled functions, such as torch.sigmoid
        raise ValueError(f"{_name_of(function)} hides its arguments: wrap it in a Python function.") from error
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    names = []
    for parameter in parameters:
        if parameter.name in fixed or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.name in accepted and parameter.kind is not parameter.POSITIONAL_ONLY:
            names.append(parameter.name)
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"{_name_of(function)} requires {parameter.name!r}. A weight is called by name with any of: "
                f"{', '.join(accepted)}."
            )
    if not names:
        raise ValueError(f"{_name_of(function)} names none of: {', '.join(accepted)}.")
    return tuple(names)
