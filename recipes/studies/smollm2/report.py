"""
Tables and picture of the study, from `results/runs.csv`; any part of the rows will do.

    python -m recipes.studies.smollm2.report

It replaces the tables in `README.md`, and writes `results/smollm2.png` and `results/summary.png`, the picture of the
repository's README.
"""

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.markdown import markdown_table, replace_tables
from recipes.studies.shared.paired_statistics import (
    bootstrap_interval,
    holm,
    mean_and_band,
    paired_t_p,
    resolvable_difference,
)
from recipes.studies.shared.panels import add_legend, finish_panel, new_figure
from recipes.studies.smollm2.alignment import KEY as ALIGNMENT_KEY
from recipes.studies.smollm2.arms import TARGET
from recipes.studies.smollm2.run import TASKS
from recipes.studies.smollm2.study import KEY, PARTS, RESULTS, SEEDS, specs_of

PAGE = RESULTS.parent / "README.md"
BASELINE, AGAIN = "dapo", "dapo_again"
PUBLISHED = ("softmax", "tr", "softmax_tr")
LEVEL, MARGIN = 0.05, 0.05
WINDOW, SETTLED = 5, 10  # steps
_DRAWN = {
    "dapo": ("TRL's dapo", "#000000", "-"),
    "softmax": ("λ-GRPO", "#0072B2", "-"),
    "tr": ("TR-GRPO", "#E69F00", (0, (5, 1.5))),
    "softmax_tr": ("both", "#D55E00", (0, (5, 1.5, 1, 1.5))),
}

Rows = list[dict[str, str]]
Cells = dict[tuple[str, str], dict[int, dict[str, str]]]


def cells_of(rows: Rows) -> Cells:
    """(task, arm) -> seed -> row, of the runs on test seeds."""
    found: Cells = defaultdict(dict)
    for row in rows:
        if row["study"] == "main":
            found[row["task"], row["arm"]][int(row["seed"])] = row
    return found


def curve(row: dict[str, str], name: str) -> np.ndarray:
    """A curve of a row, one value per step."""
    return np.array([float(value) for value in row[name].split()])


def differences(cells: Cells, task: str, arm: str, column: str = "auc") -> list[float]:
    """Arm minus `dapo`, of the seeds that both have."""
    mine, theirs = cells.get((task, arm), {}), cells.get((task, BASELINE), {})
    return [float(mine[seed][column]) - float(theirs[seed][column]) for seed in sorted(mine.keys() & theirs.keys())]


def yardstick_table(cells: Cells) -> str:
    """`dapo` against `dapo` with other replies, and the difference that so many pairs resolve."""
    lines = []
    for task in dict.fromkeys(task for task, arm in cells if arm == AGAIN):
        gaps = differences(cells, task, AGAIN)
        if len(gaps) > 1:
            sd, runs = statistics.stdev(gaps), [float(row["auc"]) for row in cells[task, BASELINE].values()]
            resolved = [resolvable_difference(sd, len(gaps), alpha=alpha) for alpha in (LEVEL, LEVEL / 6)]
            lines.append(
                [
                    task,
                    str(len(gaps)),
                    f"{100 * statistics.stdev(runs):.1f}",
                    interval_cell(gaps),
                    f"{100 * sd:.1f}",
                    ", ".join(f"{100 * value:.1f}" for value in resolved),
                ]
            )
    header = ["task", "pairs", "sd of `dapo` over seeds", "`dapo_again` - `dapo`", "sd of the difference"]
    return markdown_table([*header, "resolved: one comparison, six"], lines)


def interval_cell(gaps: list[float]) -> str:
    """Mean difference in points with its 95 % interval."""
    few = len(gaps) < 3 or len(set(gaps)) < 2
    values = (statistics.fmean(gaps), *(() if few else bootstrap_interval(gaps)))
    mean, *limits = (f"{round(100 * value, 1) + 0.0:+.1f}" for value in values)  # + 0.0: no -0.0
    return f"{mean} [{', '.join(limits)}]" if limits else mean


def verdict(gaps: list[float], p: float) -> str:
    """PLAN.md's rule for one task: yes or no with `p` corrected, else unknown."""
    low, high = bootstrap_interval(gaps)
    if p < LEVEL:
        return "higher" if statistics.fmean(gaps) > 0 else "lower"
    return "level" if -MARGIN < low and high < MARGIN else "unknown"


def answers_table(cells: Cells, arms: tuple[str, ...], tasks: tuple[str, ...]) -> str:
    """Mean training reward of each arm against `dapo`; Holm's correction over the comparisons planned."""
    asked = [(task, arm) for arm in arms for task in tasks]
    gaps = {cell: differences(cells, *cell) for cell in asked}
    ready = [cell for cell in asked if len(gaps[cell]) == len(SEEDS)]  # no answer before the last seed
    # Comparisons that have not run count in the correction.
    corrected = holm([paired_t_p(gaps[cell]) for cell in ready] + [1.0] * (len(asked) - len(ready)))
    lines = []
    for cell in asked:
        task, arm = cell
        count = len(gaps[cell])
        found = ["not run", "", ""]
        if count:
            found = [interval_cell(gaps[cell]), "", f"open: {count} of {len(SEEDS)} pairs"]
        if cell in ready:
            p = corrected[ready.index(cell)]
            found = [interval_cell(gaps[cell]), f"{p:.2g}", verdict(gaps[cell], p)]
        accuracy = differences(cells, task, arm, "accuracy_sampled")
        lines.append([arm, task, str(count), *found, interval_cell(accuracy) if accuracy else ""])
    header = ["arm", "task", "pairs", "mean training reward - `dapo`'s", "p, Holm", "answer"]
    return markdown_table([*header, "sampled accuracy - `dapo`'s, no test"], lines)


def steps_to(runs: list[dict[str, str]], level: float) -> str:
    """First step at which the mean of `WINDOW` steps reaches a reward, the median of the runs."""
    reached = []
    for row in runs:
        means = np.convolve(curve(row, "reward_curve"), np.ones(WINDOW) / WINDOW, mode="valid")
        above = np.flatnonzero(means >= level)
        reached.append(above[0] + WINDOW if len(above) else np.inf)
    median = float(np.median(reached))
    return f"{median:g}" if np.isfinite(median) else "not reached"


def arms_table(cells: Cells) -> str:
    """Every arm's figures, means over its seeds."""
    lines = []
    for (task, arm), runs in cells.items():
        rows, base = list(runs.values()), list(cells.get((task, BASELINE), {}).values())
        if not base:
            continue
        last = statistics.fmean(float(curve(row, "reward_curve")[-WINDOW:].mean()) for row in base)
        at_max = [curve(row, "at_max_curve") for row in rows if row["at_max_curve"]]
        lambdas = [curve(row, "lambda_curve")[-1] for row in rows if row["lambda_curve"]]

        def mean(column: str, factor: float, digits: int, rows: Rows = rows) -> str:
            return f"{factor * statistics.fmean(float(row[column]) for row in rows):.{digits}f}"

        ends = [statistics.fmean(values[k] for values in at_max) for k in (0, -1)] if at_max else []
        lines.append(
            [
                task,
                arm,
                str(len(rows)),
                mean("auc", 100, 1),
                mean("accuracy_sampled", 100, 1),
                mean("accuracy_greedy", 100, 1),
                steps_to(rows, last),
                mean("mean_length", 1, 1),
                mean("entropy", 1, 2),
                mean("grad_norm_mean", 1, 2),
                " → ".join(f"{100 * end:.0f} %" for end in ends),
                f"{np.min(lambdas):+.3f} to {np.max(lambdas):+.3f}" if lambdas else "",
            ]
        )
    header = ["task", "arm", "seeds", "mean training reward", "sampled accuracy", "greedy accuracy"]
    header += ["steps to `dapo`'s last level", "tokens, held out", "entropy, last step", "gradient norm"]
    return markdown_table([*header, "tokens at v's upper bound, first → last step", "λ at the end"], lines)


def signs_table(cells: Cells) -> str:
    """In how many runs λ ends below 0, how far from it, and how often nearer than on the first task."""
    lines: list[list[str]] = []
    first: dict[tuple[str, int], float] = {}
    for task in dict.fromkeys(task for task, _ in cells):
        runs = [(arm, cells.get((task, arm), {})) for arm in ("softmax", "softmax_tr")]
        ends = {(arm, seed): float(curve(row, "lambda_curve")[-1]) for arm, of in runs for seed, row in of.items()}
        pairs = [abs(ends[run]) < abs(first[run]) for run in ends.keys() & first.keys()]
        size = f"{statistics.fmean(map(abs, ends.values())):.3f}" if ends else ""
        below = f"{sum(end < 0 for end in ends.values())} of {len(ends)}"
        lines.append([task, below, size, f"{sum(pairs)} of {len(pairs)}" if pairs else ""])
        first = first or ends
    header = ["task", "runs of `softmax` and `softmax_tr` with λ < 0 at the end", r"mean of \|λ\|"]
    return markdown_table([*header, "pairs in which it is nearer to 0 than on the first task"], lines)


def length_table(rows: Rows) -> str:
    """Four ways to a length: who holds it over the last `SETTLED` steps, and what accuracy it costs against `dapo`."""
    found = cells_of([{**row, "study": "main"} for row in rows if row["study"] == "length"])
    lines = []
    for task, arm in found:
        runs, gaps = found[task, arm], differences(found, task, arm, "accuracy_sampled")
        settled = [float(curve(row, "length_curve")[-SETTLED:].mean()) for row in runs.values()]
        held = sum(abs(length / TARGET - 1) <= 0.15 for length in settled)
        tokens, greedy = (
            statistics.fmean(float(row[column]) for row in runs.values())
            for column in ("mean_length", "accuracy_greedy")
        )
        cost = "" if arm == BASELINE or not gaps else interval_cell(gaps)
        ends = f"{min(settled):.1f}, {max(settled):.1f}"
        lines.append([arm, str(len(runs)), str(held), ends, f"{tokens:.1f}", cost, f"{100 * greedy:.1f}"])
    header = ["way", "seeds", f"within 15 % of {TARGET}", "settled tokens: least, most", "tokens, held out"]
    return markdown_table([*header, "sampled accuracy - `dapo`'s", "greedy accuracy"], lines)


def alignment_table(rows: Rows) -> str:
    """How much nearer than `dapo`'s each weight's update lies to the policy gradient, in two metrics."""
    lines = []
    for row in rows:
        ratios = [(float(row[f"ratio_{name}"]), float(row[f"ratio_{name}_se"])) for name in ("raw", "adam")]
        if row["weight"] != BASELINE:
            nearer, farther = (all(side * (ratio - 1) > 2 * error for ratio, error in ratios) for side in (1, -1))
            answer = "nearer" if nearer else "farther" if farther else "unknown"
            if row["same_as"] or not any(error for _, error in ratios):  # λ is 0 there, also where its rule leaves it
                answer = f"as `{row['same_as'] or BASELINE}`"
            lines.append([row["task"], row["weight"], *(f"{r:.3f} ± {e:.3f}" for r, e in ratios), answer])
    header = ["task", "weight", "ratio of cosines, plain gradient", "as Adam scales it", "answer"]
    return markdown_table(header, lines) if lines else "Not run."


def not_run(rows: Rows, aligned: Rows) -> str:
    """Planned runs, and tasks of the alignment, without a row."""
    done = {(row["study"], row["task"], row["arm"], int(row["seed"])) for row in rows}
    missing: dict[tuple[str, str, str], int] = defaultdict(int)
    for part in PARTS:
        for spec in specs_of(part):
            if part != "tune" and (spec.study, spec.task, spec.arm, spec.seed) not in done:
                missing[spec.study, spec.task, spec.arm] += 1
    lines = [[*cell, str(count)] for cell, count in missing.items()]
    lines += [["alignment", task, "all", "1"] for task in TASKS if all(row["task"] != task for row in aligned)]
    return markdown_table(["part", "task", "arm", "seeds not run"], lines) if lines else "Every planned run has a row."


def draw(cells: Cells) -> Any:
    """Share of right replies, their length and λ over steps: a row of panels per task."""
    tasks = [task for task in dict.fromkeys(task for task, _ in cells) if (task, BASELINE) in cells]
    figure, panels = new_figure(max(1, len(tasks)), 3, width=3.4, height=2.6)
    for axes, task in zip(panels, tasks, strict=False):
        for arm, (label, color, style) in _DRAWN.items():
            runs = list(cells.get((task, arm), {}).values())
            for panel, name in zip(axes, ("reward_curve", "length_curve", "lambda_curve"), strict=True):
                curves = [curve(row, name) for row in runs if row[name]]
                if not curves:
                    continue
                mean, band = mean_and_band(curves)
                steps = np.arange(len(mean)) * (5 if name == "lambda_curve" else 1)
                if arm in (BASELINE, "softmax_tr") and band is not None:
                    panel.fill_between(steps, mean - band, mean + band, color=color, alpha=0.12, linewidth=0)
                panel.plot(steps, mean, color=color, linestyle=style, linewidth=1.3, label=label)
        for panel, title in zip(axes, ("share of right replies", "tokens per reply", "λ"), strict=True):
            finish_panel(panel, f"{task}: {title}", "optimizer step", "")
            panel.xaxis.get_major_locator().set_params(integer=True)
    add_legend(figure, "mean over seeds; bands: 95 %, of two arms")
    return figure


def draw_summary(cells: Cells, task: str = "products") -> Any:
    """The README's picture: answers become right and short, and λ beside them; one thin line per seed of both arms."""
    shown = {arm: cells.get((task, arm), {}) for arm in (BASELINE, "softmax_tr")}
    seeds = sorted(set.intersection(*map(set, shown.values())))
    figure, panels = new_figure(1, 3, width=3.3, height=2.3)
    titles = ("answers that are right", "tokens per answer", "λ (below 0: short answers weigh more)")
    for panel, name, title in zip(panels[0], ("reward_curve", "length_curve", "lambda_curve"), titles, strict=True):
        for arm, label, color in ((BASELINE, "TRL's dapo", "0.55"), ("softmax_tr", "λ-GRPO with TR-GRPO", "#D55E00")):
            curves = [curve(shown[arm][seed], name) for seed in seeds if shown[arm][seed][name]]
            steps = [(5 if name == "lambda_curve" else 1) * np.arange(len(values)) for values in curves]
            for x, values in zip(steps, curves, strict=True):
                panel.plot(x, values, color=color, linewidth=0.6, alpha=0.4)
            if curves:
                panel.plot(steps[0], np.mean(curves, axis=0), color=color, linewidth=2, label=label)
        finish_panel(panel, title, "optimizer step", "")
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0, 0].yaxis.set_major_formatter("{x:.0%}")
    add_legend(figure, f"SmolLM2-135M learns one-digit products on a CPU core (thick: mean of {len(seeds)} seeds)")
    return figure


def main(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write tables and picture."""
    rows = Ledger(results / "runs.csv", KEY).rows()
    aligned = Ledger(results / "alignment.csv", ALIGNMENT_KEY).rows()
    cells = cells_of(rows)
    tables = {
        "yardstick": yardstick_table(cells),
        "published": answers_table(cells, PUBLISHED, PARTS["products"][0] + PARTS["named"][0]),
        "controls": answers_table(cells, PARTS["controls"][1], PARTS["controls"][0]),
        "arms": arms_table(cells),
        "signs": signs_table(cells),
        "length": length_table(rows),
        "alignment": alignment_table(aligned),
        "not run": not_run(rows, aligned),
    }
    page.write_text(replace_tables(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
    draw(cells).savefig(results / "smollm2.png", dpi=130)
    draw_summary(cells).savefig(results / "summary.png", dpi=130)


if __name__ == "__main__":
    main()
