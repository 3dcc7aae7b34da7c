"""A run as pictures (PNG) and as a few lines of text. matplotlib is an extra: `pip install "trl-lambda[plots]"`."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LogHistory = Sequence[Mapping[str, Any]]

# One panel each: name, unit on the axis, key of the training metric, key of the held-out metric.
_PANELS = (
    ("Length weight λ", "λ (no unit)", "lambda/value", None),
    ("Mean reward", "reward per completion", "reward", "eval_reward"),
    ("Mean completion length", "tokens", "completions/mean_length", "eval_completions/mean_length"),
)


def require_matplotlib() -> None:
    """
    Check that pictures can be drawn.

    Raises:
        ImportError: if matplotlib cannot be imported, with the extra to install.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "trl-lambda[plots]"') from error


def read_log_history(folder: str | Path) -> LogHistory:
    """
    Read the log history that `Trainer` saved in an output folder.

    Args:
        folder (`str` or `Path`):
            Holds `trainer_state.json`, itself or in its newest `checkpoint-N`.

    Returns:
        `list[dict]`: one entry per logged step, as in `trainer.state.log_history`.

    Raises:
        ValueError: if there is no such file, or it does not hold a log history.
    """
    folder = Path(folder)
    checkpoints = [path for path in folder.glob("checkpoint-*/trainer_state.json") if _step_of(path) >= 0]
    candidates = [folder / "trainer_state.json", *sorted(checkpoints, key=_step_of, reverse=True)]
    state_file = next((path for path in candidates if path.is_file()), None)
    if state_file is None:
        raise ValueError(f"run is {str(folder)!r}, where no trainer_state.json is, nor in a checkpoint-N in it.")
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
    except ValueError as error:  # neither UTF-8 nor JSON: a write that was cut short, another program's file
        raise ValueError(f"{state_file} is damaged: {error}.") from error
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise ValueError(f"{state_file} holds no log_history; accepted is a file that Trainer wrote.")
    return state["log_history"]


def _step_of(state_file: Path) -> int:
    """Return N of `checkpoint-N/trainer_state.json`, or -1 where N is not a number."""
    number = state_file.parent.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _series(history: LogHistory, key: str | None) -> tuple[list[int], list[float]]:
    """Return the optimizer steps at which `key` was logged and its values; TRL logs None where nothing was valid."""
    points = [
        (entry["step"], float(entry[key]))
        for entry in history
        if isinstance(entry.get(key), (int, float)) and math.isfinite(entry[key])
    ]
    return [step for step, _ in points], [value for _, value in points]


def _running_mean(values: list[float], window: int) -> list[float]:
    """Return the mean of each value and up to `window - 1` values before it."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]


def _draw_panel(axes: Any, history: LogHistory, title: str, unit: str, key: str, eval_key: str | None) -> None:
    """Draw one metric: training as a line, held-out as markers; told apart by shape and lightness, not by colour."""
    steps, values = _series(history, key)
    window = max(1, len(values) // 10)
    if key == "lambda/value":
        axes.axhline(0.0, color="0.6", linewidth=0.8, linestyle="--")  # λ = 0 is the token mean
        axes.plot(steps, values, color="black", linewidth=1.8)
    elif window == 1:
        axes.plot(steps, values, color="black", linewidth=1.8, label="training")
    else:
        axes.plot(steps, values, color="0.75", linewidth=0.9, label="training, as logged")
        axes.plot(steps, _running_mean(values, window), color="black", linewidth=1.8, label=f"mean of {window} logs")
    if len(values) == 1:
        axes.plot(steps, values, color="black", marker=".")  # a line through one point is invisible
    eval_steps, eval_values = _series(history, eval_key)
    if eval_values:
        axes.plot(eval_steps, eval_values, "o", color="black", markerfacecolor="white", markersize=7, label="held-out")
    if axes.get_legend_handles_labels()[0]:
        # Above the panel: inside it any corner may hold data.
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, fontsize=8)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylabel(unit)
    axes.grid(True, color="0.92")
    axes.spines[["top", "right"]].set_visible(False)


def plot_run(run: LogHistory | str | Path, path: str | Path) -> Path:
    """
    Draw λ, mean reward and mean completion length over the optimizer steps of a run.

    Args:
        run (`list[dict]`, `str` or `Path`):
            A log history, such as `trainer.state.log_history`, or the output folder of a run. The panel of λ is left
            out where the run has none.
        path (`str` or `Path`):
            PNG file to write; its folder is made if need be.

    Returns:
        `Path`: the file written.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if `run` holds no log history, or one without any of the three metrics.
    """
    require_matplotlib()
    # The Agg canvas directly: pyplot would change the caller's backend and keep the figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    history = read_log_history(run) if isinstance(run, (str, Path)) else run
    if not isinstance(history, Sequence) or not all(isinstance(entry, Mapping) for entry in history):
        raise ValueError(f"run is a {type(run).__name__}; accepted: a log history (list of dicts) or a folder.")
    if not all(isinstance(entry.get("step"), int) for entry in history):
        raise ValueError("run has an entry without a step; accepted is a log history as Trainer keeps it.")
    panels = [panel for panel in _PANELS if _series(history, panel[2])[0]]
    if not panels:
        keys = ", ".join(panel[2] for panel in _PANELS)
        raise ValueError(f"run has {len(history)} entries and nothing to draw; needed is at least one of: {keys}.")
    figure = Figure(figsize=(7.5, 2.6 * len(panels) + 0.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(rows, panels, strict=True):
        _draw_panel(axes, history, *panel)
    rows[-1].set_xlabel("optimizer step")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.align_ylabels(rows)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


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
    start, end, length = f"{prefix}rewards/", "/mean", f"{prefix}completions/mean_length"
    keys = dict.fromkeys(key for entry in history for key in entry)  # in the order of their first appearance
    lines = [
        (f"{split} reward {key.removeprefix(start).removesuffix(end)}", _change(history, key))
        for key in keys
        if key.startswith(start) and key.endswith(end)
    ]
    lines.append((f"{split} mean length", _change(history, length, " tokens")))
    return [(name, text) for name, text in lines if text]


def _change(history: LogHistory, key: str, unit: str = "") -> str:
    """Return the first and the last logged value with their steps, or '' where the metric was never logged."""
    steps, values = _series(history, key)
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}{unit} (step {steps[0]})"
    return f"{values[0]:.3f} -> {values[-1]:.3f}{unit} (step {steps[0]} -> {steps[-1]})"
