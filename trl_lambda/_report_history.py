"""What a run has logged, read from memory or from its folder, and as a few lines of text."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .preference.files import read_lambda_file

LogHistory = Sequence[Mapping[str, Any]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunLog:
    """A log history and what pictures of it have to know besides."""

    history: LogHistory
    title: str = ""
    aggregation: str | None = None  # the member of f, where it has a λ and it is known
    length_scale: float = 1 / 9

    def series(self, key: str | None) -> tuple[list[int], list[float]]:
        """Return the optimizer steps at which `key` was logged and its values, without those that are not finite."""
        return series(self.history, key)


def check_history(history: Any) -> None:
    """
    Raises:
        ValueError: if `history` is no log history as `Trainer` keeps it.
    """
    if not isinstance(history, Sequence) or not all(isinstance(entry, Mapping) for entry in history):
        raise ValueError(f"run is a {type(history).__name__}; accepted: a log history (list of dicts) or a folder.")
    if not all(isinstance(entry.get("step"), int) for entry in history):
        raise ValueError("run has an entry without a step; accepted is a log history as Trainer keeps it.")


def read_log_history(folder: str | Path) -> LogHistory:
    """
    Read what a finished or a running run has logged from its output folder.

    Args:
        folder (`str` or `Path`):
            Holds `trainer_state.json`, itself or in its newest `checkpoint-N`, or TensorBoard's event files, which are
            read where they have come further (needs tensorboard).

    Returns:
        `list[dict]`: one entry per logged step, as in `trainer.state.log_history`.

    Raises:
        ValueError: if there is no such file, or it is damaged or holds no log history.
    """
    folder = Path(folder)
    files = [path for path in (folder / "trainer_state.json", _newest_checkpoint_state(folder)) if path.is_file()]
    histories = [_read_state(path) for path in files]
    histories.append(_read_events(folder))
    if not files and not histories[-1]:
        raise ValueError(
            f"run is {str(folder)!r}, where no trainer_state.json is, nor in a checkpoint-N in it, and no event file."
        )
    return max(histories, key=_last_step)


def read_run(folder: str | Path) -> RunLog:
    """
    Read a run from its output folder: its log history, and the member of f from `lambda.json` if it is there.

    Raises:
        ValueError: as for `read_log_history`.
    """
    folder = Path(folder)
    history = read_log_history(folder)
    title, member, length_scale = folder.resolve().name, None, 1 / 9
    for candidate in (folder, _newest_checkpoint_state(folder).parent):
        if not (candidate / "lambda.json").is_file():
            continue
        try:
            content = read_lambda_file(candidate)
            member, length_scale = content["aggregation"], float(content.get("length_scale") or length_scale)
            title = f"{title}: aggregation={member}"
            break
        except (ValueError, TypeError) as error:
            logger.warning("no picture of the length weight: %s", " ".join(str(error).split()))
    return RunLog(history, title, member, length_scale)


def _newest_checkpoint_state(folder: Path) -> Path:
    """Return the state file of the checkpoint with the highest step; one that does not exist if there is none."""
    states = [path for path in folder.glob("checkpoint-*/trainer_state.json") if _step_of(path) >= 0]
    return max(states, key=_step_of, default=folder / "checkpoint" / "trainer_state.json")


def _step_of(state_file: Path) -> int:
    """Return N of `checkpoint-N/trainer_state.json`, or -1 where N is not a number."""
    number = state_file.parent.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _last_step(history: LogHistory) -> int:
    steps = [entry.get("step") for entry in history if isinstance(entry, Mapping)]
    return max((step for step in steps if isinstance(step, int)), default=-1)


def _read_state(state_file: Path) -> LogHistory:
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
    except ValueError as error:  # neither UTF-8 nor JSON: a write that was cut short, another program's file
        raise ValueError(f"{state_file} is damaged: {error}.") from error
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise ValueError(f"{state_file} holds no log_history; accepted is a file that Trainer wrote.")
    return state["log_history"]


def _read_events(folder: Path) -> LogHistory:
    """Read TensorBoard's event files under `folder`; empty where there is none, or no tensorboard to read it with."""
    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        return []
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return []
    entries: dict[tuple[int, bool], dict[str, Any]] = {}
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            split, _, name = tag.partition("/")
            if split not in ("train", "eval"):
                continue
            evaluated = split == "eval"  # an entry of its own, as in the log history
            for event in events.Scalars(tag):
                entry = entries.setdefault((event.step, evaluated), {"step": event.step})
                entry[f"eval_{name}" if evaluated else name] = event.value
    return [entries[key] for key in sorted(entries)]


def series(history: LogHistory, key: str | None) -> tuple[list[int], list[float]]:
    """Return the optimizer steps at which `key` was logged and its values; TRL logs None where nothing was valid."""
    points = [
        (entry["step"], float(entry[key]))
        for entry in history
        if isinstance(entry.get(key), (int, float)) and math.isfinite(entry[key])
    ]
    return [step for step, _ in points], [value for _, value in points]


def summarize_run(history: LogHistory) -> list[tuple[str, str]]:
    """
    Say how rewards and completion length changed: on held-out data if the run was evaluated, else in training.

    Args:
        history (`list[dict]`):
            `trainer.state.log_history`.

    Returns:
        `list[tuple[str, str]]`: for every reward function and for the length, what it is and how it changed, such as
        `("held-out reward exact_answer", "0.310 -> 0.642 (step 0 -> 100)")`; what was never logged is left out.
    """
    evaluated = any("eval_reward" in entry for entry in history)
    prefix, split = ("eval_", "held-out") if evaluated else ("", "training")
    lines = [
        (f"{split} reward {name}", _change(history, f"{prefix}rewards/{name}/mean"))
        for name in reward_functions(history, prefix)
    ]
    lines.append((f"{split} mean length", _change(history, f"{prefix}completions/mean_length", " tokens")))
    return [(name, text) for name, text in lines if text]


def reward_functions(history: LogHistory, prefix: str = "") -> list[str]:
    """Return the names of the reward functions that were logged, in the order of their first appearance."""
    start, end = f"{prefix}rewards/", "/mean"
    keys = dict.fromkeys(key for entry in history for key in entry)
    return [key.removeprefix(start).removesuffix(end) for key in keys if key.startswith(start) and key.endswith(end)]


def _change(history: LogHistory, key: str, unit: str = "") -> str:
    """Return the first and the last logged value with their steps, or '' where the metric was never logged."""
    steps, values = series(history, key)
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}{unit} (step {steps[0]})"
    return f"{values[0]:.3f} -> {values[-1]:.3f}{unit} (step {steps[0]} -> {steps[-1]})"
