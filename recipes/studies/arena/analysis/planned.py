"""
The second round's tables and picture, from `results/planned.csv`, `planned_rates.csv` and `planned_alignment.csv`; any
part of them will do.

    python -m recipes.studies.arena.analysis.planned

It replaces the tables that it knows in the arena's `README.md`, and writes
`results/planned.png`. The questions and how they are decided are in `recipes/studies/arena/PLAN.md`. It needs
`pip install "trl-lambda[arena]"`.
"""

import argparse
import csv
import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from recipes.studies.alignment.summary import summary_rows
from recipes.studies.arena.analysis.comparisons import compare
from recipes.studies.arena.analysis.questions import (
    IDLE,
    MATTERS,
    WINDOW,
    Answer,
    Groups,
    answer,
    budget,
    verdict,
)
from recipes.studies.arena.analysis.runs import paired_differences, read_runs, values_of
from recipes.studies.arena.analysis.tables import SHOWN, difference_cell
from recipes.studies.shared.markdown import markdown_table, mean_and_error, replace_tables
from recipes.studies.shared.paired_statistics import mean_and_band
from recipes.studies.shared.panels import add_legend, finish_panel, new_figure

RESULTS = Path(__file__).resolve().parent.parent / "results"
ALIGNMENT = RESULTS.parents[1] / "alignment" / "results"
PAGES = (RESULTS.parent / "README.md",)
_DRAWN = {
    "dapo": ("#000000", "-"),
    "positive_weight_3": ("#E69F00", (0, (5, 1.5))),
    "positive3": ("#0072B2", "-"),
    "positive3_x3": ("#D55E00", (0, (5, 1.5, 1, 1.5))),
}
# What a table's title says of a study; "main" is `recipes.studies.arena.large`'s.
_STUDIES = {
    "planned": "",
    "planned_long": ", 300 steps",
    "planned_one_step": ", one step per generation batch",
    "main": ", 1.1 million parameters",
}
_ARM_METRICS = ("auc", "accuracy_sampled", "accuracy_greedy", "mean_length", "entropy")
_ASKED = {
    "H1a": "Does `positive3` start faster than `dapo`?",
    "H1b": "Faster than right answers counted 3 times?",
    "H2": "No harm where length is idle, or long answers pay anyway?",
    "H3": "Does it last for 300 steps?",
    "H3b": "And on policy?",
    "H4": "Is λ × v more than either?",
    "H5": "Does its direction lie nearer to the policy gradient?",
    "6": "Is it a larger learning rate in disguise?",
    "H2 again": "After the answers: no harm of `positive3_x3` there?",
    "H3 again": "And does `positive3_x3` last for 300 steps?",
}
_WORD = {True: "yes", False: "no", None: "not run"}


def make_tables(groups: Groups, rates: list[dict[str, str]], alignment: list[dict[str, Any]]) -> dict[str, str]:
    """
    Args:
        groups (`dict`): `read_runs` of `planned.csv`.
        rates (`list`): rows of `planned_rates.csv`.
        alignment (`list`): `pooled_alignment` of `planned_alignment.csv`.

    Returns:
        `dict[str, str]`: markdown by the name that the page's markers carry.
    """
    answers = answer(groups)
    return {
        "answers": _answers_table(answers, rates, alignment),
        "claims": _claims_table(answers),
        "planned_arms": _arms_tables(groups),
        "budget": _budget_table(groups),
        "rates": _rates_table(rates),
        "planned_alignment": _alignment_table(alignment),
    }


def pooled_alignment(path: Path) -> list[dict[str, Any]]:
    """`summary_rows` of the file, with the mean `r2` over seeds; no rows without the file."""
    if not path.exists():
        return []
    r2 = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["r2"]:
                r2[row["task"], row["checkpoint"], row["weight"]].append(float(row["r2"]))
    rows = summary_rows(path)
    for row in rows:
        values = r2.get((row["task"], row["checkpoint"], row["weight"]))
        row["r2"] = float(np.mean(values)) if values else None
    return rows


def _points(found: Answer) -> str:
    """`+4.1 [+3.2, +5.0]`, with the interval that decides: 95 %, or 90 % where one side is asked."""
    comparison, metric = found.comparison, SHOWN[found.claim.metric]
    if comparison is None:
        return "not run"
    one_sided = found.claim.not_lower or not found.claim.in_family
    low, high = (found.low90, found.high90) if one_sided else (comparison.low, comparison.high)
    assert low is not None and high is not None
    factor = metric[2]
    level = " (90 %)" if one_sided else ""
    return f"{factor * comparison.difference:+.1f} [{factor * low:+.1f}, {factor * high:+.1f}]{level}"


def _answers_table(answers: list[Answer], rates: list[dict[str, str]], alignment: list[dict[str, Any]]) -> str:
    rows = []
    for question, asked in _ASKED.items():
        if question == "H5":
            holds, shown = _alignment_answer(alignment)
        elif question == "6":
            holds, shown = _rates_answer(rates)
        else:
            own = [a for a in answers if a.claim.question == question]
            holds = verdict(answers, question)
            held = sum(a.holds is True for a in own)
            shown = f"{held} of {len(own)} comparisons hold"
            lines = {(a.claim.task, a.claim.metric): _points(a) for a in own}
            if len(lines) == len(own):
                parts = [f"{task} {_short(metric)}{text}" for (task, metric), text in lines.items()]
                shown = "; ".join([shown, *parts])
            else:
                shown += ": see the table of all comparisons"
        rows.append([question, asked, f"**{_WORD[holds]}**", shown])
    return markdown_table(["", "question", "answer", "points of mean training reward, if nothing else is said"], rows)


def _short(metric: str) -> str:
    return "" if metric == "auc" else f"{SHOWN[metric][0]} "


def _claims_table(answers: list[Answer]) -> str:
    rows = []
    for found in answers:
        claim, comparison = found.claim, found.comparison
        p = "–" if comparison is None or comparison.p is None else f"{comparison.p:.2g}"
        p_holm = "–" if comparison is None or comparison.p_holm is None else f"{comparison.p_holm:.2g}"
        rows.append([
            claim.question, claim.task, f"`{claim.arm}`", f"`{claim.baseline}`", SHOWN[claim.metric][0],
            "not lower by 1" if claim.not_lower else "higher", str(comparison.n if comparison else 0),
            _points(found), p, p_holm, _WORD[found.holds],
        ])  # fmt: skip
    header = ["question", "task", "arm", "against", "metric", "claim", "seeds", "points [interval]", "p", "Holm p"]
    return markdown_table([*header, "holds"], rows)


def _arms_tables(groups: Groups) -> str:
    tables = []
    for (study, task), group in groups.items():
        header = ["arm", "seeds"]
        for metric in _ARM_METRICS:
            name, unit = SHOWN[metric][:2]
            header += [f"{name}, {'%' if unit == 'points' else unit}", "to `dapo` [95 %]"]
        header.append("gradient norm")
        rows = []
        for arm, runs in sorted(group.items(), key=lambda item: -values_of(item[1], "auc").mean()):
            row = [f"`{arm}`", str(len(runs))]
            for metric in _ARM_METRICS:
                factor, decimals = SHOWN[metric][2:]
                differences = paired_differences(runs, group.get("dapo", {}), metric)
                compared = arm != "dapo" and len(differences) > 0
                cell = difference_cell(
                    compare(arm, "dapo", differences) if compared else None, len(runs), factor, decimals
                )
                row += [mean_and_error(values_of(runs, metric), factor, decimals), "" if arm == "dapo" else cell]
            rows.append([*row, mean_and_error(values_of(runs, "grad_norm_mean"), 1, 3)])
        tables.append(f"**{task}{_STUDIES.get(study, f', {study}')}**\n\n{markdown_table(header, rows)}")
    return "\n\n".join(tables)


def _budget_table(groups: Groups) -> str:
    rows = []
    for task in MATTERS:
        group = groups.get(("planned", task), {})
        for arm, runs in group.items():
            found = budget(runs, group.get("dapo", {})) if arm != "dapo" else None
            if found is not None:
                cells = [f"{m:.2f} [{low:.2f}, {high:.2f}]" for m, low, high in (found.steps, found.tokens)]
                rows.append([task, f"`{arm}`", str(found.seeds), *cells, "" if found.reached else "not reached"])
    return markdown_table(["task", "arm", "seeds", "optimizer steps, ratio", "tokens, ratio", ""], rows)


def _rate_cells(rates: list[dict[str, str]]) -> dict[tuple[str, str, float], np.ndarray]:
    cells = defaultdict(list)
    for row in rates:
        cells[row["task"], row["arm"], float(row["learning_rate"])].append(float(row["auc"]))
    return {key: np.array(values) for key, values in cells.items()}


def _rates_table(rates: list[dict[str, str]]) -> str:
    cells = _rate_cells(rates)
    grid = sorted({rate for *_, rate in cells})
    rows = [
        [task, f"`{arm}`", *(mean_and_error(cells.get((task, arm, rate), np.array([])), 100, 1) for rate in grid)]
        for task, arm in dict.fromkeys((task, arm) for task, arm, _ in cells)
    ]
    return markdown_table(["task", "arm", *(f"{rate:g}" for rate in grid)], rows)


def _rates_answer(rates: list[dict[str, str]]) -> tuple[bool | None, str]:
    """Yes, it is one in disguise, where the best `dapo` of the grid is no worse than the best `positive3`."""
    cells, shown, worse = _rate_cells(rates), [], []
    for task in MATTERS:
        best = {
            arm: max(((v.mean(), rate) for (t, a, rate), v in cells.items() if (t, a) == (task, arm)), default=None)
            for arm in ("dapo", "positive3")
        }
        if best["dapo"] is None or best["positive3"] is None:
            return None, ""
        worse.append(bool(best["dapo"][0] < best["positive3"][0]))
        both = (f"`{arm}` {100 * found[0]:.1f} at {found[1]:g}" for arm, found in best.items() if found)
        shown.append(f"{task}, best of the grid: {', '.join(both)}")
    return not all(worse), "; ".join(shown)


def _settled(alignment: list[dict[str, Any]], weight: str) -> Iterable[dict[str, Any]]:
    return (row for row in alignment if row["weight"] == f"{weight}_settled")


def _alignment_answer(alignment: list[dict[str, Any]]) -> tuple[bool | None, str]:
    own = {(row["task"], row["checkpoint"]): row for row in _settled(alignment, "positive3")}
    tasks = (*MATTERS, *IDLE)
    if len(own) < 5 * len(tasks):
        return None, f"{len(own)} of {5 * len(tasks)} checkpoints measured"
    explained = [task for task in tasks if own[task, "base"]["r2"] > 0.2]
    theirs = [row for (task, _), row in own.items() if task in explained]
    above = sum(row["ratio_adam"] > 1.1 for row in theirs)
    lowest = min(own.values(), key=lambda row: row["ratio_adam"])
    base = ", ".join(
        f"{task} {own[task, 'base']['ratio_adam']:.2f} (R² {own[task, 'base']['r2']:.2f})" for task in tasks
    )
    shown = f"ratio at the base model: {base}; lowest {lowest['ratio_adam']:.2f} ± {lowest['ratio_adam_se']:.2f} "
    shown += f"({lowest['task']}, {lowest['checkpoint']})"
    shown += f"; above 1.1 at {above} of the {len(theirs)} checkpoints of the tasks with R² > 0.2 at the base model"
    return above == len(theirs) and lowest["ratio_adam"] >= 0.98, shown


def _alignment_table(alignment: list[dict[str, Any]]) -> str:
    weights = ("positive3_settled", "positive_settled", "positive_weight_3")
    found = {(row["task"], row["checkpoint"], row["weight"]): row for row in alignment}
    rows = []
    for task, checkpoint in dict.fromkeys((row["task"], row["checkpoint"]) for row in alignment):
        cells = []
        for weight in weights:
            row = found.get((task, checkpoint, weight))
            cells.append(f"{row['ratio_adam']:.2f} ± {row['ratio_adam_se']:.2f}" if row else "–")
        critic, base = found.get((task, checkpoint, weights[0])), found.get((task, checkpoint, "dapo"))
        r2 = f"{critic['r2']:.2f}" if critic and critic["r2"] is not None else "–"
        accuracy = f"{100 * base['accuracy']:.0f}" if base else "–"
        rows.append([task, checkpoint, accuracy, *cells, r2, str(critic["seeds"] if critic else 0)])
    header = ["task", "checkpoint", "accuracy, %", *(f"`{weight}`" for weight in weights), "R² of the critic", "seeds"]
    return markdown_table(header, rows)


def draw(groups: Groups) -> Any:
    """Curves of training reward on the two tasks of H1, and under them the differences of the arms to `dapo`."""
    figure, panels = new_figure(2, len(MATTERS), width=5.4, height=3.2)
    for column, task in enumerate(MATTERS):
        group = groups.get(("planned", task), {})
        top, bottom = panels[0][column], panels[1][column]
        for arm, (color, dash) in _DRAWN.items():
            curves = [run.curves["reward_curve"] for run in group.get(arm, {}).values()]
            if not curves:
                continue
            windows = [np.convolve(curve, np.ones(WINDOW) / WINDOW, mode="valid") for curve in curves]
            mean, band = mean_and_band(windows)
            steps = (np.arange(len(mean)) + WINDOW) * 100 / len(curves[0])
            top.plot(steps, 100 * mean, color=color, linestyle=dash, linewidth=1.7, label=arm)
            if band is not None:
                top.fill_between(steps, 100 * (mean - band), 100 * (mean + band), color=color, alpha=0.1, linewidth=0)
        finish_panel(top, task, "optimizer step", "training reward, %")
        differences = {
            arm: 100 * paired_differences(runs, group.get("dapo", {}), "auc")
            for arm, runs in group.items()
            if arm not in ("dapo", "tr", "ar_0.6")
        }
        arms = [arm for arm, values in differences.items() if len(values) > 1]
        arms.sort(key=lambda arm: differences[arm].mean())
        for place, arm in enumerate(arms):
            found = compare(arm, "dapo", differences[arm])
            color = _DRAWN.get(arm, ("0.35", "-"))[0]
            bottom.plot([found.low, found.high], [place, place], color=color, linewidth=1.5)
            bottom.plot([found.difference], [place], marker="o", color=color, markersize=5)
        bottom.axvline(0, color="0.4", linewidth=0.9)
        bottom.set_yticks(range(len(arms)), arms, fontsize=9)
        finish_panel(bottom, f"{task}: mean reward against dapo", "points, 95 % interval", "")
    title = f"Training reward, mean over {WINDOW} generation batches and over seeds, with its 95 % band"
    add_legend(figure, title, order=tuple(_DRAWN))
    return figure


def write(results: Path, pages: Iterable[Path]) -> list[Path]:
    """
    Write tables and picture.

    Args:
        results (`Path`): the folder with the rows.
        pages (`Iterable[Path]`): whose tables are replaced, where they exist.

    Returns:
        `list[Path]`: the files written.

    Raises:
        FileNotFoundError: there is no `planned.csv`.
        ValueError: its rows are not those of runs.
    """
    groups = read_runs(results / "planned.csv")
    written = [results / "planned.png"]
    draw(groups).savefig(written[0], dpi=150)
    tables = tables_of(results)
    for page in (page for page in pages if page.exists()):
        page.write_text(replace_tables(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
        written.append(page)
    return written


def tables_of(results: Path) -> dict[str, str]:
    """`make_tables` of the files in a folder, and of the alignment study's beside the shipped ones."""
    rates_file = results / "planned_rates.csv"
    rates: list[dict[str, str]] = []
    if rates_file.exists():
        with rates_file.open(newline="", encoding="utf-8") as file:
            rates = list(csv.DictReader(file))
    groups = read_runs(results / "planned.csv")
    alignment = (ALIGNMENT if results.resolve() == RESULTS else results) / "planned_alignment.csv"
    tables = make_tables(groups, rates, pooled_alignment(alignment))
    larger = results.with_name(f"{results.name}_0.8M") / "runs.csv"  # of `recipes.studies.arena.large`
    return tables | {"larger": _arms_tables(read_runs(larger))} if larger.exists() else tables


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows; default: %(default)s")
    options = parser.parse_args(arguments)
    pages = PAGES if options.results.resolve() == RESULTS else (options.results / "README.md",)
    try:
        written = write(options.results, pages)
    except (ValueError, ImportError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    for path in written:
        print(os.path.relpath(path))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
