"""The arena's statistics against hand-worked and simulated truth, and its report on runs with a planted effect."""

import csv
import io
import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from recipes.studies.arena.analysis import report
from recipes.studies.arena.analysis.comparisons import Arena, Comparison, compare_all
from recipes.studies.arena.analysis.curves import draw_curves, draw_lambda_paths
from recipes.studies.arena.analysis.forest import draw_forest, draw_lengths
from recipes.studies.arena.analysis.runs import paired_differences, read_runs
from recipes.studies.arena.analysis.tables import difference_cell, make_tables
from recipes.studies.shared.arms import BASELINES
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
NUMBERS = (
    "accuracy_greedy", "accuracy_sampled", "auc", "mean_length", "mean_length_right", "mean_length_wrong",
    "accuracy_per_token", "entropy", "grad_norm_mean", "grad_norm_cv", "token_weight_mean", "lambda_20", "lambda_100",
)  # fmt: skip
PAGE = "# Arena\n\n" + "\n".join(
    f"{name}:\n\n<!-- table: {name} -->\nold\n<!-- end -->\n"
    for name in ("accuracy", "lengths", "paired", "sign", "resolution", "of others")
)


def make_row(task, arm, seed, rng, *, study="main", shared=0.0):
    """One run: what its seed shares over arms, the planted effect, and noise."""
    better = shared + PLANTED[task] * (arm == "tr")
    learned = arm in ("softmax", "power_adamw")
    path = np.linspace(0, -0.3 if task == "slippery_chain" else 0.3, 21) + rng.normal(0, 0.02, 21)
    rewards = 0.4 + better + rng.normal(0, 0.01, 25)
    values = {name: better + 0.5 + rng.normal(0, 0.01) for name in ("accuracy_greedy", "accuracy_sampled")}
    values |= {"auc": rewards.mean(), "mean_length_right": 21 + rng.normal(), "mean_length_wrong": 19 + rng.normal()}
    values |= {name: 1 + 0.1 * rng.normal() for name in NUMBERS if name not in values}
    values |= {"token_weight_mean": 1.37 if arm == "tr" else ""}
    values |= {name: path[int(name[7:]) // 5] if learned else "" for name in ("lambda_20", "lambda_100")}
    return {
        "study": study, "task": task, "arm": arm, "seed": seed, "learning_rate": "0.0003", "max_steps": 100,
        "steps_per_generation": 4, "options": "{}", **values,
        "reward_curve": " ".join(f"{value:.4f}" for value in rewards), "length_curve": "20.0 21.0",
        "lambda_curve": " ".join(f"{value:.5f}" for value in path) if learned else "", "seconds": 20.5,
        "commit": "0" * 7, "torch": "2", "trl": "1", "transformers": "5", "hardware": "none",
    }  # fmt: skip


def make_rows(tasks=TASKS, arms=STUDIED, seeds=range(12), **options):
    rng = np.random.default_rng(7)
    rows = []
    for task, seed in itertools.product(tasks, seeds):
        shared = rng.normal(0, 0.05)
        rows += [make_row(task, arm, seed, rng, shared=shared, **options) for arm in arms]
    return rows


def write_rows(rows, folder):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "runs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return folder / "runs.csv"


def read_rows(path):
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of runs in any order, beside a page with markers."""
    folder = tmp_path_factory.mktemp("arena")
    rows = make_rows()
    np.random.default_rng(0).shuffle(rows)
    write_rows(rows, folder / "results")
    (folder / "results" / "README.md").write_text(PAGE, encoding="utf-8")
    assert report.main(["--results", str(folder / "results")]) == 0
    return folder


@pytest.mark.parametrize(
    ("draw", "mean", "low", "high"),
    [
        (lambda rng, size: rng.normal(size=size), 0.0, 0.937, 0.965),
        (lambda rng, size: rng.exponential(size=size), 1.0, 0.93, 0.965),  # Student's interval: 0.91
        (lambda rng, size: rng.lognormal(0, 0.7, size=size), math.exp(0.245), 0.91, 0.965),  # Student's: 0.89
    ],
    ids=["normal", "exponential", "lognormal"],
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
    for unit in (0.1, 1 / 7, 1e-9):  # 3 + 6 - 2 - 1 is as far from zero as -3 + 6 + 2 + 1, whatever they round to
        assert sign_flip_p(unit * np.array([3, 6, -2, -1])) == 10 / 16
    assert sign_flip_p(np.ones(40)) == 2 / 20001  # random flips, of which one pattern is at either end
    # t = 2√3 with two degrees of freedom, where P(|T| ≥ t) = 1 - t/√(2 + t²).
    assert paired_t_p([1, 2, 3]) == paired_t_p([-1, -2, -3]) == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-12)
    assert paired_t_p([0.0] * 12) == 1 and paired_t_p([0.5] * 4) == 2 / 16  # no spread: what four signs can say
    # Sorted 0.005·4, 0.01·3, 0.03·2, 0.04·1 = 0.02, 0.03, 0.06, 0.04: the last is raised to the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02]) and holm([0.6, 0.9]) == [1, 1]
    # Why Holm is given Student's p: sign flips of twelve seeds cannot pass it.
    assert holm([sign_flip_p(np.arange(1.0, 13.0))] * 133)[0] > 0.05
    for effect, needed in ((0.5, 34), (0.8, 15)):  # Cohen's tables: power 0.8, two-sided 0.05
        assert resolvable_difference(1, needed) <= effect < resolvable_difference(1, needed - 1)


def test_pairs_are_of_one_seed(tmp_path):
    """Rows in any order; a seed that one arm lacks, or a metric that one run lacks, is left out."""
    rng = np.random.default_rng(0)
    rows = [make_row("running_sum", arm, seed, rng) for arm in ("dapo", "tr") for seed in (2, 0, 1, 3)]
    rows = [row for row in rows if (row["arm"], row["seed"]) != ("tr", 1)]
    for row in rows:
        row["auc"] = 10.0**-1 * row["seed"] + (0.01 * row["seed"] ** 2 if row["arm"] == "tr" else 0)
        row["mean_length_wrong"] = math.nan if row["seed"] == 3 and row["arm"] == "tr" else row["seed"]
    rng.shuffle(rows)
    group = read_runs(write_rows(rows, tmp_path))["main", "running_sum"]
    assert list(group) == ["dapo", "tr"]
    assert paired_differences(group["tr"], group["dapo"], "auc") == pytest.approx([0.0, 0.04, 0.09])
    assert len(paired_differences(group["tr"], group["dapo"], "mean_length_wrong")) == 2
    comparison = compare_all(group, "auc")["tr", "dapo"]
    assert comparison.n == 3 and comparison.difference == pytest.approx(0.13 / 3)
    assert comparison.p == pytest.approx(paired_t_p([0.0, 0.04, 0.09])) and comparison.p_sign_flip == 0.5


def test_the_planted_effect_is_found_and_no_other_arm(written):
    """In all families that it is in; of the 18 families about one may hold a find that is none."""
    rows = read_rows(written / "results" / "paired.csv")
    pairs = len(BASELINES[:3]) + 4 * 3
    assert len(rows) == len(TASKS) * 9 * pairs and {row["n"] for row in rows} == {"12"}
    accuracies = {"accuracy_greedy", "accuracy_sampled", "auc"}
    found = {(row["task"], row["metric"], row["arm"], row["baseline"]) for row in rows if float(row["p_holm"]) < 0.05}
    planted = set(itertools.product(TASKS, accuracies, ["tr"], ["grpo", "dapo", "bnpo"]))
    assert found >= planted and len({(task, metric) for task, metric, *_ in found - planted}) <= 1
    exact = [float(row["p_sign_flip"]) for row in rows if tuple(row.values())[1:5] in planted]
    assert len(exact) == len(planted) and max(exact) < 0.005 and min(exact) == pytest.approx(2 / 2**12, rel=1e-5)
    for row in (row for row in rows if row["arm"] == "tr" and row["metric"] == "auc"):
        low, difference, high, sd = (float(row[name]) for name in ("low", "difference", "high", "sd"))
        assert sd < 0.01 and abs(difference - PLANTED[row["task"]]) < 0.005  # what the seed shares, 0.05, is gone
        assert difference - 2 * sd < low < difference < high < difference + 2 * sd


def test_the_page_gets_its_tables(written):
    page = (written / "results" / "README.md").read_text(encoding="utf-8")
    assert page.count("\nold\n") == 1  # under the marker that is not this report's
    assert page == replace_tables(page, make_tables(Arena.read(written / "results" / "runs.csv")))
    accuracy = page.partition("<!-- table: accuracy -->")[2].partition("<!-- end -->")[0]
    first, *_, last = [line for line in accuracy.splitlines() if line.startswith("| `")]
    assert first.startswith("| `tr` | 12 |") and first.count("] * |") == 3 and "] *" not in last
    assert len(re.findall(r"\| greedy accuracy \| 15 \| \d+ \| 3 \| `tr`: `grpo`, `dapo`, `bnpo` \|  \|", page)) == 2


def test_figures_show_the_numbers_and_their_legends_cover_no_panel(written):
    arena = Arena.read(written / "results" / "runs.csv")
    rewards, differences = draw_curves(arena, "main").axes[:2]
    drawn = {line.get_label(): np.mean(line.get_ydata()) for line in differences.lines}
    assert drawn["tr"] == pytest.approx(100 * PLANTED["running_sum"], abs=1) and abs(drawn["softmax"]) < 1
    assert {line.get_label() for line in rewards.lines} == {"dapo", "grpo", "softmax", "tr", "other arms"}
    ends = {line.get_label(): line.get_ydata()[-1] for line in draw_lambda_paths(arena, "main").axes[0].lines}
    assert ends["running_sum"] > 0.2 and ends["slippery_chain"] < -0.2
    panel = draw_forest(arena, "main").axes[0]
    order = [label.get_text() for label in panel.get_yticklabels()]
    assert order == ["grpo", "bnpo", "softmax", "power_adamw", "tr", "ar"]
    markers = [line for line in panel.lines if line.get_marker() in ("o", "s") and len(line.get_xdata())]
    filled = {round(float(m.get_ydata()[0])) for m in markers if m.get_markerfacecolor() != "white"}
    assert len(markers) == 2 * len(order) and filled == {order.index("tr")}
    for draw in (draw_curves, draw_lambda_paths, draw_forest, draw_lengths):
        figure = draw(arena, "main")
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert all(box.y0 >= axes.title.get_window_extent().y1 for axes in figure.axes)


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
    rows = make_rows(tasks=TASKS[:1], seeds=[3])
    rows += make_rows(tasks=TASKS[1:], arms=("grpo", "tr"), seeds=range(2))
    rows += make_rows(tasks=TASKS[:1], arms=("dapo", "tr"), seeds=range(3), study="one_step")
    results = tmp_path / "results"
    write_rows(rows, results)
    assert report.main(["--results", str(results)]) == 0
    files = {path.name for path in results.iterdir()}
    assert files >= {"accuracy_curves_one_step.png", "forest_one_step.png", "lambda_paths.png", "forest.png"}
    assert "lambda_paths_one_step.png" not in files and not list(tmp_path.rglob("README.md"))
    accuracy = make_tables(Arena.read(results / "runs.csv"))["accuracy"].split("**")
    assert "(1 seed)" in accuracy[2] and "±" not in accuracy[2] and accuracy[5] == "running_sum (study one_step)"
    assert capsys.readouterr().out.count(".png") == 7
    assert report.main(["--results", str(tmp_path)]) == 1
    assert "runs.csv" in capsys.readouterr().err


def test_the_committed_page_shows_the_committed_runs():
    """No table by hand: the arena's page is what the report makes of its `runs.csv`."""
    page = report.PAGE.read_text(encoding="utf-8")
    assert page == replace_tables(page, make_tables(Arena.read(report.RESULTS / "runs.csv")))
