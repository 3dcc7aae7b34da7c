"""The arena's statistics against hand-worked and simulated truth, and its report on runs with a planted effect."""

import csv
import itertools
import json
import math

import numpy as np
import pytest

from recipes.studies.arena import planned, preference_tuning
from recipes.studies.arena.analysis import planned as page_of
from recipes.studies.arena.analysis import report
from recipes.studies.arena.analysis.comparisons import Arena, compare_all
from recipes.studies.arena.analysis.questions import FAMILY, IDLE, MATTERS, answer, budget, verdict
from recipes.studies.arena.analysis.runs import METRICS, SUMMARIZED, Run, paired_differences, read_runs
from recipes.studies.arena.analysis.tables import make_tables
from recipes.studies.shared.arms import find_arm
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.markdown import mean_and_error, replace_tables
from recipes.studies.shared.paired_statistics import (
    bootstrap_interval,
    holm,
    paired_t_p,
    resolvable_difference,
    sign_flip_p,
    student_quantile,
)
from recipes.studies.shared.workers import KEY

PLANTED = {"running_sum": 0.03, "slippery_chain": 0.035}  # of `tr`, in every accuracy
STUDIED = ("grpo", "dapo", "bnpo", "softmax", "power_adamw", "tr", "ar")


def study_row(task: str, arm: str, seed: int, rewards, study="main", **values) -> dict:
    """One run with these training rewards, every figure 0.5 but `values`."""
    row = {"study": study, "task": task, "arm": arm, "seed": seed, "learning_rate": 3e-4, "max_steps": 100}
    row |= {"steps_per_generation": 4, **dict.fromkeys(SUMMARIZED, 0.5), "lambda_curve": ""}
    row |= {"auc": float(np.mean(rewards)), "reward_curve": " ".join(f"{value:.4f}" for value in rewards)}
    return row | {"length_curve": " ".join(["10"] * len(rewards))} | values


def rows_of(gains, study):
    """gains: (task, arm) -> points above a baseline that every arm of the seed shares, plus noise of its own."""
    rng, rows = np.random.default_rng(3), []
    for ((task, arm), gain), seed in itertools.product(gains.items(), range(400, 412)):
        better = np.random.default_rng(seed).normal(0, 0.05) + gain
        values = {name: 1 + 0.1 * rng.normal() for name in METRICS if name != "auc"}
        values |= {name: better + 0.5 + rng.normal(0, 0.01) for name in ("accuracy_greedy", "accuracy_sampled")}
        values |= {"lambda_curve": "0 0.1 0.2"} if arm == "softmax" else {"lambda_20": "", "lambda_100": ""}
        level = np.linspace(0.3, 0.5, 25) + better + rng.normal(0, 0.004)
        rows.append(study_row(task, arm, seed, level, study, **values))
    rng.shuffle(rows)
    return rows


def write_rows(rows: list[dict], path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("draw", "mean", "low", "high"),
    [
        (lambda rng, size: rng.normal(size=size), 0.0, 0.937, 0.965),
        (lambda rng, size: rng.exponential(size=size), 1.0, 0.93, 0.965),  # Student's: 0.91
        (lambda rng, size: rng.lognormal(0, 0.7, size=size), math.exp(0.245), 0.91, 0.965),  # Student's: 0.89
    ],
)
def test_the_interval_of_twelve_covers_the_mean(draw, mean, low, high):  # 2000 samples: an error of 0.005
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


def test_the_planted_effect_is_found_and_no_other_arm(tmp_path):
    """In all families that it is in; of the 18 families about one may hold a find that is none."""
    gains = {(task, arm): PLANTED[task] * (arm == "tr") for task, arm in itertools.product(PLANTED, STUDIED)}
    write_rows(rows_of(gains, "main"), tmp_path / "runs.csv")
    tables = ("accuracy", "lengths", "paired", "sign", "resolution", "of others")
    page = "".join(f"<!-- table: {name} -->\nold\n<!-- end -->\n" for name in tables)
    (tmp_path / "README.md").write_text(page, encoding="utf-8")
    assert report.main(["--results", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "paired.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == len(PLANTED) * 9 * (3 + 4 * 3) and {row["n"] for row in rows} == {"12"}
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert page.count("\nold\n") == 1  # its marker is not this report's
    accuracies = {"accuracy_greedy", "accuracy_sampled", "auc"}
    found = {(row["task"], row["metric"], row["arm"], row["baseline"]) for row in rows if float(row["p_holm"]) < 0.05}
    planted = set(itertools.product(PLANTED, accuracies, ["tr"], ["grpo", "dapo", "bnpo"]))
    assert found >= planted and len({(task, metric) for task, metric, *_ in found - planted}) <= 1
    for row in (row for row in rows if row["arm"] == "tr" and row["metric"] == "auc"):
        low, difference, high, sd = (float(row[name]) for name in ("low", "difference", "high", "sd"))
        assert sd < 0.01 and abs(difference - PLANTED[row["task"]]) < 0.005  # what the seed shares, 0.05, is gone
        assert difference - 2 * sd < low < difference < high < difference + 2 * sd


def test_tables_replace_those_between_their_markers():
    assert mean_and_error(np.array([0.01, 0.02, 0.03]), 100, 3) == "2.000 ± 0.577"
    page = "a\n<!-- table: one -->\nold\n<!-- end -->\nb\n<!-- table: x -->\nkept\n"
    assert replace_tables(page, {"one": "| \\1 |", "two": "2"}) == page.replace("old", "| \\1 |")
    with pytest.raises(ValueError, match="table: one --> is not closed"):
        replace_tables("<!-- table: one -->\n<!-- table: two -->\n<!-- end -->\n", {"one": "1"})


def test_the_committed_page_shows_the_committed_runs(tmp_path, capsys):
    page = report.PAGE.read_text(encoding="utf-8")
    assert page == replace_tables(page, make_tables(Arena.read(report.RESULTS / "runs.csv")))
    assert report.main(["--results", str(tmp_path)]) == 1 and "runs.csv" in capsys.readouterr().err


def test_questions_are_decided_as_planned(tmp_path):
    gains = {(task, arm): 0.0 for task in MATTERS for arm in ("dapo", "positive_weight_3")}
    gains |= {(task, "positive3"): 0.04 for task in MATTERS}
    gains |= {(task, arm): gain for task in IDLE for arm, gain in (("dapo", 0.0), ("positive3", -0.001))}
    gains["checked_sum", "positive3"] = -0.05
    gains["slippery_chain", "positive_weight_3"] = 0.04
    answers = answer(read_runs(write_rows(rows_of(gains, "planned"), tmp_path / "planned.csv")))
    by = {(a.claim.question, a.claim.task): a for a in answers if a.claim.question in ("H1a", "H1b", "H2")}
    assert verdict(answers, "H1a") is True and verdict(answers, "H1b") is False
    assert by["H1b", "running_sum"].holds is True and by["H1b", "slippery_chain"].holds is False
    assert by["H2", "idle_filler"].holds is True and by["H2", "checked_sum"].holds is False
    assert verdict(answers, "H2") is False and verdict(answers, "H3") is None and verdict(answers, "H4") is None
    family = [a.comparison for a in answers if FAMILY.get(a.claim.question) == "H1"]
    assert len(family) == 4 and min(c.p_holm for c in family) == pytest.approx(min(1, 4 * min(c.p for c in family)))


def runs(curves, lengths=10.0):
    steps = {seed: {"reward_curve": c, "length_curve": np.full(len(c), lengths)} for seed, c in curves.items()}
    return {seed: Run("planned", "t", "a", seed, (), {}, curve) for seed, curve in steps.items()}


def test_the_budget_of_a_line_that_rises_twice_as_fast_is_half():
    batches = np.arange(40.0)
    slow = runs({seed: 0.01 * batches for seed in range(4)})
    fast = runs({seed: 0.02 * batches for seed in range(4)}, lengths=20.0)
    found = budget(fast, slow)
    # The trailing mean over 5 batches ends at 0.37: reached after 40 batches by one, at 18.5 + 2 + 1 by the other.
    assert found.steps == pytest.approx((21.5 / 40,) * 3) and found.reached and found.seeds == 4
    assert found.tokens[0] == pytest.approx(2 * 21.5 / 40)
    never = budget(runs({seed: 0.001 * batches for seed in range(4)}), slow)
    assert never.steps[0] == 1 and not never.reached
    assert budget(slow, slow).steps[0] == 1 and budget(fast, {}) is None


def test_the_committed_pages_show_the_committed_rows():
    tables = page_of.tables_of(page_of.RESULTS)
    tuning = "\n".join(preference_tuning.show(preference_tuning.RESULTS))
    page_and_tables = [(path, tables, tables["answers"]) for path in page_of.PAGES]
    of_tuning = preference_tuning.RESULTS.parent.parent / "preference_tuning.md"
    for path, shown, one in [*page_and_tables, (of_tuning, {"tuning": tuning}, tuning)]:
        page = path.read_text(encoding="utf-8")
        assert page == replace_tables(page, shown) and one in page


def test_a_row_is_reproduced_on_its_processor_or_within_the_spread_of_another(tmp_path, monkeypatch):
    ledger, real = Ledger(tmp_path / "planned.csv", KEY), {}
    specs, machines = planned.PARTS["start"].specs()[:4], ("this", "this", "other", "other")
    for spec, auc, hardware in zip(specs, ("0.5", "0.6", "0.5", "0.5"), machines, strict=True):
        options = json.dumps(find_arm(spec.arm).key)
        row = {**vars(spec), "options": options, **dict.fromkeys(planned.COMPUTED, "0.5"), "hardware": hardware}
        real[spec.task, spec.arm] = row
        ledger.append(row | {"auc": auc})

    def execute(todo, into, workers):
        for spec in todo:
            into.append(real[spec.task, spec.arm] | {"hardware": "this"})

    monkeypatch.setattr(planned, "execute", execute)
    lines = planned.reproduce(4, tmp_path, 1)
    assert sum(line.endswith(": the same, bit for bit") for line in lines) == 3
    (other,) = (line for line in lines if "bit" not in line)
    assert "differs in auc, mean reward by -0.1000" in other
    row = real[spec.task, spec.arm]
    for gap, word in ((0.03, "within"), (0.05, "BEYOND")):
        new = row | {"auc": str(0.5 + gap), "hardware": "this"}
        assert planned.compare_rows(row, new, 0.01).startswith(f"{word} the spread of another processor")
    ledger.path.write_text(ledger.path.read_text(encoding="utf-8").replace("3.0}", "4.0}"), encoding="utf-8")
    with pytest.raises(ValueError, match="other options now"):
        planned.reproduce(4, tmp_path, 1)
