"""Whether a checkpoint folder was written to its end, and which one before it was."""

import os
import re
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE_FILE = "trainer_state.json"


def check_whole(folder: str | os.PathLike[str]) -> None:
    """
    Refuse a checkpoint that was cut short: `Trainer` names the folder first and writes `trainer_state.json` last.

    Where that is missing or damaged, a `ValueError` names the checkpoint to resume from instead.
    """
    folder = Path(folder)
    if not folder.is_dir() or (fault := _fault(folder)) is None:  # what is no folder, transformers refuses itself
        return
    previous = _whole_before(folder)
    instead = (
        "There is no whole checkpoint before it: delete the folder and train from the start."
        if previous is None
        else f"Resume from the one before, resume_from_checkpoint={str(previous)!r}, or delete the folder."
    )
    raise ValueError(
        f"{folder / STATE_FILE} is {fault}. It is written last: the run was stopped while it wrote this checkpoint, "
        f"or the folder was not copied whole. {instead}"
    )


def _fault(folder: Path) -> str | None:
    path = folder / STATE_FILE
    if not path.is_file():
        return "missing"
    try:
        TrainerState.load_from_json(str(path))
    except (ValueError, TypeError, RecursionError) as error:
        return f"damaged ({type(error).__name__}: {error})"
    return None


def _step(folder: Path) -> int | None:
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
    return None if match is None else int(match.group(1))


def _whole_before(folder: Path) -> Path | None:
    """The newest whole checkpoint beside `folder` with fewer steps."""
    if (step := _step(folder)) is None:
        return None
    steps = {path: n for path in folder.parent.iterdir() if path.is_dir() and (n := _step(path)) is not None}
    beside = [path for path, n in steps.items() if n < step and _fault(path) is None]
    return max(beside, key=lambda path: steps[path], default=None)
