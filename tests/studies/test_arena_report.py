"""The arena's statistics against hand-worked and simulated truth, and its report on runs with a planted effect."""

import csv
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from study_rows import study_row, write_rows

from recipes.studies.arena.analysis import report
from recipes.studies.arena.analysis.comparisons import Arena, Comparison, compare_all
from recipes.studies.arena.analysis.curves import draw_curves
from recipes.studies.arena.analysis.runs import METRICS, paired_differences, read_runs
from recipes.studies.arena.analysis.tables import difference_cell, make_tables
from recipes.studies.shared.markdown import mean_and_error, replace_tables
from recipes.studies.shared.paired_statistics import (
    bootstrap_interval,
    holm,
    paired_t_p,
    resolvable_difference,
    sign_flip_p,
    student_quantile,
)

TASKS = ("running_sum", "slippery_chain")
STUDIED = ("grpo", "dapo", "bnpo", "softmax", "power_adamw", "tr", "ar")
PLANTED = {"running_sum": 0.03, "slippery_chain": 0.035}  # of `tr`, in every accuracy


def make_rows(tasks=TASKS, arms=STUDIED, seeds=range(12), study="main"):
    """What a seed shares over arms, the planted effect, and noise."""
    rng, rows = np.random.default_rng(7), []
    for task, seed in itertools.product(tasks, seeds):
        shared = rng.normal(0, 0.05)
        for arm in arms:
            better = shared + PLANTED[task] * (arm == "tr")
            values = {name: 1 + 0.1 * rng.normal() for name in METRICS}
            values |= {name: better + 0.5 + rng.normal(0, 0.01) for name in ("accuracy_greedy", "accuracy_sampled")}
            rewards, learned = 0.4 + better + rng.normal(0, 0.01, 25), arm in ("softmax", "power_adamw")
            path = np.linspace(0, -0.3 if task == "slippery_chain" else 0.3, 21) + rng.normal(0, 0.02, 21)
            values |= {"auc": rewards.mean(), "token_weight_mean": 1.37 if arm == "tr" else ""}
            values |= {"lambda_20": path[4] if learned else "", "lambda_100": path[20] if learned else ""}
            values["lambda_curve"] = " ".join(f"{value:.5f}" for value in path) if learned else ""
            rows.append(study_row(task, arm, seed, rewards, study, **values))
    return rows


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of a report on runs in any order, with a page that has markers."""
    folder, rows = tmp_path_factory.mktemp("arena"), make_rows()
    np.random.default_rng(0).shuffle(rows)
    write_rows(rows, folder / "runs.csv")
    tables = ("accuracy", "lengths", "paired", "sign", "resolution", "of others")
    page = "".join(f"<!-- table: {name} -->\nold\n<!-- end -->\n" for name in tables)
    (folder / "README.md").write_text(page, encoding="utf-8")
    assert report.main(["--results", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("draw", "mean", "low", "high"),
    [
        (lambda rng, size: rng.normal(size=size), 0.0, 0.937, 0.965),
        (lambda rng, size: rng.exponential(size=size), 1.0, 0.93, 0.965),  # Student's: 0.91
        (lambda rng, size: rng.lognormal(0, 0.7, size=size), math.exp(0.245), 0.91, 0.965),  # Student's: 0.89
    ],
)
def test_the_interval_of_twelve_covers_the_mean(draw, mean, low, high):
    """2000 samples, so that the share has a standard error of 0.005."""
    intervals = [bootstrap_interval(x, num_resamples=2000) for x in draw(np.random.default_rng(1), (2000, 12))]
    assert low < np.mean([left <= mean <= right for left, right in intervals]) < high


def test_intervals_fall_back_to_students_by_hand():
    by_hand = 4.302653 / math.sqrt(3)
    assert bootstrap_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - by_hand, 2 + by_hand), abs=1e-5)
    assert bootstrap_interval([0.25] * 12) == (0.25, 0.25)
    mostly_equal = [0.0] * 11 + [1.0]  # a third of the resamples have no spread
    by_hand = 2.200985 / 12
    assert bootstrap_interval(mostly_equal) == pytest.approx((1 / 12 - by_hand, 1 / 12 + by_hand), abs=1e-5)
    for probability, df, printed in ((0.975, 1, 12.706), (0.975, 11, 2.201), (0.9995, 11, 4.437), (0.025, 11, -2.201)):
        assert student_quantile(probability, df) == pytest.approx(printed, abs=5e-4)
    for test in (bootstrap_interval, paired_t_p, sign_flip_p):
        for differences in ([], [1.0, math.nan], [[1.0, 2.0]]):
            with pytest.raises(ValueError, match="finite numbers in one dimension"):
                test(differences)


def test_p_values_by_hand():
    # Of the sums ±1 ± 2 ± 3 two are at least 6 from zero, six at least 2, all eight at least 0.
    assert [sign_flip_p(x) for x in ([1, 2, 3], [1, -2, 3], [-1, -2, 3], [0, 0, 0])] == [2 / 8, 6 / 8, 1, 1]
    # 3 + 6 - 2 - 1 is as far from zero as -3 + 6 + 2 + 1, whatever they round to.
    assert sign_flip_p(np.array([3, 6, -2, -1]) / 7) == 10 / 16
    assert sign_flip_p(np.ones(40)) == 2 / 20001  # random flips, of which one pattern is at either end
    # t = 2√3 with two degrees of freedom, where P(|T| ≥ t) = 1 - t/√(2 + t²).
    assert paired_t_p([1, 2, 3]) == paired_t_p([-1, -2, -3]) == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-12)
    assert paired_t_p([0.0] * 12) == 1 and paired_t_p([0.5] * 4) == 2 / 16  # no spread: what four signs can say
    # Sorted 0.005·4, 0.01·3, 0.03·2, 0.04·1 = 0.02, 0.03, 0.06, 0.04: the last is raised to the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02]) and holm([0.6, 0.9]) == [1, 1]
    for effect, needed in ((0.5, 34), (0.8, 15)):  # Cohen's tables: power 0.8, two-sided 0.05
        assert resolvable_difference(1, needed) <= effect < resolvable_difference(1, needed - 1)


def test_pairs_are_of_one_seed(tmp_path):
    """Rows in any order; a seed that one arm lacks, or a metric that one run lacks, is left out."""
    rows = []
    for arm, seeds in (("tr", (2, 0, 3)), ("dapo", (3, 1, 2, 0))):
        for seed in seeds:
            auc = 0.1 * seed + (0.01 * seed**2 if arm == "tr" else 0)
            wrong = math.nan if seed == 3 and arm == "tr" else seed
            rows.append(study_row("running_sum", arm, seed, [0.5], auc=auc, mean_length_wrong=wrong))
    group = read_runs(write_rows(rows, tmp_path / "runs.csv"))["main", "running_sum"]
    assert list(group) == ["dapo", "tr"]
    assert paired_differences(group["tr"], group["dapo"], "auc") == pytest.approx([0.0, 0.04, 0.09])
    assert len(paired_differences(group["tr"], group["dapo"], "mean_length_wrong")) == 2
    comparison = compare_all(group, "auc")["tr", "dapo"]
    assert comparison.n == 3 and comparison.difference == pytest.approx(0.13 / 3)
    assert comparison.p == pytest.approx(paired_t_p([0.0, 0.04, 0.09])) and comparison.p_sign_flip == 0.5


def test_the_planted_effect_is_found_and_no_other_arm(results):
    """In all families that it is in; of the 18 families about one may hold a find that is none."""
    rows = list(csv.DictReader((results / "paired.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == len(TASKS) * 9 * (3 + 4 * 3) and {row["n"] for row in rows} == {"12"}
    accuracies = {"accuracy_greedy", "accuracy_sampled", "auc"}
    found = {(row["task"], row["metric"], row["arm"], row["baseline"]) for row in rows if float(row["p_holm"]) < 0.05}
    planted = set(itertools.product(TASKS, accuracies, ["tr"], ["grpo", "dapo", "bnpo"]))
    assert found >= planted and len({(task, metric) for task, metric, *_ in found - planted}) <= 1
    for row in (row for row in rows if row["arm"] == "tr" and row["metric"] == "auc"):
        low, difference, high, sd = (float(row[name]) for name in ("low", "difference", "high", "sd"))
        assert sd < 0.01 and abs(difference - PLANTED[row["task"]]) < 0.005  # what the seed shares, 0.05, is gone
        assert difference - 2 * sd < low < difference < high < difference + 2 * sd


def test_page_and_figures_show_the_numbers(results):
    page, arena = (results / "README.md").read_text(encoding="utf-8"), Arena.read(results / "runs.csv")
    assert page.count("\nold\n") == 1  # under the marker that is not this report's
    assert page == replace_tables(page, make_tables(arena))
    first, *_ = [line for line in make_tables(arena)["accuracy"].splitlines() if line.startswith("| `")]
    assert first.startswith("| `tr` | 12 |") and first.count("] * |") == 3
    differences = draw_curves(arena, "main").axes[1]
    drawn = {line.get_label(): np.mean(line.get_ydata()) for line in differences.lines}
    assert drawn["tr"] == pytest.approx(100 * PLANTED["running_sum"], abs=1) and abs(drawn["softmax"]) < 1


def test_cells_and_markers():
    found = Comparison("tr", "dapo", 12, 0.0123, 0.01, 0.002, 0.024, p=0.001, p_sign_flip=0.001, p_holm=0.06)
    assert difference_cell(found, 12, 100, 1) == "+1.2 [+0.2, +2.4]"
    assert difference_cell(replace(found, p_holm=0.04), 13, 100, 1) == "+1.2 [+0.2, +2.4] * (n = 12)"
    assert difference_cell(Comparison("tr", "dapo", 1, -0.0123), 1, 100, 1) == "-1.2 (1 seed)"
    assert mean_and_error(np.array([0.01, 0.02, 0.03]), 100, 3) == "2.000 ± 0.577"
    page = "a\n<!-- table: one -->\nold\n<!-- end -->\nb\n<!-- table: x -->\nkept\n"
    once = replace_tables(page, {"one": "| \\1 |", "two": "2"})
    assert once == page.replace("old", "| \\1 |") == replace_tables(once, {"one": "| \\1 |"})
    with pytest.raises(ValueError, match="table: one --> is not closed"):
        replace_tables("<!-- table: one -->\n<!-- table: two -->\n<!-- end -->\n", {"one": "1"})


def test_a_part_of_the_runs_will_do(tmp_path, capsys):
    """One seed of one task, a task without the reference, another study, no page."""
    rows = make_rows(tasks=TASKS[:1], seeds=[3]) + make_rows(tasks=TASKS[1:], arms=("grpo", "tr"), seeds=range(2))
    rows += make_rows(tasks=TASKS[:1], arms=("dapo", "tr"), seeds=range(3), study="one_step")
    write_rows(rows, tmp_path / "results" / "runs.csv")
    assert report.main(["--results", str(tmp_path / "results")]) == 0
    figures = {path.stem for path in (tmp_path / "results").glob("*.png")}
    names = {"accuracy_curves", "forest", "lengths"}
    assert figures == {*names, "lambda_paths", *(f"{name}_one_step" for name in names)}
    accuracy = make_tables(Arena.read(tmp_path / "results" / "runs.csv"))["accuracy"].split("**")
    assert "(1 seed)" in accuracy[2] and "±" not in accuracy[2] and accuracy[5] == "running_sum (study one_step)"
    assert report.main(["--results", str(tmp_path)]) == 1 and "runs.csv" in capsys.readouterr().err


def test_the_committed_page_shows_the_committed_runs():
    """No table by hand: the arena's page is what the report makes of its `runs.csv`."""
    page = report.PAGE.read_text(encoding="utf-8")
    assert page == replace_tables(page, make_tables(Arena.read(report.RESULTS / "runs.csv")))
