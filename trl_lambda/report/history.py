"""What a run has logged, in training and on each held-out data set, and as a few lines of text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LogHistory = Sequence[Mapping[str, Any]]

_MAX_STEP = 2**53  # the largest count that a float, and so a picture, still holds exactly
_MAX_VALUE = 3.4e38  # float32's largest: what is beyond it is no metric, and no picture can hold it


@dataclass(frozen=True)
class RunLog:
    """A log history and what pictures of it have to know besides."""

    history: LogHistory
    title: str = ""
    aggregation: str | None = None  # the member of f, where it has a λ and it is known
    length_scale: float = 1 / 9
    side: str = "both"

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the optimizer steps at which `key` was logged and its values, without those that are not finite."""
        return series(self.history, key)

    def held_out(self, key: str) -> list[tuple[str, list[int], list[float]]]:
        """Return what `key` was on held-out data: label, steps and values of each data set that has any."""
        sets = [(name, series(entries, f"eval_{key}")) for name, entries in evaluations(self.history).items()]
        return [(f"held-out: {name}" if name else "held-out", *points) for name, points in sets if points[0]]


def check_history(history: Any) -> None:
    """
    Raises:
        ValueError: if `history` is no log history as `Trainer` keeps it.
    """
    if not isinstance(history, Sequence) or not all(isinstance(entry, Mapping) for entry in history):
        raise ValueError(f"run is a {type(history).__name__}; accepted: a log history (list of dicts) or a folder.")
    for step in (entry.get("step") for entry in history):
        if not isinstance(step, int):
            raise ValueError("run has an entry without a step; accepted is a log history as Trainer keeps it.")
        if not 0 <= step <= _MAX_STEP:
            raise ValueError(f"run has an entry whose step is {_short(step)}; accepted: 0 to 2**53.")


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**20 else f"{'-' if number < 0 else ''}about 2**{number.bit_length()}"


def readable(text: str) -> str:
    """Return `text` with a lone surrogate, which UTF-8 cannot hold, written out: it can be drawn and printed."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def readable_history(history: LogHistory) -> LogHistory:
    """Return `history` with every key `readable`."""
    return [{readable(str(key)): value for key, value in entry.items()} for entry in history]


def evaluations(history: LogHistory) -> Mapping[str, LogHistory]:
    """
    Tell the held-out data sets of a run apart.

    With a dict of them, `Trainer` logs one entry for each, in which its own figures carry the name
    (`eval_NAME_runtime`) and TRL's do not (`eval_reward`).

    Returns:
        `dict[str, list[dict]]`: the entries of each data set by its name, `""` for the only one that has none; the
        keys are those of a run with one data set.
    """
    sets: dict[str, list[Mapping[str, Any]]] = {}
    for entry in history:
        for name in _data_sets(entry):
            start = f"eval_{name}_" if name else "eval_"
            own = {f"eval_{key.removeprefix(start)}": value for key, value in entry.items() if key.startswith(start)}
            others = {key: value for key, value in entry.items() if not key.startswith(start)}
            sets.setdefault(name, []).append({**own, **others})
    return sets


def _data_sets(entry: Mapping[str, Any]) -> list[str]:
    """Return the names of the held-out data sets that an entry is of."""
    keys = [key for key in entry if key.startswith("eval_")]
    if not keys:
        return []
    for known, ending in (("eval_runtime", "runtime"), ("eval_reward", "reward|completions/mean_length")):
        if known in entry:
            return [""]
        found = (re.fullmatch(f"eval_(.+?)_(?:{ending})", key, re.DOTALL) for key in keys)
        names = list(dict.fromkeys(match[1] for match in found if match))
        if names:
            return names
    return [""]


def series(history: LogHistory, key: str) -> tuple[list[int], list[float]]:
    """Return the optimizer steps at which `key` was logged and its values; TRL logs None where nothing was valid."""
    points = [
        (entry["step"], float(entry[key]))
        for entry in history
        if isinstance(entry.get(key), (int, float)) and abs(entry[key]) <= _MAX_VALUE
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
        `("held-out reward exact_answer", "0.310 -> 0.642 (step 0 -> 100)")`, with several held-out data sets for each
        of them; what was never logged is left out.
    """
    evaluated = any("eval_reward" in entry for entries in evaluations(history).values() for entry in entries)
    prefix, split = ("eval_", "held-out") if evaluated else ("", "training")
    lines = []
    for name, entries in (evaluations(history) if evaluated else {"": history}).items():
        of = f" ({name})" if name else ""
        lines += [
            (f"{split} reward {function}{of}", _change(entries, f"{prefix}rewards/{function}/mean"))
            for function in reward_functions(entries, prefix)
        ]
        lines.append((f"{split} mean length{of}", _change(entries, f"{prefix}completions/mean_length", " tokens")))
    return [(readable(name), text) for name, text in lines if text]


def lambda_change(history: LogHistory) -> list[tuple[str, str]]:
    """Say how λ changed, as a line for [`summarize_run`]'s; none where it was never logged."""
    text = _change(history, "lambda/value")
    return [("lambda", text)] if text else []


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
