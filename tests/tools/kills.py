"""
Named events at which a training process kills itself, with SIGKILL, as a machine that goes away would.

An event is a callback of `Trainer` or the writing of a file by its name, so that it is certain to come, whatever the
speed of the machine. A marker file, written just before the end, tells that it came.
"""

import builtins
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


@dataclass
class Kill:
    """The end of this process while `trainer.state.global_step` is `step`, if its rank is `rank`."""

    trainer: Any
    event: str
    step: int
    marker: str  # path of a file
    rank: int

    @property
    def is_due(self) -> bool:
        return self.trainer.state.global_step == self.step and self.trainer.accelerator.process_index == self.rank

    def now(self) -> None:
        Path(self.marker).write_text(self.event)
        os.kill(os.getpid(), signal.SIGKILL)


def kill_at(trainer, event: str, step: int, marker: str, rank: int) -> None:
    """Let this process die at `event` of EVENTS. Call it last: a callback goes before all others."""
    EVENTS[event](Kill(trainer, event, step, marker, rank))


def at_callback(name: str) -> Callable[[Kill], None]:
    """When `Trainer` calls the method `name` of its callbacks, before any of them has run."""

    def arm(kill: Kill) -> None:
        callback = TrainerCallback()
        setattr(callback, name, lambda *args, **kwargs: kill.now() if kill.is_due else None)
        kill.trainer.callback_handler.callbacks.insert(0, callback)

    return arm


def before_writing(name: str) -> Callable[[Kill], None]:
    """When `name`, or a temporary file whose name begins so, is about to be opened: nothing of it is on the disk."""

    def arm(kill: Kill) -> None:
        def open_or_die(path, *args, **kwargs):
            if kill.is_due:
                kill.now()
            return opened(path, *args, **kwargs)

        opened = replace_open(name, open_or_die)

    return arm


def halfway_through(name: str) -> Callable[[Kill], None]:
    """When the first half of `name`, or of a temporary file whose name begins so, is on the disk."""

    def arm(kill: Kill) -> None:
        def open_to_die(path, *args, **kwargs):
            file = opened(path, *args, **kwargs)

            def end() -> None:
                type(file).flush(file)
                if size := os.path.getsize(path):
                    os.truncate(path, size // 2)
                    kill.now()

            if kill.is_due:
                file.flush = file.close = end  # the end of a `with` calls `close`
            return file

        opened = replace_open(name, open_to_die)

    return arm


def replace_open(name: str, replacement: Callable) -> Callable:
    """Let `replacement` open every file whose name begins with `name` for writing; returns the real `open`."""
    real = builtins.open

    def watched(file, mode="r", *args, **kwargs):
        is_meant = isinstance(file, str | os.PathLike) and Path(file).name.startswith(name) and set(mode) & set("wxa+")
        return (replacement if is_meant else real)(file, mode, *args, **kwargs)

    builtins.open = io.open = watched  # `Path.write_text` knows the second
    return real


EVENTS = {
    "between two micro-batches": at_callback("on_substep_end"),
    "optimizer stepped, λ not finished": at_callback("on_optimizer_step"),
    "model written, lambda.json not begun": before_writing("lambda.json"),
    "half of lambda.json": halfway_through("lambda.json"),
    "half of lambda_optimizer.json": halfway_through("lambda_optimizer.json"),
    "lambda.json written, trainer_state.json not begun": before_writing("trainer_state.json"),
    "half of trainer_state.json": halfway_through("trainer_state.json"),
    "checkpoint written": at_callback("on_save"),
}
