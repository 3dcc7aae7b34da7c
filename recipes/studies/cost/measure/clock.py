"""Seconds: of a piece of code, and of two in turns. A device is waited for at both ends."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def now(device: str) -> float:
    """Seconds on a clock that stands still for nothing, after all that `device` (`"cpu"` or `"cuda"`) has queued."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(
    function: Callable[[], object], repeats: int, device: str, *, calls: int = 1, before: Callable[[], object] = bool
) -> list[float]:
    """
    Seconds of one call, `repeats` times.

    Args:
        function (`Callable`): what is timed; warm it up first.
        repeats (`int`): how many times.
        device (`str`): what is waited for.
        calls (`int`): timed together, where one takes microseconds.
        before (`Callable`): called before each, outside the time, such as a barrier.
    """
    taken = []
    for _ in range(repeats):
        before()
        start = now(device)
        for _ in range(calls):
            function()
        taken.append((now(device) - start) / calls)
    return taken


def in_turn(number: int, base: T, other: T) -> Sequence[T]:
    """Both sides of pair `number`; who goes first alternates, so that neither has the warmer machine."""
    return (base, other) if number % 2 else (other, base)
