"""Named events at which a training process kills itself with SIGKILL; a marker file tells that one came."""

import os
import signal
from pathlib import Path

from transformers import TrainerCallback, TrainerState

# Event -> the callback's method that it happens in; `None`: a checkpoint is written, but for `trainer_state.json`.
EVENTS = {
    "between two micro-batches": "on_substep_end",
    "optimizer stepped": "on_optimizer_step",
    "no trainer_state.json": None,
    "checkpoint written": "on_save",
}


def kill_at(trainer, event: str, step: int, marker: str, rank: int) -> None:
    """Let the process of `rank` die at `event` while `global_step` is `step`. Call it after all other callbacks."""

    def die_if_due(*args, **kwargs) -> None:
        if trainer.state.global_step == step and trainer.accelerator.process_index == rank:
            Path(marker).write_text(event)
            os.kill(os.getpid(), signal.SIGKILL)

    if EVENTS[event] is None:
        save = TrainerState.save_to_json
        TrainerState.save_to_json = lambda *args: (die_if_due(), save(*args))
        return
    callback = TrainerCallback()
    setattr(callback, EVENTS[event], die_if_due)
    trainer.callback_handler.callbacks.insert(0, callback)
