"""The arena: its arms, its runs, and that a killed study goes on where it stopped."""

import json
import math
import re
import signal
import subprocess
import sys
import time

import pytest
from trl import GRPOConfig

from recipes.studies.shared.arms import ARMS, BASELINES, CONTROLS, FIRST_ROUND, find_arm
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.machine import ROOT
from recipes.studies.shared.run import RunSpec, run, training_figures
from recipes.studies.shared.workers import KEY
from recipes.studies.tokens import study as budget
from trl_lambda import LambdaGRPOConfig

STUDIES = {
    "arena": {name: find_arm(name) for name, arm in {**ARMS, **CONTROLS}.items() if not arm.removed},
    "tokens": {spec.arm: budget.method(spec.arm) for spec in budget.Plan().ladder()},
}


@pytest.mark.parametrize(("study", "name"), [(study, name) for study, arms in STUDIES.items() for name in arms])
def test_every_arm_is_a_configuration_of_its_own(study, name, tmp_path):
    arms = STUDIES[study]
    config_class = GRPOConfig if arms[name].trl else LambdaGRPOConfig
    config_class(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **arms[name].options)
    assert study == "tokens" or arms[name].trl == (name in BASELINES)
    assert [other for other in arms if arms[other].key == arms[name].key] == [name]


def test_an_arm_with_a_removed_option_keeps_its_rows_and_says_why_it_cannot_run():
    removed = [name for name, arm in ARMS.items() if arm.removed]
    assert removed == ["softmax_adamw", "power_adamw"]
    with pytest.raises(ValueError, match="'power_adamw' ran with an option removed in 0.3.0, at commit 2d6a6b0"):
        run(RunSpec("test", "slippery_chain", "power_adamw", 0, 3e-4, 4))
    rows = Ledger(ROOT / "recipes/studies/arena/results/runs.csv", KEY).rows()
    assert {row["options"] for row in rows} == {json.dumps(ARMS[name].key) for name in FIRST_ROUND}


def test_arms_of_one_seed_start_from_the_same_completions_and_equal_specs_give_equal_rows():
    rows = [run(RunSpec("test", "slippery_chain", arm, 3, 3e-4, 8)) for arm in ("grpo", "power_tr", "power_tr")]
    first = [(row["reward_curve"].split()[0], row["length_curve"].split()[0]) for row in rows]
    assert first[0] == first[1] == first[2]
    assert rows[1] | {"seconds": 0} == rows[2] | {"seconds": 0}
    assert len(rows[1]["lambda_curve"].split()) == 2 and rows[0]["lambda_curve"] == rows[0]["token_weight_mean"] == ""
    assert 1 < rows[1]["token_weight_mean"] <= 1.4


def test_training_figures_of_a_log_made_by_hand():
    history = [
        {"grad_norm": 1.0, "entropy": 4.0, "reward": 0.25, "completions/mean_length": 10.0, "token_weight/mean": 1.2},
        {"grad_norm": 3.0, "entropy": 2.0, "token_weight/mean": 1.4},
        {"grad_norm": 1.0, "entropy": 1.0, "reward": 0.75, "completions/mean_length": 12.0, "token_weight/mean": 1.3},
        {"grad_norm": 3.0, "entropy": 0.5, "token_weight/mean": 1.3},
        {"train_loss": 0.0},
    ]
    figures = training_figures(history, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5], steps_per_generation=2)
    assert figures["auc"] == 0.5 and figures["entropy"] == 0.75
    assert figures["grad_norm_mean"] == 2.0 and figures["grad_norm_cv"] == 0.5
    assert figures["token_weight_mean"] == pytest.approx(1.3)
    assert figures["lambda_20"] == 0.4 and figures["lambda_100"] == ""
    assert figures["reward_curve"] == "0.2500 0.7500" and figures["lambda_curve"].startswith("0.00000 0.10000")


def test_ledger_drops_a_torn_line_and_refuses_other_columns(tmp_path):
    path = tmp_path / "deep" / "runs.csv"
    ledger = Ledger(path, ("arm", "seed"))
    ledger.append({"arm": "a", "seed": 1, "text": 'with, comma and "quote"'})
    with path.open("ab") as file:
        file.write(b"b,2,half a li")
    again = Ledger(path, ("arm", "seed"))
    assert again.done() == {("a", "1")} == {again.key_of({"arm": "a", "seed": 1})}
    again.append({"arm": "b", "seed": 2, "text": ""})
    assert [row["text"] for row in again.rows()] == ['with, comma and "quote"', ""]
    with pytest.raises(ValueError, match="other columns"):
        again.append({"arm": "c", "seed": 2})


def test_the_command_goes_on_where_it_stopped(tmp_path):
    (tmp_path / "learning_rates.json").write_text(json.dumps({"grpo": 3e-4, "tr": 3e-4}))
    ledger = Ledger(tmp_path / "runs.csv", KEY)
    command = [sys.executable, "-m", "recipes.studies.arena.study", "main", "--smoke", "--results", str(tmp_path)]
    command += ["--arms", "grpo", "tr", "--tasks", "slippery_chain", "--seeds", "1", "--workers", "1"]
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not ledger.rows() and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.communicate(timeout=300)  # its worker holds the pipe too, and has to end with it
    before = ledger.rows()
    assert killed.returncode == -signal.SIGKILL and len(before) == 1
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = ledger.rows()
    assert rows[:1] == before and sorted(row["arm"] for row in rows) == ["grpo", "tr"]
    assert all(math.isfinite(float(row["auc"])) and row["commit"] and row["torch"] for row in rows)


def test_nothing_outside_the_studies_imports_one():
    files = [*(ROOT / "trl_lambda").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    outside = [path for path in files if "studies" not in path.parts]
    assert outside and not [path for path in outside if re.search(r"(from|import) recipes\.studies", path.read_text())]
