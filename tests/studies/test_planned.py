"""The arena's second round: its plan, its controls, and how its questions are decided."""

import itertools
import json

import numpy as np
import pytest
import torch
from study_rows import study_row, write_rows

from recipes.studies.arena import planned, preference_tuning
from recipes.studies.arena.analysis import planned as page_of
from recipes.studies.arena.analysis.questions import CLAIMS, FAMILY, IDLE, MATTERS, answer, budget, verdict
from recipes.studies.arena.analysis.runs import Run, read_runs
from recipes.studies.arena.held_power import held_positive3
from recipes.studies.shared.arms import find_arm
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.markdown import replace_tables
from recipes.studies.shared.workers import KEY
from trl_lambda.weights import ResponseRows, weigh_responses
from trl_lambda.weights.length_weight import Power


def test_no_run_is_planned_twice_and_every_claim_has_its_runs_on_new_seeds():
    specs, tuning = [spec for part in planned.PARTS.values() for spec in part.specs()], planned.rate_specs()
    assert min(spec.seed for spec in specs) >= 400 > max(spec.seed for spec in tuning)
    assert {spec.split for spec in specs} == {"test"} and {spec.split for spec in tuning} == {"validation"}
    assert len(specs) == len({tuple(vars(spec).values()) for spec in specs})
    cells = {(spec.study, spec.task, spec.arm) for spec in specs}
    for claim in CLAIMS:
        assert {(claim.study, claim.task, arm) for arm in (claim.arm, claim.baseline)} <= cells
    # The plain balance is a control of every study and task.
    assert {(study, task, "positive_weight_3") for study, task, _ in cells} <= cells


def test_the_held_control_keeps_the_balance_and_the_order():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (6, 8), generator=generator).double()
    lengths[0, 0] = 0
    advantages = torch.randn(6, 8, generator=generator)
    advantages[5] = 0  # a group without a signal
    statistics = {name: -torch.rand(6, 8, generator=generator).double() for name in ("mean_logp", "min_logp")}
    rows = ResponseRows(lengths, lengths.sum(), advantages=advantages.double(), statistics=statistics)
    members = (held_positive3, Power("positive", held_positive3.features))
    held, power = (weigh_responses(member, rows, torch.tensor([0.7, -0.5, 1.1])) for member in members)
    right = (advantages > 0) & (lengths > 0)
    for group in range(5):
        assert held[group][right[group]].mean().item() == pytest.approx(1, abs=1e-6)
        ratio = held[group][right[group]] / power[group][right[group]]
        assert (ratio / ratio[0] - 1).abs().max() < 1e-5 and held[group][right[group]].std() > 0.01
    assert (held[~right & (lengths > 0)] == 1).all()


def rows_of(gains):
    """gains: (task, arm) -> points above a baseline that every arm of the seed shares, plus noise of its own."""
    rng, rows = np.random.default_rng(3), []
    for ((task, arm), gain), seed in itertools.product(gains.items(), range(400, 412)):
        shared = np.random.default_rng(seed).normal(0, 0.05)
        level = np.linspace(0.3, 0.5, 25) + shared + gain + rng.normal(0, 0.004)
        rows.append(study_row(task, arm, seed, level, "planned"))
    return rows


def test_questions_are_decided_as_planned(tmp_path):
    gains = {(task, arm): 0.0 for task in MATTERS for arm in ("dapo", "positive_weight_3")}
    gains |= {(task, "positive3"): 0.04 for task in MATTERS}
    gains |= {(task, arm): gain for task in IDLE for arm, gain in (("dapo", 0.0), ("positive3", -0.001))}
    gains["checked_sum", "positive3"] = -0.05
    gains["slippery_chain", "positive_weight_3"] = 0.04
    answers = answer(read_runs(write_rows(rows_of(gains), tmp_path / "planned.csv")))
    by = {(a.claim.question, a.claim.task): a for a in answers if a.claim.question in ("H1a", "H1b", "H2")}
    assert verdict(answers, "H1a") is True and verdict(answers, "H1b") is False
    assert by["H1b", "running_sum"].holds is True and by["H1b", "slippery_chain"].holds is False
    assert by["H2", "idle_filler"].holds is True and by["H2", "checked_sum"].holds is False
    assert verdict(answers, "H2") is False and verdict(answers, "H3") is None and verdict(answers, "H4") is None
    p = sorted(a.comparison.p for a in answers if FAMILY.get(a.claim.question) == "H1")
    smallest = min(a.comparison.p_holm for a in answers if FAMILY.get(a.claim.question) == "H1")
    assert len(p) == 4 and smallest == pytest.approx(min(1, 4 * p[0]))


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
    for path in page_of.PAGES:
        page = path.read_text(encoding="utf-8")
        assert page == replace_tables(page, tables) and tables["answers"] in page
    page = (preference_tuning.RESULTS.parent.parent / "preference_tuning.md").read_text(encoding="utf-8")
    table = "\n".join(preference_tuning.show(preference_tuning.RESULTS))
    assert page == replace_tables(page, {"tuning": table}) and table in page


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
