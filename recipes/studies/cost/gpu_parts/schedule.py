"""Parts, their steps and their time: a row is on disk once measured, and a part that is out of time says so."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.studies.cost.measure.rows import append, row

Rows = list[dict[str, Any]]


@dataclass
class Context:
    """
    What a step is given.

    Args:
        device (`str`): `"cuda"`, or `"cpu"` where the device is set aside.
        tiny (`bool`): the smallest sizes, which only show that every line runs.
        folder (`Path`): for what a step needs on disk; it does not outlive the command.
        results (`Path`): the folder of the CSV file, for what does.
        ends (`float`): when the part has to stop, on the clock of `time.monotonic`.
    """

    device: str
    tiny: bool
    folder: Path
    results: Path
    ends: float = float("inf")

    def time_is_up(self) -> bool:
        return time.monotonic() >= self.ends


# A step's name in the rows, and what yields its rows as they come.
Step = tuple[str, Callable[[Context], Iterator[Rows]]]


@dataclass(frozen=True)
class Part:
    """
    Args:
        name (`str`): the rows' `bench`.
        minutes (`float`): after which no new row is begun.
        steps (`Sequence[Step]`): in their order.
    """

    name: str
    minutes: float
    steps: Sequence[Step]


def run_part(part: Part, context: Context, out: Path) -> list[str]:
    """
    Run the steps of a part and append their rows.

    A step that fails leaves a row that says how, and the next one runs. When the part's time is up, nothing new is
    begun, and a row says what is missing.

    Args:
        part (`Part`): which.
        context (`Context`): its `ends` is set here.
        out (`Path`): CSV file to append to.

    Returns:
        `list[str]`: the names of the steps that failed.
    """
    began = time.monotonic()
    context.ends = began + 60 * part.minutes
    failed, missing = [], []
    for name, step in part.steps:
        if context.time_is_up():
            missing.append(name)
            continue
        start = time.monotonic()
        try:
            for rows in step(context):
                append(out, rows, context.device)
        except Exception as error:
            failed.append(name)
            message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            append(out, [row(part.name, name, "", "failed", message, "")], context.device)
        if context.time_is_up():
            missing.append(f"the rest of {name}")
        append(out, [row(part.name, name, "", "time of the step", time.monotonic() - start, "s")], context.device)
        free_memory(context.device)
    if missing:
        what = f"after {part.minutes:g} minutes, without {', '.join(missing)}"
        append(out, [row(part.name, "", "", "stopped", what, "")], context.device)
    append(out, [row(part.name, "", "", "time of the part", time.monotonic() - began, "s")], context.device)
    return failed


def free_memory(device: str) -> None:
    """Give back what a step no longer holds, so that the next one has the whole device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
