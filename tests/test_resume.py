"""
A run killed at a named event (`kills.py`) and resumed ends where an uninterrupted one does, to the last bit.

`Trainer` makes a checkpoint's folder, then writes the model, λ, the optimizers, the random state and, last,
`trainer_state.json`. The newest folder may so be torn. Resuming from a torn one raises and names the checkpoint before
it, which is whole, and from which the run is resumed here.
"""

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kills import EVENTS
from launch import launch, read_results
from worker import run_job

from trl_lambda.preference.files import write_json

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
IN_TWO = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
LORA = {"peft": {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}}
# Processes, options, and the rest of the job.
CASES = {
    "one process": (1, IN_TWO, {}),
    "power": (1, {"aggregation": "power", "per_device_train_batch_size": 12}, {}),
    # Two optimizer steps on each generation batch, over micro-batches that are shuffled anew.
    "two iterations": (1, IN_TWO | {"num_iterations": 2}, {}),
    "LoRA": (1, {"per_device_train_batch_size": 12, "learning_rate": 5e-2}, {"trainer_options": LORA}),
    # The user brings the model's optimizer, so that λ has one of its own, in a file of its own.
    "companion": (1, {"per_device_train_batch_size": 12}, {"own_optimizer": True}),
    "two processes": (2, IN_TWO | {"per_device_train_batch_size": 3}, {}),
}
TIMES = ("runtime", "per_second", "step_time", "flos")


@dataclass(frozen=True)
class Ending:
    """
    What an event leaves behind.

    Args:
        step: `state.global_step` at the event.
        newest: step of the newest checkpoint, whose folder has the files `present` and none of `absent`.
        whole: step of the newest checkpoint that is whole; resuming from a later one raises.
    """

    step: int
    newest: int
    whole: int
    present: tuple[str, ...]
    absent: tuple[str, ...] = ()


MODEL, LAMBDA, OPTIMIZER, STATE = "model.safetensors", "lambda.json", "optimizer.pt", "trainer_state.json"
HALF, COMPANION, HALF_COMPANION = "lambda.json.tmp", "lambda_optimizer.json", "lambda_optimizer.json.tmp"
WHOLE = (MODEL, LAMBDA, OPTIMIZER, STATE)
ENDINGS = {
    "between two micro-batches": Ending(5, 4, 4, WHOLE),
    "optimizer stepped, λ not finished": Ending(5, 4, 4, WHOLE),
    "model written, lambda.json not begun": Ending(6, 6, 4, (MODEL,), (HALF, LAMBDA, OPTIMIZER, STATE)),
    "half of lambda.json": Ending(6, 6, 4, (MODEL, HALF), (LAMBDA, OPTIMIZER, STATE)),
    "half of lambda_optimizer.json": Ending(
        6, 6, 4, (MODEL, LAMBDA, OPTIMIZER, HALF_COMPANION), (HALF, COMPANION, STATE)
    ),
    "lambda.json written, trainer_state.json not begun": Ending(6, 6, 4, (MODEL, LAMBDA, OPTIMIZER), (HALF, STATE)),
    "half of trainer_state.json": Ending(6, 6, 4, WHOLE, (HALF,)),
    "checkpoint written": Ending(6, 6, 6, WHOLE, (HALF,)),
}
# Every event, beside what it may go wrong with: micro-batches, an adapter, the companion's file, ranks.
KILLS = [
    ("one process", "between two micro-batches"),
    ("one process", "optimizer stepped, λ not finished"),
    ("one process", "model written, lambda.json not begun"),
    ("one process", "lambda.json written, trainer_state.json not begun"),
    ("power", "half of lambda.json"),
    ("power", "checkpoint written"),
    ("two iterations", "between two micro-batches"),
    ("two iterations", "half of trainer_state.json"),
    ("LoRA", "model written, lambda.json not begun"),
    ("LoRA", "optimizer stepped, λ not finished"),
    ("companion", "optimizer stepped, λ not finished"),
    ("companion", "half of lambda.json"),
    ("companion", "half of lambda_optimizer.json"),
    ("companion", "lambda.json written, trainer_state.json not begun"),
    ("two processes", "between two micro-batches"),
    ("two processes", "lambda.json written, trainer_state.json not begun"),
]


def job(folder: Path, options: dict, rest: dict | None = None, **more) -> dict:
    options = OPTIONS | options | {"output_dir": str(folder)}
    return {"trainer": "lambda", "noise": 0.2, "options": options} | (rest or {}) | more


def launch_all(jobs: list[dict], folder: Path, processes: int) -> list[list[dict]]:
    return launch(jobs, folder, processes, command=[sys.executable] if processes == 1 else None)


def checkpoint(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"


def kills_with(processes: int) -> list[tuple[str, str]]:
    return [kill for kill in KILLS if CASES[kill[0]][0] == processes]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict:
    """A folder for each kill, and for each case where nothing kills."""
    folder = tmp_path_factory.mktemp("resume")
    return {key: folder / str(number) for number, key in enumerate([*CASES, *KILLS])}


@pytest.fixture(scope="module")
def killed(outputs) -> dict[tuple[str, str], dict]:
    """By kill: the event that the process died of, the steps of the checkpoints, and the files of the newest."""

    def killing(kill):
        case, event = kill
        # One rank dies, and torchrun has to end the other: the one that writes, or else the last.
        rank = CASES[case][0] - 1 if "micro-batches" in event else 0
        spec = {"event": event, "step": ENDINGS[event].step, "marker": f"{outputs[kill]}-died", "rank": rank}
        return job(outputs[kill], *CASES[case][1:], kill=spec)

    launches = outputs["one process"].parent / "killed"
    alone = kills_with(1)
    results = launch_all([killing(kill) for kill in alone], launches, 1)
    assert {kill: result for kill, (result,) in zip(alone, results, strict=True)} == {
        kill: {"exit_code": -signal.SIGKILL} for kill in alone
    }
    for number, kill in enumerate(kills_with(2)):
        with pytest.raises(RuntimeError, match=r"Signal 9 \(SIGKILL\)"):  # says torchrun, and returns
            launch_all([killing(kill)], launches / str(number), 2)
        assert not any(read_results(launches / str(number), 1, 2).values())
    return {kill: left_behind(outputs[kill]) for kill in KILLS}


def left_behind(output: Path) -> dict:
    steps = sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))
    files = {path.name: path.read_bytes() for path in checkpoint(output, steps[-1]).iterdir()}
    return {"event": Path(f"{output}-died").read_text(), "steps": steps, "files": files}


@pytest.fixture(scope="module")
def ended(outputs, killed) -> dict:
    """Results of all ranks: of the uninterrupted run by case; resumed by kill; `(*kill, True)`: what was refused."""
    results = {}
    for processes in (1, 2):
        jobs = {case: job(outputs[case], *CASES[case][1:]) for case in CASES if CASES[case][0] == processes}
        for kill in kills_with(processes):
            case, event = kill
            resumed = job(outputs[kill], *CASES[case][1:])
            newest, whole = ENDINGS[event].newest, ENDINGS[event].whole
            if newest == whole:
                jobs[kill] = resumed | {"resume": True}
            else:
                jobs[*kill, True] = resumed | {"resume": True, "is_refused": True}
                jobs[kill] = resumed | {"resume": str(checkpoint(outputs[kill], whole))}
        done = launch_all(list(jobs.values()), outputs["one process"].parent / f"ended{processes}", processes)
        results |= dict(zip(jobs, done, strict=True))
    return results


def logs(result: dict) -> list[dict]:
    return [
        {key: value for key, value in entry.items() if not any(t in key for t in TIMES)}
        for entry in result["history"]
        if "loss" in entry
    ]


def test_every_event_is_tried():
    assert {event for _, event in KILLS} == ENDINGS.keys() == EVENTS.keys()
    assert {case for case, _ in KILLS} == CASES.keys()


@pytest.mark.parametrize("kill", KILLS, ids=" | ".join)
def test_a_killed_run_dies_at_its_event_and_leaves_what_it_had_written(kill, killed, ended, outputs):
    case, event = kill
    ending, left = ENDINGS[event], killed[kill]
    assert left["event"] == event
    assert left["steps"] == list(range(2, ending.newest + 1, 2))
    model = "adapter_model.safetensors" if case == "LoRA" else MODEL
    names = {MODEL if name == model else name for name in left["files"]}
    assert names.issuperset(ending.present) and names.isdisjoint(ending.absent)
    # λ's files are the uninterrupted run's, or not there; half a file has another name.
    then = checkpoint(outputs[case], ending.newest)
    for name in names & {LAMBDA, COMPANION}:
        assert left["files"][name] == (then / name).read_bytes()
    for name in names & {HALF, HALF_COMPANION}:
        text = (then / name.removesuffix(".tmp")).read_bytes()
        assert left["files"][name] == text[: len(text) // 2]


@pytest.mark.parametrize("kill", [k for k in KILLS if ENDINGS[k[1]].newest != ENDINGS[k[1]].whole], ids=" | ".join)
def test_a_torn_checkpoint_is_refused_with_the_one_to_resume_from(kill, ended, outputs):
    ending = ENDINGS[kill[1]]
    fault = "damaged" if STATE in ending.present else "missing"
    for rank in ended[*kill, True]:
        assert rank["error"].startswith(f"{checkpoint(outputs[kill], ending.newest) / STATE} is {fault}")
        assert f"resume_from_checkpoint={str(checkpoint(outputs[kill], ending.whole))!r}" in rank["error"]


@pytest.mark.parametrize("kill", KILLS, ids=" | ".join)
def test_resumed_equals_uninterrupted(kill, ended, outputs):
    case, event = kill
    resumed, uninterrupted = ended[kill], ended[case]
    for mine, theirs in zip(resumed, uninterrupted, strict=True):
        assert mine["lambdas"] == theirs["lambdas"][ENDINGS[event].whole :]
        assert mine["companion"] == theirs["companion"] == (case == "companion")
        for part in ("lambda_state", "model"):
            assert mine[part].keys() == theirs[part].keys() and theirs[part]
            for name, value in theirs[part].items():
                assert torch.equal(mine[part][name], value), name
    assert logs(resumed[0]) == logs(uninterrupted[0])
    assert len(set(uninterrupted[0]["lambdas"])) == len(logs(resumed[0])) == OPTIONS["max_steps"]
    # What was torn has been written again, and nothing is left of it.
    for step in range(2, OPTIONS["max_steps"] + 1, 2):
        again, once = (checkpoint(outputs[key], step) for key in (kill, case))
        assert {path.name for path in again.iterdir()} == {path.name for path in once.iterdir()}
        for path in once.glob("lambda*"):
            assert (again / path.name).read_bytes() == path.read_bytes()


def test_a_torn_first_checkpoint_has_none_before_it(tmp_path):
    options = {"max_steps": 2, "per_device_train_batch_size": 12}
    run_job(job(tmp_path, options))
    (tmp_path / "checkpoint-2" / STATE).unlink()
    with pytest.raises(ValueError, match="trainer_state.json is missing.*no whole checkpoint before it"):
        run_job(job(tmp_path, options, resume=True))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path, LAMBDA, {"lambda": 0.5})
    with pytest.raises(TypeError, match="not JSON serializable"):  # after the first half
        write_json(tmp_path, LAMBDA, {"lambda": 0.75, "then": object()})
    assert json.loads((tmp_path / LAMBDA).read_text()) == {"lambda": 0.5}


def test_save_only_model_resumes_lambda_without_its_momentum(tmp_path):
    options = {"save_only_model": True, "max_steps": 4, "per_device_train_batch_size": 12}
    first = run_job(job(tmp_path, options))
    checkpoint = tmp_path / "checkpoint-2"
    assert not (checkpoint / "optimizer.pt").exists()
    with pytest.warns(UserWarning, match="without its optimizer state: it is not in the checkpoint"):
        resumed = run_job(job(tmp_path, options, resume=str(checkpoint)))
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
    result = run_job(job(tmp_path, options, eval=True))
    losses = [entry["eval_loss"] for entry in result["history"] if "eval_loss" in entry]
    best = losses.index(max(losses))
    assert len(losses) == 3 and best != 2
    assert result["lambda_at_end"] == result["lambdas"][2 * best + 1]
