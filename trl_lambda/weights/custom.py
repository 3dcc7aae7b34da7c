"""Functions of the user's as f and v: called with the arguments that they name, and checked by what they return."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .tensors import kind


def function_name(function: Callable[..., Any]) -> str:
    """What logs, the model card and `lambda.json` call a function: module and name, or the class of an object."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def named_arguments(
    function: Callable[..., Any], accepted: tuple[str, ...], *, required: bool = False
) -> tuple[str, ...]:
    """
    The arguments that a function is to be called with.

    Args:
        function (`Callable`): A function or an object with `__call__`.
        accepted (`tuple[str, ...]`): names of all that there is.
        required (`bool`, defaults to `False`): leave out those that have a default.

    Returns:
        `tuple[str, ...]`: those that it names; all, for one that takes `**kwargs`.

    Raises:
        `ValueError`: it is not callable, or requires an argument that there is not.
    """
    if not callable(function):
        raise ValueError(f"a weight must be a function or an object with __call__, got {type(function).__name__}.")
    names = []
    for parameter in inspect.signature(function).parameters.values():
        if required and parameter.default is not parameter.empty:
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            return () if required else accepted
        if parameter.kind is parameter.VAR_POSITIONAL:
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
    try:
        function = getattr(importlib.import_module(module), name) if module and name else None
    except Exception as error:  # whatever importing a user's module raises
        text = " ".join(str(error).split())
        raise ValueError(f"{option}={path!r} cannot be imported ({type(error).__name__}: {text}).") from error
    if not callable(function):
        raise ValueError(f"{option}={path!r} is no function; accepted: a dotted path, package.module.function.")
    return function
