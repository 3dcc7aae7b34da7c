"""A run killed at a random moment and resumed ends where an uninterrupted one does, to the last bit."""

import random
import sys
from pathlib import Path

import pytest
import torch
from launch import launch, read_results
from worker import run_job

OPTIONS = {
    "aggregation": "lambda",
    "lambda_init": 0.4,
    "lambda_learning_rate": 0.5,
    "token_regulation": "sigmoid",
    "optim": "adamw_torch",
    "learning_rate": 5e-3,
    "lr_scheduler_type": "linear",
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 2,
}
CASES = {
    "one process": (1, {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}, {}),
    "power": (1, {"aggregation": "power", "per_device_train_batch_size": 12}, {}),
    # Two optimizer steps on each generation batch, over micro-batches that are shuffled anew.
    "two iterations": (
        1,
        {"num_iterations": 2, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
        {},
    ),
    "LoRA": (
        1,
        {"per_device_train_batch_size": 12, "learning_rate": 5e-2},
        {"peft": {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}},
    ),
    "two processes": (2, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, {}),
}
TIMES = ("runtime", "per_second", "step_time", "flos")


def job(folder: Path, options: dict, trainer_options: dict, **more) -> dict:
    return {
        "trainer": "lambda",
        "noise": 0.2,
        "options": OPTIONS | options | {"output_dir": str(folder)},
        "trainer_options": trainer_options,
    } | more


def launch_all(jobs: list[dict], folder: Path, processes: int) -> list[list[dict]]:
    command = [sys.executable] if processes == 1 else None
    return launch(jobs, folder, processes, command=command, timeout=300)


def last_whole_checkpoint(folder: Path, processes: int) -> Path:
    """`trainer_state.json` is written last by rank 0; the other ranks' random states may come later."""
    whole = [
        path.parent
        for path in folder.glob("checkpoint-*/trainer_state.json")
        if len(list(path.parent.glob("rng_state*.pth"))) == processes
    ]
    return max(whole, key=lambda path: int(path.name.split("-")[1]))


def logged_after(result: dict, step: int) -> list[dict]:
    return [
        {key: value for key, value in entry.items() if not any(t in key for t in TIMES)}
        for entry in result["history"]
        if "loss" in entry and entry["step"] > step
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Per case: the uninterrupted run, the step of the checkpoint, and the run resumed from it."""
    folder = tmp_path_factory.mktemp("resume")
    results = {}
    for processes in (1, 2):
        cases = {name: case for name, case in CASES.items() if case[0] == processes}
        outputs = {name: folder / name.replace(" ", "-") for name in cases}
        whole = launch_all(
            [job(folder / "whole" / name, *case[1:]) for name, case in cases.items()],
            folder / f"a{processes}",
            processes,
        )
        checkpoints = []
        for name, case in cases.items():
            rng = random.Random(name)
            kill_at = [rng.randint(2, 5), rng.uniform(0.0, 0.2)]  # each step takes some hundredths of a second
            killed = folder / f"killed-{outputs[name].name}"
            with pytest.raises(RuntimeError, match="no result of"):
                launch_all([job(outputs[name], *case[1:], kill_at=kill_at)], killed, processes)
            assert not any(read_results(killed, 1, processes).values())
            checkpoints.append(last_whole_checkpoint(outputs[name], processes))
        resumed = launch_all(
            [
                job(outputs[name], *case[1:], resume=str(checkpoint))
                for (name, case), checkpoint in zip(cases.items(), checkpoints, strict=True)
            ],
            folder / f"c{processes}",
            processes,
        )
        steps = [int(checkpoint.name.split("-")[1]) for checkpoint in checkpoints]
        results |= dict(zip(cases, zip(whole, steps, resumed, strict=True), strict=True))
    return results


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_equals_uninterrupted(case, runs):
    whole, step, resumed = runs[case]
    assert 0 < step < OPTIONS["max_steps"]
    for mine, theirs in zip(resumed, whole, strict=True):
        assert mine["lambdas"] == theirs["lambdas"][step:]
        assert mine["lambda_state"].keys() == theirs["lambda_state"].keys()
        for name, value in theirs["lambda_state"].items():
            assert torch.equal(mine["lambda_state"][name], value), name
        for name, value in theirs["model"].items():
            assert torch.equal(mine["model"][name], value), name
    assert logged_after(resumed[0], step) == logged_after(whole[0], step) != []
    assert len(set(whole[0]["lambdas"])) == OPTIONS["max_steps"]


def test_save_only_model_resumes_lambda_without_its_momentum(tmp_path):
    options = {"save_only_model": True, "max_steps": 4, "per_device_train_batch_size": 12}
    first = run_job(job(tmp_path, options, {}))
    checkpoint = tmp_path / "checkpoint-2"
    assert not (checkpoint / "optimizer.pt").exists()
    resumed = run_job(job(tmp_path, options, {}, resume=str(checkpoint)))
    # Adam's moments start afresh, so the step is not the same, but it starts from λ of step 2.
    gap = abs(resumed["lambdas"][0] - first["lambdas"][1])
    assert 0 < gap < 2 * abs(first["lambdas"][1] - first["lambdas"][0]) + 1e-2
    assert resumed["lambda_state"]["step"].item() == 2


def test_load_best_model_at_end_brings_its_lambda(tmp_path):
    options = {
        "per_device_train_batch_size": 12,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 12,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
        "max_steps": 6,
    }
    result = run_job(job(tmp_path, options, {}, eval=True))
    losses = [entry["eval_loss"] for entry in result["history"] if "eval_loss" in entry]
    best = losses.index(max(losses))
    assert len(losses) == 3 and best != 2
    assert result["lambda_at_end"] == result["lambdas"][2 * best + 1]
