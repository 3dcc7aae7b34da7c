"""Curves over training: reward and λ. Colours are those of Okabe and Ito; dashes tell the lines apart without them."""

import math
from typing import Any

import numpy as np

from recipes.studies.arena.analysis.comparisons import REFERENCE, Arena
from recipes.studies.arena.analysis.runs import Group, Run
from recipes.studies.arena.analysis.tables import task_label
from recipes.studies.shared.arms import ARMS, LEARNED
from recipes.studies.shared.paired_statistics import mean_and_band
from recipes.studies.shared.panels import add_legend, finish_panel, new_figure

_WINDOW = 3  # generation batches
_LAMBDA_EVERY = 5  # optimizer steps between two values of a λ curve
_CHOSEN = {
    REFERENCE: ("#000000", "-"),
    "grpo": ("#E69F00", (0, (5, 1.5))),
    "softmax": ("#0072B2", "-"),
    "power": ("#D55E00", (0, (5, 1.5, 1, 1.5))),
    "tr": ("#009E73", (0, (2, 1))),
    "softmax_tr": ("#CC79A7", (0, (8, 2))),
}
_TASKS = (
    ("#0072B2", "-"),
    ("#D55E00", (0, (5, 1.5))),
    ("#009E73", (0, (2, 1))),
    ("#E69F00", (0, (5, 1.5, 1, 1.5))),
    ("#CC79A7", (0, (8, 2))),
    ("#000000", (0, (1, 1))),
)
_OTHERS = "0.78"


def smooth(curve: np.ndarray, window: int = _WINDOW) -> np.ndarray:
    """Return the mean of `window` neighbours around each value; of fewer at both ends."""
    ones = np.ones(window)
    reach = (window - 1) // 2
    part = slice(reach, reach + len(curve))
    return np.convolve(curve, ones)[part] / np.convolve(np.ones(len(curve)), ones)[part]


def draw_curves(arena: Arena, study: str) -> Any:
    """Draw the training reward of each task, and beside it the paired difference to the reference."""
    tasks = arena.tasks(study)
    figure, panels = new_figure(len(tasks), 2, width=5.4, height=2.9)
    for task, (rewards, differences) in zip(tasks, panels, strict=True):
        group = arena.groups[study, task]
        curves = {arm: _reward_curves(runs) for arm, runs in group.items()}
        _draw_arms([arm for arm in group if arm in _CHOSEN], group, curves, rewards, differences)
        # The arms in colour set the range: one grey arm that collapses would flatten them all.
        limits = differences.get_ylim() if differences.lines else None
        _draw_arms([arm for arm in group if arm not in _CHOSEN], group, curves, rewards, differences)
        differences.axhline(0, color="black", linewidth=1)
        differences.set_ylim(limits)
        finish_panel(rewards, task_label(study, task), "optimizer step", "mean reward")
        finish_panel(differences, f"{task_label(study, task)}: difference to {REFERENCE}", "optimizer step", "points")
    title = f"Mean over seeds with its 95 % band, each seed smoothed over {_WINDOW} generation batches"
    add_legend(figure, title, order=tuple(_CHOSEN))
    return figure


def _draw_arms(
    arms: list[str], group: Group, curves: dict[str, dict[int, np.ndarray]], rewards: Any, differences: Any
) -> None:
    for arm in arms:
        paired = {} if arm == REFERENCE else _paired_curves(curves[arm], curves.get(REFERENCE, {}))
        for axes, lines in ((rewards, curves[arm]), (differences, paired)):
            if lines:
                _draw_band(axes, arm, list(lines.values()), _max_steps(group[arm]))


def _reward_curves(runs: dict[int, Run]) -> dict[int, np.ndarray]:
    return {seed: smooth(run.curves["reward_curve"]) for seed, run in runs.items() if "reward_curve" in run.curves}


def _paired_curves(arm: dict[int, np.ndarray], reference: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Return the difference of each seed that both have, in points."""
    seeds = [seed for seed in arm if seed in reference and len(arm[seed]) == len(reference[seed])]
    return {seed: 100 * (arm[seed] - reference[seed]) for seed in seeds}


def _max_steps(runs: dict[int, Run]) -> int:
    return int(next(iter(runs.values())).settings[1])


def _draw_band(axes: Any, arm: str, curves: list[np.ndarray], max_steps: int) -> None:
    mean, band = mean_and_band(curves)
    steps = np.arange(len(mean)) * max_steps / len(mean)  # a batch is drawn before its first step
    if arm not in _CHOSEN:
        axes.plot(steps, mean, color=_OTHERS, linewidth=0.7, label="other arms", zorder=1)
        return
    color, dash = _CHOSEN[arm]
    axes.plot(steps, mean, color=color, linestyle=dash, linewidth=1.6, label=arm, zorder=3)
    if band is not None:
        axes.fill_between(steps, mean - band, mean + band, color=color, alpha=0.1, linewidth=0, zorder=2)


def draw_lambda_paths(arena: Arena, study: str) -> Any | None:
    """Draw λ of each learned arm: every seed thin, the mean bold, one colour per task. None if there is none."""
    tasks = arena.tasks(study)
    arms = [arm for arm in LEARNED if any(_lambda_curves(arena, study, task, arm) for task in tasks)]
    if not arms:
        return None
    figure, panels = new_figure(math.ceil(len(arms) / 2), 2, width=5.4, height=3.6)
    for axes, arm in zip(panels.T.flat, arms, strict=False):
        axes.axhline(0, color="0.4", linewidth=0.9)
        for task, (color, dash) in zip(tasks, _TASKS * math.ceil(len(tasks) / len(_TASKS)), strict=False):
            curves = _lambda_curves(arena, study, task, arm)
            for curve in curves:
                axes.plot(np.arange(len(curve)) * _LAMBDA_EVERY, curve, color=color, linewidth=0.6, alpha=0.35)
            if curves:
                mean = mean_and_band(curves)[0]
                steps = np.arange(len(mean)) * _LAMBDA_EVERY
                axes.plot(steps, mean, color=color, linestyle=dash, linewidth=2.4, label=task)
        finish_panel(axes, f"{arm}: {ARMS[arm].about}", "optimizer step", "λ (no unit)")
    for axes in panels.T.flat[len(arms) :]:
        axes.remove()
    add_legend(figure, "λ of every seed, and the mean of its task")
    return figure


def _lambda_curves(arena: Arena, study: str, task: str, arm: str) -> list[np.ndarray]:
    runs = arena.groups[study, task].get(arm, {}).values()
    return [run.curves["lambda_curve"] for run in runs if "lambda_curve" in run.curves]
