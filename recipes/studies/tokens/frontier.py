"""Accuracy against mean tokens: `length_target` beside the other ways of saving tokens."""

import math
from typing import Any

import numpy as np

from recipes.studies.shared.paired_statistics import student_quantile
from recipes.studies.shared.panels import add_legend, finish_panel, new_figure
from recipes.studies.tokens.rows import BASELINE, Rows, cells, split_name

STYLES = (
    ("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#E69F00", "v"), ("#009E73", "D"), ("#CC79A7", "X"),
    ("#56B4E9", "P"),
)  # fmt: skip
FAR = 10.0  # points below dapo, from which on a setting is named in its panel and not drawn


def frontier_table(rows: Rows, ways: dict[str, str], of: str = "target") -> str:
    """
    Every rival against `length_target` at the same tokens: who is the more accurate there?

    `length_target`'s curve goes by straight lines through its rungs and dapo, points that are means over seeds. A
    rival with fewer tokens than every rung, or more than dapo, is compared with the point at that end. Intervals are
    95 %, of the jackknife over seeds: one seed's runs of all methods are left out together, and rungs, tokens and the
    place on the curve are found anew. Each stands for itself, without a correction for the number of rivals.

    Args:
        rows (`list[dict]`): of `budget.csv`.
        ways (`dict[str, str]`): the ways of saving tokens, by the first word of a method's name.
        of (`str`): the way whose curve it is, as `split_name` has it.
    """
    lines = [
        "| task | method | setting | seeds | tokens, held out | "
        "length_target's accuracy at these tokens less its own, points | length_target is |",
        "|---|---|---|---|---|---|---|",
    ]
    found = cells(rows)
    order = list(ways)
    for task in sorted({task for task, _ in found}):
        here = {name: runs for (where, name), runs in found.items() if where == task}
        rungs = [runs for name, runs in here.items() if split_name(name)[0] in (of, BASELINE)]
        rivals = [name for name in here if not split_name(name)[0].startswith(("target", BASELINE))]
        for name in sorted(rivals, key=lambda name: order.index(split_name(name)[0])):
            curve = [*rungs, here[name]]
            seeds = sorted(set.intersection(*map(set, curve)))
            if len(rungs) < 2 or len(seeds) < 2:
                continue
            tokens, accuracy = (
                np.array([[factor * float(runs[s][column]) for s in seeds] for runs in curve])
                for column, factor in (("mean_length", 1.0), ("accuracy_sampled", 100.0))
            )
            gap, half = _gap(tokens, accuracy), _jackknife_half_width(tokens, accuracy)
            verdict = "above" if gap > half else "below" if gap < -half else "level"
            *rung_tokens, at = tokens.mean(axis=1)
            end = float(np.clip(at, min(rung_tokens), max(rung_tokens)))
            beyond = f", with {end:.1f} tokens" if end != at else ""
            way, setting = split_name(name)
            lines.append(
                f"| {task} | {ways[way]} | {setting} | {len(seeds)} | {at:.1f} | "
                f"{gap:+.1f} [{gap - half:+.1f}, {gap + half:+.1f}] | {verdict}{beyond} |"
            )
    return "\n".join(lines)


def _gap(tokens: np.ndarray, accuracy: np.ndarray) -> float:
    """The curve's accuracy at the rival's tokens less the rival's; (methods, seeds), the rival last."""
    *x, at = tokens.mean(axis=1)
    *y, own = accuracy.mean(axis=1)
    along = np.argsort(x)
    return float(np.interp(at, np.array(x)[along], np.array(y)[along]) - own)


def _jackknife_half_width(tokens: np.ndarray, accuracy: np.ndarray) -> float:
    """Half of the gap's 95 % interval, by leaving out one seed after the other."""
    n = tokens.shape[1]
    gaps = np.array([_gap(np.delete(tokens, i, axis=1), np.delete(accuracy, i, axis=1)) for i in range(n)])
    return student_quantile(0.975, n - 1) * math.sqrt((n - 1) / n * float(((gaps - gaps.mean()) ** 2).sum()))


def _half_widths(values: np.ndarray) -> np.ndarray:
    """Half of Student's 95 % interval of each column's mean, of (seeds, columns); 0 of one seed."""
    n = len(values)
    if n < 2:
        return np.zeros(values.shape[1])
    return student_quantile(0.975, n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)


def draw_frontier(rows: Rows, ways: dict[str, str]) -> Any:
    """
    Accuracy against mean tokens, a panel per task, a curve per way of saving tokens; bars are 95 % intervals.

    The dotted line goes on from `length_target`'s curve to dapo. What is `FAR` below dapo is a line of text.
    """
    found = cells(rows)
    tasks = list(dict.fromkeys(task for task, _ in found))
    figure, panels = new_figure((len(tasks) + 1) // 2, min(2, len(tasks)), width=4.6, height=3.4)
    for axes, task in zip(panels.flat, tasks, strict=False):
        points: dict[str, list[np.ndarray]] = {}
        for (of, name), runs in found.items():
            if of == task:
                columns = (("mean_length", 1.0), ("accuracy_sampled", 100.0))
                values = np.array([[scale * float(r[c]) for c, scale in columns] for r in runs.values()])
                points.setdefault(split_name(name)[0], []).append(
                    np.concatenate([values.mean(axis=0), _half_widths(values)])
                )
        least = points[BASELINE][0][1] - FAR
        far = []
        for (way, label), (color, marker) in zip(ways.items(), STYLES, strict=True):
            near = sorted((p for p in points.get(way, []) if p[1] >= least), key=lambda p: p[0])
            below = sorted(p[1] for p in points.get(way, []) if p[1] < least)
            far += [f"{label}: {', '.join(f'{accuracy:.0f} %' for accuracy in below)}"] if below else []
            if not near:
                continue
            x, y, dx, dy = np.array(near).T
            axes.errorbar(
                x, y, xerr=dx, yerr=dy, color=color, marker=marker, markersize=5, linewidth=1.2, elinewidth=0.8,
                label=label,
            )  # fmt: skip
            if way == "target":
                dapo = points[BASELINE][0]
                axes.plot([x[-1], dapo[0]], [y[-1], dapo[1]], ":", color=color, linewidth=1)
        finish_panel(axes, task, "mean tokens, held out", "sampled accuracy, %")
        if far:
            text = "\n".join(["below the panel:", *far])
            axes.text(0.99, 0.02, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=7.5, color="0.3")
    for axes in panels.flat[len(tasks) :]:
        axes.set_visible(False)
    add_legend(figure, "ways of saving tokens (bars: 95 % intervals over seeds)", tuple(ways.values()))
    return figure
