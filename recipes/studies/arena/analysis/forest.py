"""Differences to the reference with their intervals: one panel per task, one line per arm."""

import math
from typing import Any

import numpy as np

from recipes.studies.arena.analysis.comparisons import REFERENCE, Arena, Comparison
from recipes.studies.arena.analysis.runs import place_of
from recipes.studies.arena.analysis.tables import SHOWN, task_label
from recipes.studies.shared.arms import BASELINES
from recipes.studies.shared.panels import add_legend, finish_panel, new_figure


def draw_forest(arena: Arena, study: str) -> Any | None:
    """Draw each arm's paired differences to the reference in training reward and sampled accuracy."""
    return _draw_differences(arena, study, {"auc": ("#000000", "o"), "accuracy_sampled": ("#D55E00", "s")})


def draw_lengths(arena: Arena, study: str) -> Any | None:
    """Draw each arm's paired differences to the reference in the length of right and of wrong answers."""
    styles = {"mean_length_right": ("#0072B2", "o"), "mean_length_wrong": ("#D55E00", "s")}
    return _draw_differences(arena, study, styles)


def _draw_differences(arena: Arena, study: str, metrics: dict[str, tuple[str, str]]) -> Any | None:
    """Draw one panel per task, one line per arm, one marker per metric; filled where Holm-adjusted p < 0.05."""
    tasks = [task for task in arena.tasks(study) if REFERENCE in arena.groups[study, task]]
    arms = sorted({arm for task in tasks for arm in arena.groups[study, task]} - {REFERENCE}, key=place_of)
    if not arms:
        return None
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure, panels = new_figure(rows, columns, width=max(3.7, 6.0 / columns), height=1.2 + 0.27 * len(arms))
    for axes, task in zip(panels.flat, tasks, strict=False):
        _draw_forest_panel(axes, arena, (study, task), arms, metrics)
        finish_panel(axes, task_label(study, task), f"difference to {REFERENCE} ({SHOWN[next(iter(metrics))][1]})", "")
        axes.set_yticks(range(len(arms)), arms, fontsize=9)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.grid(False, axis="y")
        axes.locator_params(axis="x", nbins=6)
        if axes.get_subplotspec().colspan.start:
            axes.tick_params(labelleft=False)
    for axes in panels.flat[len(tasks) :]:
        axes.remove()
    add_legend(figure, "Paired by seed, 95 % interval; filled where Holm-adjusted\np < 0.05; ◂ ▸ outside the range")
    return figure


def _draw_forest_panel(
    axes: Any, arena: Arena, key: tuple[str, str], arms: list[str], metrics: dict[str, tuple[str, str]]
) -> None:
    found = [
        (place, metric, comparison)
        for place, arm in enumerate(arms)
        for metric in metrics
        if (comparison := arena.to_reference(*key, metric, arm)) is not None
    ]
    by_metric = [[comparison for _, name, comparison in found if name == metric] for metric in metrics]
    limits = _limits(by_metric, SHOWN[next(iter(metrics))][2])
    for row in range(0, len(arms), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="0.96", linewidth=0)
    axes.axhline(sum(arm in BASELINES for arm in arms) - 0.5, color="0.6", linewidth=0.8)  # baselines above
    axes.axvline(0, color="0.4", linewidth=0.9)
    offsets = dict(zip(metrics, np.linspace(-0.2, 0.2, len(metrics)), strict=True))
    for metric, (color, marker) in metrics.items():
        axes.plot([], [], color=color, marker=marker, markerfacecolor="white", label=SHOWN[metric][0])
    for place, metric, comparison in found:
        _draw_interval(axes, comparison, place + offsets[metric], metrics[metric], SHOWN[metric][2], limits)
    axes.set_xlim(limits)


def _limits(by_metric: list[list[Comparison]], factor: float) -> tuple[float, float]:
    """Return the range that is shown: an arm that collapses must not squeeze all others into one line."""
    intervals = [
        [[factor * x for x in (c.difference, c.low, c.high) if x is not None] for c in comparisons]
        for comparisons in by_metric
        if comparisons
    ]
    # Four times how far the middle one of the arms reaches, in the noisier of the metrics.
    widest = 4 * max((np.median([max(map(abs, ends)) for ends in part]) for part in intervals), default=0)
    every = [0.0, *(min(max(x, -widest), widest) for part in intervals for ends in part for x in ends)]
    margin = 0.06 * (max(every) - min(every)) or 1.0
    return min(every) - margin, max(every) + margin


def _draw_interval(
    axes: Any, comparison: Comparison, y: float, style: tuple[str, str], factor: float, limits: tuple[float, float]
) -> None:
    color, marker = style
    x = factor * comparison.difference
    if comparison.low is not None and comparison.high is not None:
        axes.plot([factor * comparison.low, factor * comparison.high], [y, y], color=color, linewidth=1.3)
    face = color if comparison.significant else "white"
    if limits[0] < x < limits[1]:
        axes.plot([x], [y], marker=marker, color=color, markerfacecolor=face, markersize=4.5)
        return
    left = x <= limits[0]
    end, inwards = (limits[0], 0.02) if left else (limits[1], -0.02)
    inwards *= limits[1] - limits[0]
    axes.plot([end + inwards], [y], marker="<" if left else ">", color=color, markerfacecolor=face, markersize=4.5)
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    where = {"va": "center", "ha": "left" if left else "right", "fontsize": 7, "color": color, "bbox": ground}
    axes.text(end + 2 * inwards, y, f"{x:+.1f}", **where)
