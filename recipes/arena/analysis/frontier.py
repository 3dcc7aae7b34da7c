"""Accuracy against mean tokens: `length_target` beside the other ways of saving tokens."""

import math
import statistics
from typing import Any

import numpy as np

from recipes.arena.analysis.budget_rows import BASELINE, Rows, cells, interval_text, split_name
from recipes.arena.analysis.paired_statistics import bootstrap_interval, student_quantile
from recipes.arena.analysis.panels import add_legend, finish_panel, new_figure

STYLES = (
    ("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#E69F00", "v"), ("#009E73", "D"), ("#CC79A7", "X"),
)  # fmt: skip


def frontier_table(rows: Rows, ways: dict[str, str], of: str = "target") -> str:
    """
    Every rival against `length_target` at the same tokens: who is the more accurate there?

    `length_target`'s curve goes through its rungs and dapo, points that are means over seeds, by straight lines. So
    each seed has an accuracy on it, too, with the same two rungs and shares, and the differences are paired by seed.
    A rival with fewer tokens than every rung, or more than dapo, is compared with the point at that end.

    Args:
        rows (`list[dict]`): of `budget.csv`.
        ways (`dict[str, str]`): the ways of saving tokens, by the first word of a method's name.
        of (`str`): the way whose curve it is, as `split_name` has it.
    """
    lines = [
        "| task | method | setting | tokens, held out | "
        "length_target's accuracy at these tokens less its own, points | length_target is |",
        "|---|---|---|---|---|---|",
    ]
    found = cells(rows)
    order = list(ways)
    for task in sorted({task for task, _ in found}):
        here = {name: runs for (where, name), runs in found.items() if where == task}
        rungs = [runs for name, runs in here.items() if split_name(name)[0] in (of, BASELINE)]
        rivals = [name for name in here if not split_name(name)[0].startswith(("target", BASELINE))]
        seeds = sorted(set.intersection(*(set(runs) for runs in rungs)))
        if len(rungs) < 2 or not seeds:
            continue
        tokens = np.array([[float(runs[s]["mean_length"]) for s in seeds] for runs in rungs]).mean(axis=1)
        accuracy = np.array([[100 * float(runs[s]["accuracy_sampled"]) for s in seeds] for runs in rungs])
        accuracy, tokens = accuracy[np.argsort(tokens)], np.sort(tokens)
        for name in sorted(rivals, key=lambda name: order.index(split_name(name)[0])):
            both = [i for i, seed in enumerate(seeds) if seed in here[name]]
            if not both:
                continue
            theirs = [here[name][seeds[i]] for i in both]
            at = statistics.fmean(float(row["mean_length"]) for row in theirs)
            shares = np.array([np.interp(at, tokens, one) for one in np.eye(len(tokens))])
            gaps = [
                float(shares @ accuracy[:, i]) - 100 * float(row["accuracy_sampled"])
                for i, row in zip(both, theirs, strict=True)
            ]
            end = float(np.clip(at, tokens[0], tokens[-1]))
            beyond = f", with {end:.1f} tokens" if end != at else ""
            way, setting = split_name(name)
            lines.append(
                f"| {task} | {ways[way]} | {setting} | {at:.1f} | {interval_text(gaps)} | {_verdict(gaps)}{beyond} |"
            )
    return "\n".join(lines)


def _verdict(gaps: list[float]) -> str:
    """Whether the 95 % interval of the mean lies above 0, below it, or holds it."""
    if len(gaps) < 2 or len(set(gaps)) < 2:
        return "not told apart"
    low, high = bootstrap_interval(gaps)
    return "above" if low > 0 else "below" if high < 0 else "level"


def _half_widths(values: np.ndarray) -> np.ndarray:
    """Half of Student's 95 % interval of each column's mean, of (seeds, columns); 0 of one seed."""
    n = len(values)
    if n < 2:
        return np.zeros(values.shape[1])
    return student_quantile(0.975, n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)


def draw_frontier(rows: Rows, ways: dict[str, str]) -> Any:
    """Accuracy against mean tokens, a panel per task, a curve per way of saving tokens; bars are 95 % intervals."""
    found = cells(rows)
    tasks = list(dict.fromkeys(task for task, _ in found))
    figure, panels = new_figure((len(tasks) + 1) // 2, min(2, len(tasks)), width=4.6, height=3.4)
    for axes, task in zip(panels.flat, tasks, strict=False):
        for (way, label), (color, marker) in zip(ways.items(), STYLES, strict=True):
            points = []
            for (of, name), runs in found.items():
                if of == task and split_name(name)[0] == way:
                    columns = (("mean_length", 1.0), ("accuracy_sampled", 100.0))
                    values = np.array([[scale * float(r[c]) for c, scale in columns] for r in runs.values()])
                    points.append((*values.mean(axis=0), *_half_widths(values)))
            if points:
                x, y, dx, dy = np.array(sorted(points)).T
                axes.errorbar(
                    x, y, xerr=dx, yerr=dy, color=color, marker=marker, markersize=5, linewidth=1.2, elinewidth=0.8,
                    label=label,
                )  # fmt: skip
        finish_panel(axes, task, "mean tokens, held out", "sampled accuracy, %")
    for axes in panels.flat[len(tasks) :]:
        axes.set_visible(False)
    add_legend(figure, "ways of saving tokens (bars: 95 % intervals over seeds)", tuple(ways.values()))
    return figure
