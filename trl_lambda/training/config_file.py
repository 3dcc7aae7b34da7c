"""A recipe's YAML file, its values held against the options that they are for before the parser sees them."""

import types
from collections.abc import Iterable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list", dict: "a mapping"}


def check_config_file(path: str, dataclass_types: Iterable[type]) -> None:
    """
    Check that a YAML file can be read and that its values are of the types of the options that they are for.

    The parser converts text alone (`1e-6`, to PyYAML a text); a list for a number, or a number written as text inside
    a list, would get through to wherever it is used first.

    Args:
        path (`str`): The file.
        dataclass_types (`list[type]`): Where the options come from; a name that none has is left to the parser.

    Raises:
        ValueError: if the file cannot be read, is no mapping, or has a value that is not accepted.
    """
    try:
        with open(path) as file:  # as TrlParser does
            config = yaml.safe_load(file)
    except OSError as error:
        raise ValueError(f"--config cannot be read: {error}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"--config cannot be read: {path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config is {path!r}, which is no YAML mapping; accepted: lines of `option: value`.")
    hints = {name: hint for dataclass_type in dataclass_types for name, hint in get_type_hints(dataclass_type).items()}
    defaults = {name: getattr(kind, name, None) for kind in dataclass_types for name in get_type_hints(kind)}
    for name, value in config.items():
        if not isinstance(name, str):
            raise ValueError(f"--config {path!r} has an option called {name!r}; accepted: lines of `option: value`.")
        if name in hints and not (value is None and defaults[name] is None):
            check_value(name, value, hints[name])


def check_value(name: str, value: Any, hint: Any) -> None:
    """
    Check one value of a YAML file against the type of its option.

    Raises:
        ValueError: if the parser would pass on something that the option cannot be.
    """
    kinds = _kinds(hint)
    if Any in kinds:
        return
    accepted = " or ".join(dict.fromkeys(_NAMES[kind] for kind in kinds if kind in _NAMES))
    if isinstance(value, bool) and not kinds & {bool}:
        meant = f"YAML reads no, off, yes and on so: put it in quotes if it is meant as text; accepted: {accepted}"
        raise ValueError(f"{name} is {str(value).lower()}; {meant}.")
    # Text is what the parser converts, but to no list of numbers; one name may stand for a list of names, as in TRL.
    scalars = kinds & {bool, int, float, str} or _item_kinds(hint) & {str}
    fits = scalars if isinstance(value, str) else type(value) in kinds
    fits = fits or (isinstance(value, int) and float in kinds)
    if not fits:
        found = "empty" if value is None else f"{value!r:.80}"
        raise ValueError(f"{name} is {found}; accepted: {accepted}.")
    if type(value) is int and abs(value) >= 2**63:
        raise ValueError(f"{name} is an integer of {len(str(abs(value)))} digits; accepted: {accepted} below 2**63.")
    if isinstance(value, list):
        _check_items(name, value, hint)


def _check_items(name: str, values: list[Any], hint: Any) -> None:
    """Check what is in a list; there the parser converts nothing."""
    kinds = _item_kinds(hint)
    if not kinds or kinds & {Any, dict}:
        return
    for value in values:
        if type(value) in kinds or (type(value) is int and float in kinds):
            continue
        found = f"{value!r:.80}, which YAML reads as {_NAMES.get(type(value), 'nothing')}"
        example = ", such as 0.5 or 1.0e-3" if float in kinds else ""
        accepted = " or ".join(_NAMES[kind] for kind in kinds if kind in _NAMES)
        raise ValueError(f"{name} has {found}; accepted in this list: {accepted}{example}.")


def _item_kinds(hint: Any) -> set[Any]:
    """Return the plain types that may stand in the list that a hint accepts; none where it does not say."""
    lists = [get_args(part)[0] for part in _parts(hint) if get_origin(part) is list and get_args(part)]
    return set().union(*map(_kinds, lists))


def _parts(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, and what is none as its only member."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _kinds(hint: Any) -> set[Any]:
    """Return the plain types that a hint accepts; `Any` among them where it is not one of those."""
    kinds = set()
    for part in _parts(hint):
        origin = get_origin(part) or part
        if origin is Literal:
            kinds |= {type(value) for value in get_args(part)}
        elif isinstance(origin, type) and issubclass(origin, Enum):
            kinds.add(str)
        else:
            kinds.add(origin if origin in (*_NAMES, types.NoneType) else Any)
    return kinds
