"""Tables and pictures: accuracy and tokens of every way of saving tokens, paired with dapo."""

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from recipes.studies.shared.markdown import markdown_table, replace_tables
from recipes.studies.shared.paired_statistics import mean_and_band, student_quantile
from recipes.studies.shared.panels import add_legend, finish_panel, new_figure
from recipes.studies.tokens.frontier import STYLES, draw_frontier, frontier_table
from recipes.studies.tokens.rows import (
    BASELINE,
    Rows,
    cells,
    curve,
    interval_text,
    settled_length,
    split_name,
)

SPAN = 20  # optimizer steps, over which a step response is smoothed


def promise_table(rows: Rows, promised: dict[str, int], study: str = "budget") -> str:
    """What `length_target` is to hold on two tasks: the length in every seed, the accuracy, the tokens saved."""
    lines = [
        "| task | target | seeds | settled length: least, mean, most | within 15 % | "
        "sampled accuracy against dapo, points (one-sided 95 % lower end) | "
        "tokens against dapo, in training; held out | mean training reward against dapo, points | "
        "mean λ, second half |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found = cells(rows, study)
    held = [
        (task, name, target)
        for task, target in promised.items()
        for where, name in found
        if where == task and split_name(name)[0].startswith("target") and split_name(name)[1] == str(target)
    ]
    for task, name, target in held:
        mine, theirs = found[task, name], found[task, BASELINE]
        seeds = sorted(set(mine) & set(theirs))
        if len(seeds) < 2:
            continue
        lengths = [settled_length(mine[seed]) for seed in seeds]
        near = sum(abs(length / target - 1) <= 0.15 for length in lengths)
        gaps = [100 * (float(mine[s]["accuracy_sampled"]) - float(theirs[s]["accuracy_sampled"])) for s in seeds]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps))
        lower = statistics.fmean(gaps) - student_quantile(0.95, len(gaps) - 1) * error
        train = 100 * (statistics.fmean(lengths) / statistics.fmean(settled_length(theirs[s]) for s in seeds) - 1)
        ends = [statistics.fmean(float(side[s]["mean_length"]) for s in seeds) for side in (mine, theirs)]
        rewards = [float(mine[s]["auc"]) - float(theirs[s]["auc"]) for s in seeds]
        lambdas = [float(lam[len(lam) // 2 :].mean()) for lam in (curve(mine[s], "lambda_curve") for s in seeds)]
        lines.append(
            f"| {task} | {name.removeprefix('target ')} | {len(seeds)} | "
            f"{min(lengths):.1f}, {statistics.fmean(lengths):.1f}, {max(lengths):.1f} | {near} of {len(seeds)} | "
            f"{statistics.fmean(gaps):+.1f} ({lower:+.1f}) | {train:+.0f} %; {100 * (ends[0] / ends[1] - 1):+.0f} % | "
            f"{interval_text(rewards, 100)} | {min(lambdas):.1f} to {max(lambdas):.1f} |"
        )
    return "\n".join(lines)


def ladder_table(rows: Rows, ways: dict[str, str], study: str = "budget") -> str:
    """Every method with the mean of its seeds, and its paired difference to dapo with a 95 % interval."""
    lines = [
        "| task | method | setting | seeds | tokens, held out | sampled accuracy, % | accuracy against dapo, points | "
        "tokens against dapo |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = cells(rows, study)
    order = list(ways)
    for (task, name), runs in sorted(
        found.items(), key=lambda cell: (cell[0][0], order.index(split_name(cell[0][1])[0]))
    ):
        theirs = found[task, BASELINE]
        seeds = [seed for seed in runs if seed in theirs]
        way, setting = split_name(name)
        tokens = statistics.fmean(float(row["mean_length"]) for row in runs.values())
        accuracy = 100 * statistics.fmean(float(row["accuracy_sampled"]) for row in runs.values())
        against = ["", ""]
        if name != BASELINE and seeds:
            columns = (("accuracy_sampled", 100.0), ("mean_length", 1.0))
            against = [
                interval_text([float(runs[s][column]) - float(theirs[s][column]) for s in seeds], scale)
                for column, scale in columns
            ]
        lines.append(
            f"| {task} | {ways[way]} | {setting or '–'} | {len(runs)} | {tokens:.1f} | {accuracy:.1f} | "
            f"{against[0]} | {against[1]} |"
        )
    return "\n".join(lines)


def own_table(rows: Rows) -> str:
    """A target at the policy's own length: λ over the run, and what differs from dapo with the same seed."""
    lines = [
        "| task | target | seed | λ: mean, mean of its size | settled length, dapo's | sampled accuracy, dapo's, % |",
        "|---|---|---|---|---|---|",
    ]
    found = cells(rows, "own")
    for (task, name), runs in found.items():
        for seed, row in runs.items():
            theirs = found.get((task, BASELINE), {}).get(seed)
            if name != BASELINE and theirs is not None:
                lam = curve(row, "lambda_curve")
                accuracies = ", ".join(f"{100 * float(of['accuracy_sampled']):.1f}" for of in (row, theirs))
                lines.append(
                    f"| {task} | {name.split()[1]} | {seed} | {lam.mean():+.2f}, {abs(lam).mean():.2f} | "
                    f"{settled_length(row):.1f}, {settled_length(theirs):.1f} | {accuracies} |"
                )
    return "\n".join(lines)


def speed_table(rows: Rows) -> str:
    """k of ln L ≈ k·λ per optimizer step: the movement under a fixed λ less that of dapo, over λ and steps."""
    windows = ((0, 3), (0, 8), (8, 20))
    lines = [
        "| task | λ | " + " | ".join(f"k, batches {a} to {b}" for a, b in windows) + " |",
        "|---|---|" + "---|" * len(windows),
    ]
    found = cells(rows, "identify")
    for (task, name), runs in found.items():
        if name == BASELINE or (task, BASELINE) not in found:
            continue
        ks = []
        for a, b in windows:
            moved = []
            for row in (*runs.values(), *found[task, BASELINE].values()):
                logs = np.log(curve(row, "length_curve"))
                moved.append(logs[b - 1 : b + 2].mean() - logs[max(0, a - 1) : a + 2].mean())
            # Each end is a mean over three batches, that of batch 0 over two.
            batches = b - (a if a else 0.5)
            steps = batches * int(next(iter(runs.values()))["steps_per_generation"])
            ks.append(f"{(moved[0] - moved[1]) / float(name.split()[1]) / steps:.3f}")
        lines.append(f"| {task} | {name.split()[1]} | {' | '.join(ks)} |")
    return "\n".join(lines)


def swing(row: dict[str, str], target: float) -> tuple[float, int]:
    """
    How far and how often a length swings about its target, by means of five successive generation batches: the lowest
    after the first at or below the target, as a part of it (1 if none is), and the crossings in the last 30.
    """
    means = np.convolve(curve(row, "length_curve"), np.ones(5) / 5, mode="valid") / target
    below = np.flatnonzero(means <= 1)
    lowest = float(means[below[0] :].min()) if len(below) else 1.0
    return lowest, int(np.count_nonzero(np.diff(means[-30:] > 1)))


def set_points_table(rows: Rows, task: str = "checked_sum", target: int = 22) -> str:
    """`length_target` and the rivals with a set point, on the test seeds: length, accuracy, swings of the length."""
    header = [
        "method",
        "seeds",
        "settled length: least, mean, most",
        "within 15 %",
        "sampled accuracy against dapo, points",
    ]
    header += ["tokens, held out", "mean training length", "lowest / target", "crossings"]
    theirs, lines = cells(rows)[task, BASELINE], []
    found = {name: runs for (of, name), runs in cells(rows, "set_points").items() if of == task}
    for name, runs in {f"target {target}": cells(rows)[task, f"target {target}"], **found}.items():
        seeds = sorted(set(runs) & set(theirs))
        if len(seeds) < 2:
            continue
        mine = [runs[seed] for seed in seeds]
        lengths, swings = [settled_length(row) for row in mine], [swing(row, target) for row in mine]
        gaps = [float(runs[s]["accuracy_sampled"]) - float(theirs[s]["accuracy_sampled"]) for s in seeds]
        lines.append(
            [
                name,
                str(len(seeds)),
                f"{min(lengths):.1f}, {statistics.fmean(lengths):.1f}, {max(lengths):.1f}",
                f"{sum(abs(length / target - 1) <= 0.15 for length in lengths)} of {len(seeds)}",
                interval_text(gaps, 100),
                f"{statistics.fmean(float(row['mean_length']) for row in mine):.1f}",
                f"{statistics.fmean(float(curve(row, 'length_curve').mean()) for row in mine):.1f}",
                f"{statistics.fmean(lowest for lowest, _ in swings):.2f}",
                f"{statistics.fmean(crossings for _, crossings in swings):.1f}",
            ]
        )
    return markdown_table(header, lines)


def all_tables(rows: Rows, ways: dict[str, str], promised: dict[str, int]) -> dict[str, str]:
    """The tables by the name that their markers carry."""
    return {
        "promise": promise_table(rows, promised),
        "set points": set_points_table(rows),
        "frontier": frontier_table(rows, ways),
        "ladder": ladder_table(rows, ways),
        "remedy": promise_table(rows, promised, "remedy"),
        "tune": ladder_table(rows, ways, "tune"),
        "step": step_table(rows),
        "own": own_table(rows),
        "speed": speed_table(rows),
    }


def step_table(rows: Rows) -> str:
    """
    Step responses: when the mean length over `SPAN` optimizer steps first is within 15 % of the target, when it is so
    for good, both by the middle of that span, and where it ends.
    """
    lines = [
        "| task | completions per batch | optimizer steps per batch | seeds | first within 15 %, optimizer step | "
        "for good | length at the end / target |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int, int], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        if row["study"] == "step":
            groups[row["task"], int(row["batch"]), int(row["steps_per_generation"])].append(row)
    for (task, batch, steps), runs in sorted(groups.items()):
        first, for_good, ends = [], [], []
        for row in runs:
            ratio = curve(row, "length_curve") / float(row["arm"].split()[1])
            width = SPAN // steps
            means = np.convolve(ratio, np.ones(width) / width, mode="valid")
            inside, outside = np.flatnonzero(abs(means - 1) < 0.15), np.flatnonzero(abs(means - 1) >= 0.15)
            settled = outside[-1] + 1 if len(outside) else 0
            middle = (width - 1) / 2
            first.append(f"{(inside[0] + middle) * steps:.0f}" if len(inside) else "never")
            for_good.append(f"{(settled + middle) * steps:.0f}" if settled < len(means) else "never")
            ends.append(f"{ratio[len(ratio) * 6 // 10 :].mean():.2f}")
        lines.append(
            f"| {task} | {batch} | {steps} | {len(runs)} | {', '.join(first)} | {', '.join(for_good)} | "
            f"{', '.join(ends)} |"
        )
    return "\n".join(lines)


def tables(rows: Rows, ways: dict[str, str], promised: dict[str, int]) -> str:
    """All tables, each under its name."""
    parts = all_tables(rows, ways, promised)
    return "\n\n".join(f"{name}\n\n{table}" for name, table in parts.items())


def draw_steps(rows: Rows) -> Any:
    """Length over target against optimizer steps, a panel per task, a line per cut into batches and steps."""
    groups: dict[str, dict[tuple[int, int], list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["study"] == "step":
            ratio = curve(row, "length_curve") / float(row["arm"].split()[1])
            groups[row["task"]][int(row["batch"]), int(row["steps_per_generation"])].append(ratio)
    figure, panels = new_figure(1, max(1, len(groups)), width=4.6, height=3.2)
    for axes, (task, cuts) in zip(panels.flat, groups.items(), strict=False):
        for ((batch, steps), ratios), (color, _) in zip(sorted(cuts.items()), STYLES, strict=False):
            mean = mean_and_band(ratios)[0]
            label = f"{batch} completions, {steps} step{'s' if steps > 1 else ''} per batch"
            axes.plot(steps * np.arange(len(mean)), mean, color=color, linewidth=1.1, label=label)
        axes.axhspan(0.85, 1.15, color="0.93", zorder=0)
        finish_panel(axes, task, "optimizer step", "mean length / target")
    add_legend(figure, "mean over seeds; grey: within 15 % of the target")
    return figure


def write(rows: Rows, ways: dict[str, str], promised: dict[str, int], folder: Path, page: Path) -> None:
    """
    Write the tables between the markers of `page`, and the pictures beside the rows.

    Args:
        rows (`list[dict]`): of `budget.csv`.
        ways (`dict[str, str]`): the ways of saving tokens, by the first word of a method's name.
        promised (`dict[str, int]`): the targets to hold, by task.
        folder (`Path`): for `budget_frontier.png` and `budget_steps.png`.
        page (`Path`): a markdown file with markers, as `replace_tables` wants them.
    """
    parts = all_tables(rows, ways, promised)
    page.write_text(replace_tables(page.read_text(encoding="utf-8"), parts), encoding="utf-8")
    draw_frontier(rows, ways).savefig(folder / "budget_frontier.png", dpi=130)
    draw_steps(rows).savefig(folder / "budget_steps.png", dpi=130)
