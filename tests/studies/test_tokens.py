"""The study of tokens: its methods, its plan, its tables and its command."""

import json
import math
import sys

import numpy as np
import pytest

from recipes.playground.rewards import exact_answer, short_right_answers
from recipes.studies.shared.paired_statistics import student_quantile
from recipes.studies.tokens import report
from recipes.studies.tokens import study as budget
from recipes.studies.tokens.frontier import frontier_table
from recipes.studies.tokens.rows import split_name
from recipes.studies.tokens.tuning import kept_settings


def test_a_name_is_its_way_and_its_setting():
    assert split_name("overlong 48 24") == ("overlong", "48 24") and split_name("fixed -0.5") == ("fixed", "-0.5")
    assert split_name("target 22 signed") == ("target signed", "22") and split_name("dapo") == ("dapo", "")
    with pytest.raises(ValueError, match="'hope 3' is no method; accepted: dapo, target"):
        budget.method("hope 3")
    rows = budget.Ledger(budget.RESULTS / "budget.csv", ("seed",)).rows()
    for (way, task), settings in kept_settings(rows).items():  # the rivals' are those that the rule keeps
        assert [f"{way} {setting}" for setting in settings] == budget.names_of(way, task)
    shown = {row["arm"]: json.loads(row["options"]) for row in rows}
    assert all(json.loads(json.dumps(budget.method(arm).key)) == options for arm, options in shown.items())


def test_the_rule_drops_what_is_beaten_and_keeps_the_best_and_the_shortest():
    def tried(points):
        made = [row("t", "dapo", s, 0.6, 40.0, [], study="tune") for s in range(2)]
        for setting, (accuracy, tokens) in points.items():
            made += [row("t", f"lead {setting}", s, accuracy, tokens, [], study="tune") for s in range(2)]
        return kept_settings(made)["lead", "t"]

    # 2 is beaten by 3; 4 costs more than 5 points.
    assert tried({1: (0.62, 30), 2: (0.55, 29), 3: (0.56, 25), 4: (0.5, 10)}) == ["1", "3"]
    assert tried({1: (0.5, 30), 2: (0.4, 20), 3: (0.3, 10)}) == ["1", "2"]  # none is near: the next in tokens
    assert tried({1: (0.6, 10), 2: (0.5, 20)}) == ["1"]


def test_the_length_reward_of_right_answers_equals_plain_loops():
    answers = ["=1", "..=1", "=2", "......=1", "=3", "=1", "=4", "=5"]
    given = {"completion_ids": [[1] * len(answer) for answer in answers], "solution": ["1"] * 8}
    shaped = short_right_answers(0.5, num_generations=4)(answers, **given)
    total = [a + b for a, b in zip(exact_answer(answers, ["1"] * 8), shaped, strict=True)]
    mean, sd = 14 / 3, math.sqrt(sum((n - 14 / 3) ** 2 for n in (2, 4, 8)) / 3)
    first = [math.exp(-0.5 * (n - mean) / sd) for n in (2, 4, 8)]
    # The one right answer of the second group has z = 0.
    assert total == pytest.approx([first[0], first[1], 0, first[2], 0, 1, 0, 0])


def row(task, arm, seed, accuracy, tokens, lengths, **more):
    return {
        "study": "budget", "task": task, "arm": arm, "seed": str(seed), "accuracy_sampled": str(accuracy),
        "mean_length": str(tokens), "length_curve": " ".join(map(str, lengths)), "batch": "64",
        "steps_per_generation": "4", "auc": str(accuracy / 2), "lambda_curve": "9 9 -1 -2",
    } | more  # fmt: skip


def test_the_tables_say_what_the_rows_hold():
    gaps = [0.01, -0.01, 0.03]
    rows = [row("t", "dapo", s, 0.5, 40.0, [9.0] * 30 + [40.0] * 20) for s in range(3)]
    rows += [row("t", "target 20", s, 0.5 + gap, 20.0, [9.0] * 30 + [20.0 + 2 * s] * 20) for s, gap in enumerate(gaps)]
    promise = report.promise_table(rows, {"t": 20}).splitlines()[-1]
    lower = 1.0 - student_quantile(0.95, 2) * 2.0 / math.sqrt(3)
    shown = f"| t | 20 | 3 | 20.0, 22.0, 24.0 | 2 of 3 | +1.0 ({lower:+.1f}) | -45 %; -50 % | +0.5 ["
    assert promise.startswith(shown)
    baseline, target = report.ladder_table(rows, budget.WAYS).splitlines()[2:]
    assert baseline == "| t | TRL's dapo | – | 3 | 40.0 | 50.0 |  |  |"
    assert target.startswith("| t | length_target | 20 | 3 | 20.0 | 51.0 | +1.0 [") and target.endswith("-20.0 |")
    curve = np.concatenate([np.linspace(40, 21, 20), np.full(30, 20.0)])
    steps = [row("t", "target 20", s, 0.5, 20.0, curve, study="step") for s in range(2)]
    assert report.step_table(steps).splitlines()[-1] == "| t | 64 | 4 | 2 | 68, 68 | 68, 68 | 1.00, 1.00 |"
    assert report.settled_length(steps[0]) == 20.0 and len(report.draw_steps(steps).axes[0].lines) == 1


def test_a_rival_is_compared_with_the_targets_curve_at_its_own_tokens():
    rows = []
    for s in range(3):
        rows += [row("t", "dapo", s, 0.6 + 0.01 * s, 40.0, []), row("t", "target 20", s, 0.5 + 0.02 * s, 20.0, [])]
        rows += [row("t", "target 30 signed", s, 0.1, 30.0, [])]  # on another curve
        rows += [row("t", "lead 0.1", s, 0.5, 25.0 + s, [])]  # mean tokens 26: 0.7 target, 0.3 dapo
        rows += [row("t", "cut 10", s, 0.3, 10.0, []), row("t", "overlong 48 24", s, 0.9, 30.0, [])]
    lead, overlong, cut = frontier_table(rows, budget.WAYS).splitlines()[2:]
    # On the curve 0.7·0.52 + 0.3·0.61 of 26 tokens.
    assert lead.startswith("| t | length reward for right answers | 0.1 | 3 | 26.0 | +4.7 [")
    gaps = []
    for left in ((1, 2), (0, 2), (0, 1)):
        share = (25 + sum(left) / 2 - 20) / 20
        mine = (1 - share) * (0.5 + 0.01 * sum(left)) + share * (0.6 + 0.005 * sum(left))
        gaps.append(100 * (mine - 0.5))
    half = student_quantile(0.975, 2) * math.sqrt(2 / 3 * sum((g - sum(gaps) / 3) ** 2 for g in gaps))
    assert f"[{4.7 - half:+.1f}, {4.7 + half:+.1f}] | level |" in lead and half > 4.7
    assert overlong.endswith("| below |")
    assert "| 10.0 | +22.0 [" in cut and cut.endswith("above, with 20.0 tokens |")  # beyond the curve its end counts
    assert "| 26.0 | -40.0 " in frontier_table(rows, budget.WAYS, "target signed")  # its end with 30 tokens


def test_the_command_goes_on_where_it_stopped_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budget, "SMOKE_FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["budget", "settle", "--smoke", "--show", "--report"])
    monkeypatch.setattr(budget, "SMOKE", budget.Plan(budget.TASKS[1:2], (200,), (200,), 8))
    budget.main()
    first = (tmp_path / "budget.csv").read_text()
    assert len(first.splitlines()) == 3 and "length_target" in first
    assert "| idle_filler | TRL's dapo | – | 1 |" in capsys.readouterr().out
    assert "| idle_filler | length_target | 8 | 1 |" in (tmp_path / "README.md").read_text()
    assert {"budget_frontier.png", "budget_steps.png"} <= {path.name for path in tmp_path.iterdir()}
    budget.main()
    assert (tmp_path / "budget.csv").read_text() == first
    monkeypatch.setattr(sys, "argv", ["budget", "all"])
    with pytest.raises(SystemExit):
        budget.main()
    assert "no part is called all" in capsys.readouterr().err


def test_the_rivals_with_a_set_point_are_counted_beside_the_target():
    def run(arm, study, accuracy, tail):
        lengths = [30.0] * 20 + tail
        return [row("t", arm, s, accuracy, 20.0, lengths, study=study) for s in range(3)]

    rows = run("dapo", "budget", 0.5, [40.0] * 30) + run("target 20", "budget", 0.5, [20.0] * 30)
    rows += run("laconic 20 0.002", "set_points", 0.6, [10.0] * 5 + [30.0] * 5 + [24.0] * 20)
    held, swung = report.set_points_table(rows, "t", 20).splitlines()[2:]
    assert held.startswith("| target 20 | 3 | 20.0, 20.0, 20.0 | 3 of 3 | +0.0 |") and held.endswith("| 1.00 | 1.0 |")
    assert "| 0 of 3 | +10.0 |" in swung and swung.endswith("| 0.50 | 2.0 |")
