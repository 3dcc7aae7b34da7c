"""The log history of a run: read from its folder, taken apart by metric and held-out data set, told in a few lines."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LogHistory = Sequence[Mapping[str, Any]]
Series = tuple[list[int], list[float]]

_STATE = "trainer_state.json"


def read_log_history(folder: str | Path) -> LogHistory:
    """
    Read what a finished or a running run has logged.

    Args:
        folder (`str` or `Path`):
            Output folder of a run, or one of its checkpoints. A resumed run is read where it has come furthest.

    Returns:
        `list[dict]`: one entry per log, as in `trainer.state.log_history`.

    Raises:
        ValueError: if neither `folder` nor a `checkpoint-N` in it holds a `trainer_state.json`, or one is damaged.
    """
    files = [*Path(folder).glob(_STATE), *Path(folder).glob(f"checkpoint-*/{_STATE}")]
    if not files:
        raise ValueError(f"{str(folder)!r} has no {_STATE}, nor has a checkpoint-N in it; give a run's output_dir.")
    return max(map(_read_state, files), key=lambda history: max((entry["step"] for entry in history), default=-1))


def _read_state(file: Path) -> LogHistory:
    try:
        return [{"step": int(entry["step"])} | entry for entry in json.loads(file.read_bytes())["log_history"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged, it holds no log history of a Trainer ({error}).") from error


def series(history: LogHistory, key: str) -> Series:
    """Return steps and values of a metric where it was logged; NaN for what has no value, which TRL logs as `None`."""
    logged = [(entry["step"], entry[key]) for entry in history if key in entry]
    values = [float(value) if isinstance(value, int | float) else math.nan for _, value in logged]
    return [step for step, _ in logged], [value if math.isfinite(value) else math.nan for value in values]


def has_values(history: LogHistory, key: str) -> bool:
    """Whether a metric was logged with a value at least once."""
    return not all(map(math.isnan, series(history, key)[1]))


def held_out_sets(history: LogHistory) -> Mapping[str, LogHistory]:
    """
    Return the evaluations of a run by held-out data set, "" for one that has no name.

    With several sets `Trainer` logs one entry for each, in which only its own metrics carry the name
    (`eval_NAME_runtime`, but `eval_reward`).
    """
    sets: dict[str, list[Mapping[str, Any]]] = {}
    for entry in history:
        if any(key.startswith("eval_") for key in entry):
            names = (match[1] for key in entry if (match := re.fullmatch("eval_(.+)_runtime", key)))
            sets.setdefault(next(names, ""), []).append(entry)
    return sets


def reward_functions(history: LogHistory) -> list[str]:
    """Return the names of the reward functions in the order of their first appearance."""
    keys = dict.fromkeys(key.removeprefix("eval_") for entry in history for key in entry)
    return [key[8:-5] for key in keys if key.startswith("rewards/") and key.endswith("/mean")]


def summarize_run(history: LogHistory) -> list[tuple[str, str]]:
    """
    Say how each reward and the completion length changed: on held-out data if the run was evaluated, else in training.

    Args:
        history (`list[dict]`):
            `trainer.state.log_history`.

    Returns:
        `list[tuple[str, str]]`: name and change, such as `("held-out reward exact_answer", "0.310 -> 0.642 (step 0 ->
        100)")`. With several held-out data sets the name ends in that of the set. λ, if the run has one, is last.
    """
    sets = held_out_sets(history)
    prefix, split = ("eval_", "held-out") if sets else ("", "training")
    lines = []
    for name, entries in (sets or {"": history}).items():
        of = f" ({name})" if name else ""
        for function in reward_functions(entries):
            lines.append((f"{split} reward {function}{of}", _change(entries, f"{prefix}rewards/{function}/mean")))
        lines.append((f"{split} mean length{of}", _change(entries, f"{prefix}completions/mean_length", " tokens")))
    lines.append(("lambda", _change(history, "lambda/value")))
    return [(name, change) for name, change in lines if change]


def _change(history: LogHistory, key: str, unit: str = "") -> str:
    """Return the first and the last value of a metric with their steps, "" where there is none."""
    points = [(step, value) for step, value in zip(*series(history, key), strict=True) if not math.isnan(value)]
    if len(points) < 2:
        return "".join(f"{value:.3f}{unit} (step {step})" for step, value in points)
    (start, first), (end, last) = points[0], points[-1]
    return f"{first:.3f} -> {last:.3f}{unit} (step {start} -> {end})"
