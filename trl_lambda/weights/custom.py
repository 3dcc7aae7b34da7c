"""Functions of the user's as f and v: called with the arguments that they name, and checked by what they return."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .features import FEATURES
from .length_weight import LENGTH_WEIGHTS, LengthWeight
from .tensors import kind
from .token_weight import TOKEN_WEIGHTS, TokenWeight

USERS = "the user's"  # the source of a weight that no paper or project has
# What a length weight may name among its arguments; see `LengthWeight`.
LENGTH_ARGUMENTS = ("lengths", "advantages", "lam", "has_tokens", "dim", "features", *FEATURES)
# What `**kwargs` get unasked: who names another one is called in another way by it.
_KWARGS = ("lengths", "advantages")


class FunctionLengthWeight(LengthWeight):
    """A function of the user's as a member: `name` is the function's, and it has a λ if it names `lam`."""

    source = USERS

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.name = self.formula = function_name(function)
        self.takes = named_arguments(function, LENGTH_ARGUMENTS, to_kwargs=_KWARGS)
        self.has_lambda = "lam" in self.takes

    def __call__(self, **known: Any) -> Tensor:
        return self.function(**known)


class FunctionTokenWeight(TokenWeight):
    """A function of the user's as a member, under its own name."""

    source = USERS

    def __init__(self, function: Callable[..., Tensor]) -> None:
        if "probs" not in named_arguments(function, ("probs",), to_kwargs=("probs",)):
            raise ValueError(f"{function_name(function)} must take probs, the probabilities that it weighs by.")
        self.function = function
        self.name = self.formula = function_name(function)

    def __call__(self, probs: Tensor) -> Tensor:
        return self.function(probs=probs)


def as_length_weight(weight: object) -> LengthWeight:
    """
    A member from what the trainer's `length_weight=` takes.

    Raises:
        `ValueError`: it is neither a `LengthWeight` nor a function whose arguments there are, or it names `lam` and
            says that it has no λ.
    """
    _refuse_class(weight, "length_weight")
    if not isinstance(weight, LengthWeight):
        return FunctionLengthWeight(weight)  # type: ignore[arg-type]  checked there
    if ("lam" in arguments_of(weight)) != weight.has_lambda:
        names = "names lam, and there is no λ" if not weight.has_lambda else "does not name lam, and there is a λ"
        raise ValueError(f"{function_name(weight)} {names}: set its has_lambda = {not weight.has_lambda}.")
    _check_name(weight, LENGTH_WEIGHTS)
    return weight


def as_token_weight(weight: object) -> TokenWeight:
    """A member from what the trainer's `token_weight=` takes; a `ValueError` if it is neither object nor function."""
    _refuse_class(weight, "token_weight")
    if not isinstance(weight, TokenWeight):
        return FunctionTokenWeight(weight)  # type: ignore[arg-type]  checked there
    _check_name(weight, TOKEN_WEIGHTS)
    return weight


def _refuse_class(weight: object, option: str) -> None:
    if isinstance(weight, type):
        raise ValueError(f"{option}={weight.__name__} is a class: pass an object, {weight.__name__}().")


def _check_name(weight: LengthWeight | TokenWeight, members: Mapping[str, type]) -> None:
    if not weight.name:
        raise ValueError(f"{function_name(weight)} has no name: set its class attribute name.")
    if type(weight) is not members.get(weight.name, type(weight)):
        raise ValueError(f"{function_name(weight)} has the name {weight.name!r} of another member: give it its own.")


def arguments_of(member: LengthWeight) -> tuple[str, ...]:
    """The arguments that a member is called with."""
    if isinstance(member, FunctionLengthWeight):
        return member.takes
    return named_arguments(member, LENGTH_ARGUMENTS, to_kwargs=_KWARGS)


def features_of(member: LengthWeight | None) -> tuple[str, ...]:
    """The features, beside length, that a member is called with or that its λ weighs."""
    if member is None:
        return ()
    wanted = {*member.lambda_features, *(member.takes if isinstance(member, FunctionLengthWeight) else ())}
    return tuple(name for name in FEATURES if name in wanted)


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
    function: Callable[..., Any], accepted: tuple[str, ...], to_kwargs: tuple[str, ...] = (), *, required: bool = False
) -> tuple[str, ...]:
    """
    The arguments that a function is to be called with: those of `accepted` that it names, and of them `to_kwargs` if
    it has `**kwargs`; with `required` only those that have no default.

    Raises:
        `ValueError`: it is not callable, is a class, hides its arguments, or requires one that there is not.
    """
    if not callable(function) or isinstance(function, type):
        found = f"the class {function.__name__}" if isinstance(function, type) else type(function).__name__
        raise ValueError(
            f"a weight must be a function or an object with __call__, got {found}. Built-in ones are named by "
            "aggregation and token_regulation; dotted paths are for the command line and YAML."
        )
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


def check_result(name: str, weights: object, shape: torch.Size, where: Tensor) -> Tensor:
    """
    What a function of the user's returned, if it is weights of `shape`; `where`, of that shape, is true at the entries
    that count.

    Raises:
        `ValueError`: it is no tensor of that shape, or an entry that counts is not finite and > 0. Values are looked
            at on the CPU; on other devices the look would force a synchronisation, and the weight is clamped instead.
    """
    if not isinstance(weights, Tensor) or weights.shape != shape or not weights.is_floating_point():
        raise ValueError(f"{name} must return floating weights of shape {tuple(shape)}, got {kind(weights)}.")
    if weights.device.type == "cpu":
        values = weights.detach()[where]
        wrong = values[~(values.isfinite() & (values > 0))]
        if wrong.numel():
            raise ValueError(f"{name} must return finite weights > 0, got {wrong[0].item()}.")
    return weights


def check_follows_lambda(name: str, weights: Tensor, lam: Tensor | None) -> None:
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
    Import a function by its dotted path, as the command line and YAML name it for `option`.

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
