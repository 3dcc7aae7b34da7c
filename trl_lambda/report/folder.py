"""A run read from its output folder: what `Trainer` wrote there, what TensorBoard wrote, and which run is meant."""

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..preference.files import read_lambda_file
from ..weights import SIDES
from .history import LogHistory, RunLog, check_history, readable_history

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"
_DATED = re.compile(r"\S+_\d\d-\d\d-\d\d_")  # Trainer's folder of one session's event files: runs/Nov20_13-37-00_host
_LISTED = 10  # runs named in a message


def read_log_history(folder: str | Path) -> LogHistory:
    """
    Read what a finished or a running run has logged from its output folder.

    Args:
        folder (`str` or `Path`):
            Holds `trainer_state.json`, itself or in its newest `checkpoint-N` that is whole, or TensorBoard's event
            files, which are read where they have come further (needs tensorboard).

    Returns:
        `list[dict]`: one entry per logged step, as in `trainer.state.log_history`.

    Raises:
        ValueError: if there is no such file, all are damaged or hold no log history, or there are several runs below
            the folder.
    """
    folder = Path(folder)
    own, checkpoints = [path for path in [folder / _STATE] if path.is_file()], _checkpoint_states(folder)
    histories, damaged = [], []
    for newest_first in (own, checkpoints):
        for path in newest_first:
            try:
                histories.append(_read_state(path))
                break
            except ValueError as error:
                damaged.append(error)
    histories += _read_events(folder, is_run=bool(own or checkpoints))
    if not histories and damaged:
        raise damaged[0]
    if not histories:
        raise ValueError(
            f"run is {str(folder)!r}, where no trainer_state.json is, nor in a checkpoint-N in it, and no event file."
        )
    for error in damaged:
        logger.warning("read without it, from what else the folder holds: %s", " ".join(str(error).split()))
    return max(histories, key=lambda history: max((entry["step"] for entry in history), default=-1))


def read_run(folder: str | Path) -> RunLog:
    """
    Read a run from its output folder: its log history, and the member of f from `lambda.json` if it is there.

    Raises:
        ValueError: as for `read_log_history`.
    """
    folder = Path(folder)
    history = read_log_history(folder)
    title, member, length_scale, side = folder.resolve().name, None, 1 / 9, "both"
    for candidate in (folder, *(state.parent for state in _checkpoint_states(folder))):
        if not (candidate / "lambda.json").is_file():
            continue
        try:
            content = read_lambda_file(candidate)
            scale = float(content.get("length_scale") or length_scale)
            if not 0 < scale < 1:
                raise ValueError(f"{candidate / 'lambda.json'} is damaged (length_scale = {scale}).")
            member, length_scale = content["aggregation"], scale
            saved = content.get("lambda_side")
            side = str(saved) if saved in SIDES else "both"
            title = f"{title}: aggregation={member}"
            break
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            logger.warning("no picture of the length weight from this file: %s", " ".join(str(error).split()))
    return RunLog(history, title, member, length_scale, side)


def _checkpoint_states(folder: Path) -> list[Path]:
    """Return the state files of the checkpoints in `folder`, the one with the highest step first."""
    states = [path for path in folder.glob(f"checkpoint-*/{_STATE}") if _step_of(path) >= 0]
    return sorted(states, key=_step_of, reverse=True)


def _step_of(state_file: Path) -> int:
    """Return N of `checkpoint-N/trainer_state.json`, or -1 where N is not a number."""
    number = state_file.parent.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _read_state(state_file: Path) -> LogHistory:
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
    except (
        ValueError,
        RecursionError,
    ) as error:  # not UTF-8, not JSON, nested without end: cut short, or not Trainer's
        raise ValueError(f"{state_file} is damaged: {error}.") from error
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise ValueError(f"{state_file} holds no log_history; accepted is a file that Trainer wrote.")
    try:
        check_history(state["log_history"])
    except ValueError as error:
        raise ValueError(f"{state_file} is damaged: {error}") from error
    return readable_history(state["log_history"])


def _read_events(folder: Path, is_run: bool) -> list[LogHistory]:
    """
    Read TensorBoard's event files under `folder`; empty where there is none, or no tensorboard to read it with.

    Raises:
        ValueError: if `folder` is not itself a run (`is_run`) and there are several below it.
    """
    files: dict[Path, list[Path]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        files.setdefault(_run_of(file, folder), []).append(file)
    if is_run:
        files = {run: of_run for run, of_run in files.items() if run == folder}
    histories = {run: history for run, of_run in files.items() if (history := _read_event_files(of_run))}
    runs = set(histories) | (set() if is_run else _runs_by_state(folder))
    if len(runs) > 1:
        names = sorted(str(run.relative_to(folder)) for run in runs)
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        raise ValueError(
            f"run is {str(folder)!r}, below which there are {len(names)} runs: {', '.join(names[:_LISTED])}{more}; "
            "accepted: the folder of one of them."
        )
    return list(histories.values())


def _runs_by_state(folder: Path) -> set[Path]:
    """Return the folders below `folder` that hold a state file, themselves or in a checkpoint."""
    holders = (path.parent for path in folder.rglob(_STATE))
    return {holder.parent if holder.name.startswith("checkpoint-") else holder for holder in holders}


def _run_of(file: Path, folder: Path) -> Path:
    """Return the run, `folder` or one below it, that an event file belongs to."""
    above = [parent for parent in file.parents if parent == folder or folder in parent.parents]
    for parent in above:
        if (parent / _STATE).is_file() or _checkpoint_states(parent):
            return parent
    if file.parent.parent.name == "runs" and _DATED.match(file.parent.name):
        return (
            above[2] if len(above) > 2 else folder
        )  # every session of a run that was resumed has a folder of its own
    return file.parent


def _read_event_files(files: Iterable[Path]) -> LogHistory:
    """Read what `Trainer` sent to TensorBoard as a log history; what a later file says of a step goes before."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return []
    entries: dict[tuple[int, int], dict[str, Any]] = {}
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for place, entry in _entries_of(events).items():
            entries[place] = entries.get(place, {}) | entry
    history = [entries[place] for place in sorted(entries)]
    check_history(history)
    return readable_history(history)


def _entries_of(events: Any) -> dict[tuple[int, int], dict[str, Any]]:
    """
    Put the scalars of one event file together again, in the order in which they were written.

    Returns:
        `dict`: by step and number the entries of the log history: 0 is training, n >= 1 the nth evaluation at a step,
        as there is one for each held-out data set.
    """
    scalars = [(event.wall_time, tag, event) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    entries: dict[tuple[int, int], dict[str, Any]] = {}
    evaluation: dict[int, int] = {}
    before = ""
    for _, tag, event in sorted(scalars, key=lambda scalar: scalar[0]):
        split, _, name = tag.partition("/")
        if split not in ("train", "eval"):
            continue
        place, key = (event.step, 0), name
        if split == "eval":
            place, key = (event.step, evaluation.setdefault(event.step, 1)), f"eval_{name}"
            # Every log ends with its `train/epoch`.
            if key in entries.get(place, {}) or (before == "train" and place in entries):
                evaluation[event.step] += 1
                place = (event.step, evaluation[event.step])
        entries.setdefault(place, {"step": event.step})[key] = event.value
        before = split
    return entries
