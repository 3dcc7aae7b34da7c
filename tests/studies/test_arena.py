"""The arena: its arms, its runs, and that a killed study goes on where it stopped."""

import json
import math
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import HANG
from trl import GRPOConfig

from recipes.playground.make_base_model import make_model, make_tokenizer, save_tokenizer
from recipes.playground.tasks import LONG_TASKS, make_splits
from recipes.studies.arena import large
from recipes.studies.arena.study import KEY, LEARNING_RATES, TASK_ARMS, TASKS, Plan, choose_rates
from recipes.studies.shared.arms import ARMS, BASELINES, CONSTANT_WEIGHT, FIRST_ROUND
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.run import RunSpec, run, training_figures, training_problems
from trl_lambda import LambdaGRPOConfig
from trl_lambda.weights import length_weights, probability_weights

REPOSITORY = Path(__file__).parent.parent


def config_of(arm: str, folder) -> GRPOConfig:
    config_class = GRPOConfig if ARMS[arm].trl else LambdaGRPOConfig
    return config_class(str(folder), use_cpu=True, bf16=False, report_to="none", **ARMS[arm].options)


def token_weights(arm: str, probs: torch.Tensor, folder) -> torch.Tensor:
    args = config_of(arm, folder)
    return probability_weights(
        probs.log(),
        regulation=args.token_regulation,
        alpha=args.regulation_alpha,
        slope=args.regulation_slope,
        center=args.regulation_center,
        min=args.regulation_min,
        max=args.regulation_max,
    )


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_configuration_of_its_own(arm, tmp_path):
    args = config_of(arm, tmp_path)
    assert ARMS[arm].trl == (arm in BASELINES) == (type(args) is GRPOConfig)
    assert ARMS[arm].options not in [other.options for name, other in ARMS.items() if name != arm]


def test_reading_b_is_within_its_stated_distance(tmp_path):
    probs = torch.linspace(1e-6, 1, 20_001, dtype=torch.float64)
    formula = (2 * (torch.sigmoid(9 * probs) - 0.25)).clamp(1, 1.4)
    assert (token_weights("tr_b", probs, tmp_path) - formula).abs().max() < 0.007
    assert (token_weights("tr", probs, tmp_path) - formula).abs().max() > 0.1  # R-A is another reading


def test_constant_weight_is_constant(tmp_path):
    probs = torch.linspace(1e-6, 1, 101)
    assert token_weights("constant", probs, tmp_path).tolist() == pytest.approx([CONSTANT_WEIGHT] * 101)


def test_delta_l_weighs_a_sum_over_tokens(tmp_path):
    # arXiv 2509.07558 weighs the advantage with |o|^-α before a sum over tokens that is divided by a constant.
    lengths = torch.tensor([[3, 10, 40, 7]])
    args = config_of("delta_l", tmp_path)
    ours = length_weights(lengths, args.lambda_init, aggregation=args.aggregation)
    theirs = lengths.double() ** -0.75
    assert torch.allclose(ours / ours[0, 0], (theirs / theirs[0, 0]).float())


def test_arms_of_one_seed_start_from_the_same_completions_and_equal_specs_give_equal_rows(tmp_path):
    rows = [run(RunSpec("test", "slippery_chain", arm, 3, 3e-4, 8)) for arm in ("grpo", "power_tr", "power_tr")]
    first = [(row["reward_curve"].split()[0], row["length_curve"].split()[0]) for row in rows]
    assert first[0] == first[1] == first[2]
    for row in rows:
        row.pop("seconds")
    assert rows[1] == rows[2]
    assert rows[0]["reward_curve"] != rows[1]["reward_curve"] or rows[0]["mean_length"] != rows[1]["mean_length"]
    assert rows[1]["lambda_curve"].split()[0] == "0.00000" and len(rows[1]["lambda_curve"].split()) == 2
    assert 1 < rows[1]["token_weight_mean"] <= 1.4 and rows[0]["token_weight_mean"] == rows[0]["lambda_curve"] == ""
    another = run(RunSpec("test", "slippery_chain", "grpo", 4, 3e-4, 8))
    assert another["reward_curve"] != rows[0]["reward_curve"]


def test_held_out_figures_add_up(tmp_path):
    row = run(RunSpec("test", "slippery_chain", "dapo", 0, 3e-4, 4))
    p, right, wrong = row["accuracy_sampled"], row["mean_length_right"], row["mean_length_wrong"]
    assert row["mean_length"] == pytest.approx(p * right + (1 - p) * wrong, rel=1e-5)
    assert row["accuracy_per_token"] == pytest.approx(p / row["mean_length"])
    assert right < wrong  # chains slip
    tuning = run(RunSpec("test", "slippery_chain", "dapo", 0, 3e-4, 4, split="validation"))
    assert tuning["reward_curve"] == row["reward_curve"] and tuning["mean_length"] != row["mean_length"]


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


@pytest.mark.parametrize(("task", "sign"), [("running_sum", 1), ("slippery_chain", -1)])
@pytest.mark.parametrize("arm", ["softmax", "power"])
def test_lambda_learns_the_sign_of_what_length_is_worth(task, sign, arm):
    for seed in (0, 1):
        row = run(RunSpec("test", task, arm, seed, 3e-4, 20))
        assert sign * row["lambda_20"] > 0.005


def test_ledger_drops_a_torn_line_and_refuses_other_columns(tmp_path):
    path = tmp_path / "deep" / "runs.csv"
    ledger = Ledger(path, ("arm", "seed"))
    ledger.append({"arm": "a", "seed": 1, "text": 'with, comma and "quote"'})
    with path.open("ab") as file:
        file.write(b"b,2,half a li")
    again = Ledger(path, ("arm", "seed"))
    assert again.done() == {("a", "1")}
    assert again.key_of({"arm": "a", "seed": 1}) in again.done()
    again.append({"arm": "b", "seed": 2, "text": ""})
    assert [row["text"] for row in again.rows()] == ['with, comma and "quote"', ""]
    with pytest.raises(ValueError, match="other columns"):
        again.append({"arm": "c", "seed": 2})


def test_plan_pairs_all_arms_and_gives_each_the_same_tuning_budget():
    plan = Plan()
    tuning = plan.tune()
    for arm in FIRST_ROUND:
        cells = [(s.task, s.seed, s.learning_rate) for s in tuning if s.arm == arm]
        assert sorted(cells) == sorted({(s.task, s.seed, s.learning_rate) for s in tuning})
    rates = dict.fromkeys(FIRST_ROUND, 3e-4)
    runs = plan.main(rates)
    assert len({tuple(vars(spec).values()) for spec in runs}) == len(runs)
    for task in TASKS:
        for seed in range(12):
            assert {s.arm for s in runs if (s.task, s.seed) == (task, seed)} == set(TASK_ARMS.get(task, FIRST_ROUND))
    assert {s.seed for s in tuning}.isdisjoint(s.seed for s in runs)
    assert {s.split for s in tuning} == {"validation"} and {s.split for s in runs} == {"test"}
    assert {s.steps_per_generation for s in plan.one_step(rates)} == {1}


def test_rates_are_chosen_by_mean_reward_and_only_from_a_full_grid():
    rewards = {LEARNING_RATES[0]: (0.2, 0.9), LEARNING_RATES[1]: (0.5, 0.7), LEARNING_RATES[2]: (0.3, 0.6)}
    rows = [
        {"arm": arm, "learning_rate": str(rate), "task": task, "seed": "101", "auc": str(reward)}
        for arm in FIRST_ROUND
        for rate, pair in rewards.items()
        for task, reward in zip(("x", "y"), pair, strict=True)
    ]
    assert choose_rates(rows, Plan()) == dict.fromkeys(FIRST_ROUND, LEARNING_RATES[1])
    with pytest.raises(ValueError, match="has 1 of 2 runs"):
        choose_rates(rows[1:], Plan())


KILLED_AFTER_A_ROW = """
import os, signal
from recipes.studies.arena import ledger, study

append = ledger.Ledger.append
ledger.Ledger.append = lambda *row: (append(*row), os.kill(os.getpid(), signal.SIGKILL))
study.main()
"""


def test_the_command_goes_on_where_it_stopped(tmp_path):
    """With worker processes: killed as its first row is on disk, then run again, by the real command, to the end."""
    arguments = ["main", "--smoke", "--results", str(tmp_path), "--arms", "grpo", "tr", "--tasks", "slippery_chain"]
    arguments += ["--seeds", "1", "--workers", "1"]
    (tmp_path / "learning_rates.json").write_text(json.dumps({"grpo": 3e-4, "tr": 3e-4}))
    runs = tmp_path / "runs.csv"
    # Its worker holds the pipe too, and has to end with it.
    command = [sys.executable, "-c", KILLED_AFTER_A_ROW, *arguments]
    killed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=HANG)
    before = Ledger(runs, KEY).rows()
    assert killed.returncode == -signal.SIGKILL and len(before) == 1
    command = [sys.executable, "-m", "recipes.studies.arena.study", *arguments]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    rows = Ledger(runs, KEY).rows()
    assert rows[:1] == before and len(rows) == 2
    assert sorted(row["arm"] for row in rows) == ["grpo", "tr"]
    assert all(math.isfinite(float(row["auc"])) and row["commit"] and row["torch"] for row in rows)


def test_training_problems_are_the_training_split():
    prompts = set(training_problems("checked_sum")["prompt"])
    splits = make_splits("checked_sum")
    assert prompts == {problem.prompt for problem in splits["train"]}
    assert prompts.isdisjoint(problem.prompt for problem in splits["validation"] + splits["test"])


def test_large_arena_runs_the_same_way_on_longer_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "MODELS", tmp_path)
    spec = large.base_model("long_sum")
    tokenizer = make_tokenizer(spec.characters, spec.max_length)
    assert 10e6 < make_model(tokenizer, spec.hidden_size, spec.num_layers).num_parameters() < 30e6
    make_model(tokenizer, 16, 1).save_pretrained(spec.folder)  # a stand-in: only the path is tried
    save_tokenizer(tokenizer, spec.folder)
    row = run(large.LargeSpec("main", "long_sum", "power_tr", 0, 1e-4, 2, 2, device="cpu"))
    # One token in 33 ends an answer: 32.7 tokens if cut at 160, 25.5 if cut at 48 as those of the small arena are.
    assert row["device"] == "cpu" and 28 < row["mean_length"] < 38
    lengths = [len(LONG_TASKS[task](random.Random(i)).long) for task in LONG_TASKS for i in range(300)]
    assert 90 < max(lengths) < large.MAX_COMPLETION_LENGTH


def test_the_small_size_of_the_large_arena_is_one_that_two_cores_can_do(monkeypatch, capsys):
    spec = large.base_model("long_sum", large.SMALL)
    tokenizer = make_tokenizer(spec.characters, spec.max_length)
    assert 0.5e6 < make_model(tokenizer, spec.hidden_size, spec.num_layers).num_parameters() < 1.1e6
    runs = large.make_plan(large.SMALL.tasks, seeds=2, size=large.SMALL, device="cpu").main(
        dict.fromkeys(large.SMALL.arms, 3e-4)
    )
    assert [(r.arm, r.seed, r.use_cpu) for r in runs] == [
        (arm, seed, True) for seed in (400, 401) for arm in ("dapo", "positive_weight_3", "positive3")
    ]
    monkeypatch.setattr(sys, "argv", ["large", "tune", "--size", "0.8M"])
    with pytest.raises(SystemExit):
        large.main()
    assert "one learning rate for all arms" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_large_arena_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["large", "tune"])
    with pytest.raises(SystemExit):
        large.main()
    assert "no CUDA device" in capsys.readouterr().err
