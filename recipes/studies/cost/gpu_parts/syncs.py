"""
No wait for the device of ours in the loss: CUDA's sync debug mode as an error wherever the package's own code runs.

TRL's loss waits for the device by itself, about a dozen times, so that the mode cannot be an error around all of it.
Every method of the trainer that the package defines switches it on, every other one off.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

PACKAGE = "trl_lambda"


def set_sync_mode(mode: str, device: str) -> None:
    """`torch.cuda.set_sync_debug_mode` (`"default"` or `"error"`); nothing where there is no such device."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def errors_in_ours(
    trainer: Any, set_mode: Callable[[str, str], None] = set_sync_mode, package: str = PACKAGE
) -> Iterator[dict[str, int]]:
    """
    While the block runs, a wait for the device raises in the package's own methods, and in theirs alone.

    Args:
        trainer: Any trainer; one of another package has no method in which waiting raises.
        set_mode (`Callable`): given the mode and the kind of device.
        package (`str`): whose methods are watched.

    Returns:
        `dict[str, int]`: how often each of the package's methods was entered.
    """
    device = trainer.accelerator.device.type
    entered: dict[str, int] = {}
    modes = ["default"]

    def watched(function: Callable[..., Any], name: str, ours: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if ours:
                entered[name] = entered.get(name, 0) + 1
            modes.append("error" if ours else "default")
            set_mode(modes[-1], device)
            try:
                return function(*args, **kwargs)
            finally:
                modes.pop()
                set_mode(modes[-1], device)

        return call

    replaced: list[tuple[type, str, Any]] = []
    try:
        for kind in type(trainer).__mro__[:-1]:
            for name, member in list(vars(kind).items()):
                if inspect.isfunction(member) and not name.startswith("__"):
                    replaced.append((kind, name, member))
                    ours = member.__module__.split(".")[0] == package
                    setattr(kind, name, watched(member, name, ours))
        yield entered
    finally:
        for kind, name, member in replaced:
            setattr(kind, name, member)
        set_mode("default", device)
