"""The panels of the picture of a run. Curves differ by dash and grey, areas by lightness: all of it reads in grey."""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from .history import LogHistory, has_values, held_out_sets, reward_functions, series

_DASHES, _GREYS, _MARKERS = ("-", "--", ":"), ("black", "0.6"), ("", "o", "s", "^", "D", "v", "x")
_SHADES = ("#dce9f6", "#9ac6e3", "#4a90c4", "#0b4083")


@dataclass(frozen=True)
class Panel:
    """
    A few metrics in one unit over the optimizer steps.

    `curves` maps each label to its metric, `level` is a horizontal line and its label. With `held_out` the evaluations
    are drawn as well, with `stacked` the metrics are parts of 1 and drawn as areas.
    """

    title: str
    unit: str
    curves: dict[str, str]
    level: tuple[float, str] | None = None
    held_out: bool = False
    stacked: bool = False

    def has_data(self, history: LogHistory) -> bool:
        """Whether a run has values for it. Parts of 1 are drawn together or not at all."""
        keys = [*self.curves.values(), *(f"eval_{key}" for key in self.curves.values() if self.held_out)]
        return (all if self.stacked else any)(has_values(history, key) for key in keys)


_LOSS, _MASS = "part of Σ |f·v·A|", "Σ |A|·f·length / tokens"
PANELS = (
    Panel("Reward", "mean over completions", {"training": "reward"}, held_out=True),
    Panel("Completion length", "tokens", {"mean": "completions/mean_length", "longest": "completions/max_length",
          "shortest": "completions/min_length"}, held_out=True),
    Panel("λ: above 0, longer answers count more", "λ", {"length": "lambda/value",
          "mean log-prob.": "lambda/mean_logp", "least log-prob.": "lambda/min_logp"},
          level=(0.0, "0: no preference")),
    Panel("What moves λ: its gradient", "dL/dλ (λ moves against it)", {"training": "lambda/grad"}, level=(0.0, "")),
    Panel("How much of A the features of λ explain", "R² (1: all)", {"training": "lambda/r2"}),
    Panel("Distance from the length target", "ln(mean length / target)", {"above 0: too long": "lambda/target_gap"},
          level=(0.0, "0: on target")),
    Panel("Length weight f of a response", "f", {"largest": "length_weight/max", "smallest": "length_weight/min"},
          level=(1.0, "1: the token mean")),
    Panel("Token weight v", "v", {"mean": "token_weight/mean", "largest": "token_weight/max",
          "smallest": "token_weight/min"}, level=(1.0, "1: unweighted")),
    Panel("Tokens at the bounds of v", "part of the tokens", {"at the largest v": "token_weight/at_max",
          "at the smallest v": "token_weight/at_min"}),
    Panel("Weight on right and on wrong answers", _MASS, {"right (A > 0)": "mass/positive",
          "wrong (A < 0)": "mass/negative"}),
    Panel("The same, by difficulty of the question", _MASS, {"right, hard": "mass/positive_hard",
          "right, middle": "mass/positive_middle", "right, easy": "mass/positive_easy",
          "wrong, hard": "mass/negative_hard", "wrong, middle": "mass/negative_middle",
          "wrong, easy": "mass/negative_easy"}),
    Panel("Share of the loss, by response length", _LOSS, {"shortest ¼": "share/length_q1", "2nd": "share/length_q2",
          "3rd": "share/length_q3", "longest ¼": "share/length_q4"}, stacked=True),
    Panel("Share of the loss, by token probability", _LOSS, {"least likely ¼": "share/probability_q1",
          "2nd": "share/probability_q2", "3rd": "share/probability_q3", "likeliest ¼": "share/probability_q4"},
          stacked=True),
    Panel("Do longer answers earn more?", "correlation of A and length",
          {"within groups": "advantage/length_correlation"}, level=(0.0, "0: no")),
    Panel("Mean length by sign of the advantage", "tokens", {"A > 0: better": "advantage/positive_mean_length",
          "A < 0: worse": "advantage/negative_mean_length"}),
    Panel("Without a signal, or cut off", "part of all", {"groups with all A = 0": "groups/tied",
          "answers cut off": "completions/clipped_ratio"}),
    Panel("Entropy of the policy", "nats per token", {"training": "entropy"}),
)  # fmt: skip


def panels_of(history: LogHistory) -> list[Panel]:
    """Return the panels that a run has values for, with one for its reward functions if there are several."""
    # matplotlib hides a label that begins with an underscore
    functions = {re.sub("^_", " _", name): f"rewards/{name}/mean" for name in reward_functions(history)}
    by_function = [Panel("Reward by function", "mean over completions", functions)] if len(functions) > 1 else []
    return [panel for panel in (PANELS[0], *by_function, *PANELS[1:]) if panel.has_data(history)]


def window_of(history: LogHistory) -> int:
    """Return over how many logs curves are averaged."""
    return max(1, sum("loss" in entry for entry in history) // 10)


def draw_panel(axes: Any, panel: Panel, history: LogHistory) -> None:
    """Draw a panel with its title, units and legend, which is above the data and so covers none."""
    (_draw_areas if panel.stacked else _draw_curves)(axes, panel, history)
    labels = axes.get_legend_handles_labels()[1]
    one_line = sum(map(len, labels)) + 6 * len(labels) <= 48  # a mark is as wide as six characters
    two_columns = max(map(len, labels)) <= 18
    columns = len(labels) if one_line else max(1 + two_columns, math.ceil(len(labels) / 6))
    style = {"frameon": False, "fontsize": 9, "handlelength": 1.9, "columnspacing": 1.0, "borderaxespad": 0.2}
    legend = axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1.0), ncols=columns, **style)
    legend.set_in_layout(False)  # all panels are equally wide
    axes.set_title(panel.title, loc="left", fontsize=11, pad=7 + 14 * math.ceil(len(labels) / columns))
    axes.set(xlabel="optimizer step", ylabel=panel.unit)
    axes.xaxis.get_major_locator().set_params(nbins=6, integer=True)
    axes.margins(x=0.02)
    axes.grid(True, color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curves(axes: Any, panel: Panel, history: LogHistory) -> None:
    """Draw running means, a curve of its own over what was logged, and evaluations as open markers."""
    window = window_of(history)
    if panel.level is not None:
        axes.axhline(panel.level[0], color="0.8", linewidth=2.5, label=panel.level[1])
    curves = {label: key for label, key in panel.curves.items() if has_values(history, key)}
    for number, (label, key) in enumerate(curves.items()):
        steps, logged = series(history, key)
        values = running_mean(logged, window)
        if len(curves) == 1 and window > 1:
            axes.plot(steps, logged, color="0.8", linewidth=0.9)
        color, marker = _GREYS[number // 3 % 2], _MARKERS[number // 6 % 7]
        style = {"linestyle": _DASHES[number % 3], "linewidth": 1.8, "marker": marker}
        every = (number % 6, max(6, len(steps) // 6))
        axes.plot(steps, values, color=color, label=label, markevery=every, **style)
        # A value between two missing ones has no line to it.
        missing = np.isnan([np.nan, *values, np.nan])
        alone = np.flatnonzero(missing[:-2] & missing[2:] & ~missing[1:-1]).tolist()
        axes.plot(steps, values, color=color, linestyle="none", marker=marker or ".", markevery=alone)
    if panel.held_out:
        key = next(iter(panel.curves.values()))
        for number, (name, entries) in enumerate(held_out_sets(history).items()):
            look = {"color": "black", "linestyle": "none", "marker": _MARKERS[1 + number % 6], "markersize": 5}
            label = f"held-out: {name}" if name else "held-out"
            axes.plot(*series(entries, f"eval_{key}"), label=label, markerfacecolor="white", **look)


def _draw_areas(axes: Any, panel: Panel, history: LogHistory) -> None:
    """Stack parts of 1, the first lightest and at the bottom. A log without them leaves a gap."""
    keys = panel.curves.values()
    entries = [entry for entry in history if all(key in entry for key in keys)]
    steps = np.array([entry["step"] for entry in entries])
    parts = np.array([running_mean(series(entries, key)[1], window_of(history)) for key in keys])
    parts[:, np.isnan(parts).any(axis=0)] = np.nan
    tops = np.cumsum(np.vstack([np.zeros(len(steps)), parts]), axis=0)
    half = np.median(np.diff(steps)) / 2 if len(steps) > 1 else 0.5
    edges = np.stack([steps - half, steps + half], axis=1).flatten()  # one log alone is as wide as its interval
    for label, shade, low, high in zip(panel.curves, _SHADES, tops, tops[1:], strict=False):
        style = {"facecolor": shade, "edgecolor": "white", "linewidth": 0.5}
        axes.fill_between(edges, low.repeat(2), high.repeat(2), label=label, **style)
    axes.set(ylim=(0, 1), yticks=(0, 0.25, 0.5, 0.75, 1))


def running_mean(values: list[float], window: int) -> np.ndarray:
    """Return the mean of each value and up to `window - 1` before it, NaN where it is missing."""
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return np.array([np.nan if math.isnan(part[-1]) else np.nanmean(part) for part in parts])
