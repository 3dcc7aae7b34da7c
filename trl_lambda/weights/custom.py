"""Functions of the user's as f and v: called with the arguments that they name, and checked by what they return."""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .tensors import kind

USERS = "the user's"  # the source of a weight that no paper or project has


def function_name(function: Callable[..., Any]) -> str:
    """
    What logs, the model card and `lambda.json` call a function: module and name, or the class of an object; of a
    `functools.partial` what it fixes too, since another value is another weight.
    """
    if isinstance(function, functools.partial):
        fixed = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"{function_name(function.func)}({', '.join(fixed)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def named_arguments(
    function: Callable[..., Any],
    accepted: tuple[str, ...],
    to_kwargs: tuple[str, ...] = (),
    *,
    required: bool = False,
) -> tuple[str, ...]:
    """
    The arguments that a function is to be called with.

    Args:
        function (`Callable`): A function or an object with `__call__`.
        accepted (`tuple[str, ...]`): names of all that there is.
        to_kwargs (`tuple[str, ...]`): those of them that one with `**kwargs` gets without naming them.
        required (`bool`, defaults to `False`): leave out those that have a default.

    Returns:
        `tuple[str, ...]`: those that it names, and what its `**kwargs` get.

    Raises:
        `ValueError`: it is not callable, is a class, hides its arguments, or requires one that there is not.
    """
    if not callable(function) or isinstance(function, type):
        found = f"the class {function.__name__}" if isinstance(function, type) else type(function).__name__
        raise ValueError(f"a weight must be a function or an object with __call__, got {found}.")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError) as error:  # compiled functions, such as torch.sigmoid
        raise ValueError(
            f"{function_name(function)} does not tell the names of its arguments: wrap it in a function that does."
        ) from error
    # Those that a partial fixes are no longer to be given.
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    names: list[str] = []
    for parameter in parameters:
        if required and parameter.default is not parameter.empty:
            continue
        if parameter.kind is parameter.VAR_KEYWORD and not required:
            names += [name for name in to_kwargs if name not in names and name not in fixed]
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.name in fixed:
            continue
        if parameter.name in accepted and parameter.kind is not parameter.POSITIONAL_ONLY:
            names.append(parameter.name)
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"{function_name(function)} requires {parameter.name!r}; a weight is called by name with any of: "
                f"{', '.join(accepted)}."
            )
    return tuple(names)


def check_result(name: str, weights: object, shape: torch.Size, where: torch.Tensor | None = None) -> torch.Tensor:
    """
    Check what a function of the user's returned.

    Args:
        name (`str`): The function's name.
        weights: What it returned.
        shape (`torch.Size`): What is needed.
        where (`torch.Tensor`, *optional*): bool, `shape`: the entries that count.

    Returns:
        `torch.Tensor`: `weights`.

    Raises:
        `ValueError`: it is no tensor of that shape, or an entry that counts is not finite and > 0. Values are looked
            at on the CPU; on other devices the look would force a synchronisation, and the weight is clamped instead.
    """
    if not isinstance(weights, torch.Tensor) or weights.shape != shape or not weights.is_floating_point():
        raise ValueError(f"{name} must return floating weights of shape {tuple(shape)}, got {kind(weights)}.")
    if weights.device.type == "cpu":
        values = weights.detach() if where is None else weights.detach()[where]
        wrong = values[~(values.isfinite() & (values > 0))]
        if wrong.numel():
            raise ValueError(f"{name} must return finite weights > 0, got {wrong[0].item()}.")
    return weights


def check_follows_lambda(name: str, weights: torch.Tensor, lam: torch.Tensor | None) -> None:
    """
    Raises:
        `ValueError`: λ learns, and autograd cannot reach it from `weights`: it would stay where it is, in silence.
    """
    if lam is not None and lam.requires_grad and torch.is_grad_enabled() and not weights.requires_grad:
        raise ValueError(
            f"{name} names lam, and its weights have no gradient in it: compute them from the tensor lam with torch, "
            "or set lambda_learnable=False."
        )


def import_function(path: str, option: str) -> Callable[..., Any]:
    """
    Import a function by its dotted path, as the command line and YAML name it.

    Args:
        path (`str`): `package.module.function`.
        option (`str`): The option it was given to, for messages.

    Raises:
        `ValueError`: there is no such module or name, or it is not callable.
    """
    module, _, name = path.rpartition(".")
    if not (module and name) or module.startswith("."):
        raise ValueError(f"{option}={path!r} is no dotted path; accepted: package.module.function.")
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever importing a user's module raises
        text = " ".join(str(error).split())
        raise ValueError(f"{option}={path!r} cannot be imported ({type(error).__name__}: {text}).") from error
    if not callable(function):
        raise ValueError(f"{option}={path!r} is no function; accepted: a dotted path, package.module.function.")
    return function
