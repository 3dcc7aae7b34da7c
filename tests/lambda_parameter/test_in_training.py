"""λ in real trainings: every cut of the batch, two processes, and what goes wrong in real runs."""

import json
import math

import pytest
import reference
import torch
from harness import Batch, build_model, train_ours
from launch import launch
from worker import run_job

from trl_lambda.lambda_parameter import TARGET_BOUNDS, read_lambda_file

TARGET = {"length_weight": "power", "length_target": 4.0}
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_beta1": 0.8}


class Shrinking(Batch):  # a token shorter, and without EOS, in every other generation batch
    calls = 0

    def rollout(self, prompts, trainer):
        output = super().rollout(prompts, trainer)
        self.calls += 1
        if self.calls % 2 == 0:
            output["completion_ids"] = [ids[:-1] if len(ids) > 1 else ids for ids in output["completion_ids"]]
        return output

    def lengths_of(self, batch) -> list[int]:
        return [max(len(ids) - batch % 2, 1) for ids in self.completions]


CUTS = {  # options, optimizer steps per generation batch
    "one step": ({}, 1),
    "accumulation": ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}, 1),
    "two steps per generation batch": ({"per_device_train_batch_size": 6, "steps_per_generation": 2}, 2),
    "both": ({"per_device_train_batch_size": 6, "steps_per_generation": 2, "num_iterations": 2}, 4),
}


@pytest.mark.parametrize("masks", [False, True], ids=["all rows", "truncated rows masked"])
@pytest.mark.parametrize("cut", CUTS)
def test_the_target_in_every_cut_equals_plain_loops(cut, masks):
    (options, steps), batch = CUTS[cut], Shrinking()
    options = options | {"max_steps": 6 * steps, "mask_truncated_completions": masks}
    result = train_ours(batch, model=build_model(double=True), **TARGET, **ADAMW, **options)
    lengths = [sum(rows) / 12 for rows in map(batch.lengths_of, range(6))]
    expected = reference.target_path(lengths, 4.0, steps, "positive", TARGET_BOUNDS, 0.0, 1.0)
    # TRL keeps mean lengths in float32, where masked rows make us take its own.
    assert result.lambdas == pytest.approx(expected, abs=1e-6 if masks else 1e-9) and min(result.lambdas) < -1
    assert result.logs[0]["lambda/target_gap"] == pytest.approx(math.log(lengths[0] / 4.0), abs=1e-6)


@pytest.mark.parametrize("cut", CUTS)
def test_the_regression_in_every_cut_equals_plain_loops(cut):
    (options, steps), batch = CUTS[cut], Shrinking()
    options = options | {"max_steps": 5 * steps, "lambda_side": "positive", "optim": "sgd", "lambda_gain": 1.5}
    result = train_ours(batch, model=build_model(double=True), length_weight="power", **options)
    a = reference.group_advantages([batch.rewards[i : i + 4] for i in (0, 4, 8)])
    groups = [[rows[i : i + 4] for i in (0, 4, 8)] for rows in map(batch.lengths_of, range(5))]
    learned = reference.regression([(lengths, a, []) for lengths in groups], ("length",), 1.5)
    lam, path = 0.0, []
    for (goal,), _, _ in learned:
        for _ in range(steps):
            lam -= 0.1 * min(max(lam - goal, -1), 1)
            path.append(lam)
    assert result.lambdas == pytest.approx(path, abs=1e-6)  # advantages are TRL's, in float32
    assert max(map(abs, path)) > 0.01


def test_two_processes_take_the_same_steps_and_skip_the_same(tmp_path):
    jobs = [
        {"trainer": "lambda", "build": {"double": True}, "options": {**ADAMW, **options, "max_steps": 4}}
        for options in (TARGET, {"length_weight": "power", "lambda_side": "signed"}, {"lambda_init": 0.3})
    ]
    alone = [run_job(json.loads(json.dumps(job))) for job in jobs]
    jobs.append(jobs[2] | {"not_finite": {"rank": 1, "step": 1}, "log_on_rank_0": True})
    for job in jobs:
        job["options"]["per_device_train_batch_size"] = 6
    *same, odd = launch(jobs, tmp_path, 2)
    for one, ranks in zip(alone, same, strict=True):
        assert ranks[0]["lambdas"] == ranks[1]["lambdas"] and len(set(one["lambdas"])) > 2
        assert ranks[0]["lambdas"] == pytest.approx(one["lambdas"], rel=1e-9, abs=1e-9)
    lambdas = odd[0]["lambdas"]
    assert odd[1]["lambdas"] == lambdas and all(map(math.isfinite, lambdas))
    assert lambdas[0] == lambdas[1] and len(set(lambdas)) == 3
    for rank in odd:
        assert [entry["lambda/skipped"] for entry in rank["history"] if "loss" in entry] == [0, 1, 1, 1]


ROWS = range(12)
FAULTS = {  # what is wrong, and whether λ then stays where it is
    "all completions masked": ({"truncated": set(ROWS)}, {"mask_truncated_completions": True}, True),
    "a group masked whole": ({"truncated": {4, 5, 6, 7}}, {"mask_truncated_completions": True}, False),
    "all rewards equal": ({"rewards": [1.0] * 12}, {}, True),
    "all lengths equal": ({"lengths": [[7] * 4] * 3}, {}, True),
    "two responses per group": ({"lengths": [[1, 12], [5, 5], [3, 2]]}, {"per_device_train_batch_size": 3}, False),
    "bf16": ({}, {"bf16": True}, False),
    "a row without a reward": ({"missing": {0: None}}, {}, False),
    "a group without rewards": ({"missing": dict.fromkeys((4, 5, 6, 7), math.nan)}, {}, False),
    "no rewards": ({"missing": dict.fromkeys(ROWS)}, {}, True),
}


@pytest.mark.parametrize("learning", ["descent", "regression", "target"])
@pytest.mark.parametrize("fault", FAULTS)
def test_lambda_the_model_and_the_checkpoint_stay_valid(fault, learning, tmp_path):
    changes, options, stays = FAULTS[fault]
    missing, rewards = changes.get("missing", {}), changes.get("rewards")
    batch = Batch(**{name: value for name, value in changes.items() if name in ("truncated", "lengths")})
    batch.rewards = [missing.get(row, reward) for row, reward in enumerate(rewards or batch.rewards)]
    how = {"descent": {"lambda_init": 0.7}, "regression": {"lambda_side": "signed"}, "target": TARGET}[learning]
    cut = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 1e-3}
    saving = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 3, "token_weight": "tr_grpo"}
    result = train_ours(batch, **cut | saving | how | options)
    assert all(map(math.isfinite, result.lambdas)) and result.trainer._lambda.skipped == 0
    assert all(p.isfinite().all() for p in result.trainer.model.parameters())
    assert read_lambda_file(tmp_path / "checkpoint-3")["lambda"] == result.lambdas[-1]
    if stays and learning != "target":  # which learns from lengths alone
        assert result.lambdas == [pytest.approx(how.get("lambda_init", 0.0))] * 3
    elif learning != "regression":  # whose slope may be all noise
        assert len(set(result.lambdas)) > 1
    if fault == "all completions masked":
        assert result.losses == [0.0] * 6


def test_bf16_weights_leave_lambda_in_float32():
    options = {"lambda_init": 0.7, "max_steps": 2}
    full, half = train_ours(**options), train_ours(model=build_model().to(torch.bfloat16), **options)
    assert half.trainer._lambda.tensor.dtype == torch.float32
    assert half.lambdas == pytest.approx(full.lambdas, abs=5e-3)  # bf16 has 8 bits
