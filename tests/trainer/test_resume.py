"""A resumed run ends where an uninterrupted one does, to the last bit; in any other set-up it is refused."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import harness
import pytest
import torch
from harness import Batch, assert_equal_tensors, assert_same_parameters, build_model, by_length, train_ours, watch
from kills import EVENTS
from launch import launch, read_results
from peft import LoraConfig, PeftModel
from transformers import Qwen2ForCausalLM, Trainer
from worker import run_job

from trl_lambda.lambda_parameter import read_lambda_file

OPTIONS = {"max_steps": 4, "learning_rate": 1e-3, "optim": "adamw_torch", "lr_scheduler_type": "linear"}
OPTIONS |= {"save_strategy": "steps", "save_steps": 2, "lambda_learning_rate": 0.5}
IN_TWO = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
FIXED = {"lambda_learnable": False, "lambda_learning_rate": 0.1}
KINDS = {
    "descent": IN_TWO,
    "two iterations": IN_TWO | {"num_iterations": 2, "token_weight": "tr_grpo"},
    "regression": {"length_weight": "power", "lambda_side": "signed", "lambda_features": ["length", "mean_logp"]},
    "target": {"length_weight": "power", "length_target": 0.8, "save_steps": 1},  # in the middle of its first batches
    "sgd": {"optim": "sgd", "length_weight": "power"},
    "own optimizer": {"optim": "adafactor"},
    "user's optimizer": {},
    "LoRA": {"learning_rate": 5e-2},
    "fixed": FIXED | {"lambda_init": 0.25},
    "no λ": {"length_weight": "grpo", "token_weight": "tr_grpo", "lambda_learning_rate": 0.1},
    "no weights": {"length_weight": None, "lambda_learning_rate": 0.1},
}


def make(folder, kind="descent", model=None, **options):
    model, arguments = model or build_model(), {}
    if kind == "user's optimizer":
        arguments["optimizers"] = (torch.optim.AdamW(model.parameters(), lr=1e-3), None)
    elif kind == "LoRA":
        arguments["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = OPTIONS | KINDS[kind] | options
    return harness.make(by_length(), model, arguments=arguments, output_dir=str(folder), **options)


def run(folder, kind="descent", resume=None, **options):
    result = watch(make(folder, kind, **options))
    result.trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """kind -> the uninterrupted run, and the folder of its checkpoint at step 2."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def get(kind):
        if kind not in made:
            made[kind] = (run(folder / kind, kind), folder / kind / "checkpoint-2")
        return made[kind]

    return get


def state_of_lambda(trainer):
    optimizer = trainer._lambda_step._own or trainer.optimizer
    state = getattr(optimizer, "optimizer", optimizer).state[trainer._lambda.tensor]
    return {name: torch.zeros(0) if value is None else value for name, value in state.items()}  # SGD's momentum


def numbers(logs):
    return [{k: x for k, x in log.items() if not any(t in k for t in ("time", "flos", "per_second"))} for log in logs]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_set_up_goes_on_to_the_last_bit(kind, whole, tmp_path):
    first, checkpoint = whole(kind)
    resumed = run(tmp_path, kind, resume=checkpoint, model=build_model(seed=0 if kind == "LoRA" else 5))
    assert resumed.lambdas == first.lambdas[2:] and numbers(resumed.logs) == numbers(first.logs)
    assert resumed.trainer.lambda_values == first.trainer.lambda_values
    assert_same_parameters(resumed, first)
    if resumed.trainer._lambda_step is not None:
        assert len(set(first.lambdas)) == 4 or kind == "target"
        assert_equal_tensors(state_of_lambda(resumed.trainer), state_of_lambda(first.trainer))
        learning = resumed.trainer._lambda.learning.state_dict()
        assert learning == first.trainer._lambda.learning.state_dict()
        assert json.loads(json.dumps(learning)) == learning
    folders = [Path(result.trainer.args.output_dir, "checkpoint-4") for result in (resumed, first)]
    files = [{path.name for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1] and ("lambda.json" in files[0]) == (kind != "no weights")
    assert ("lambda_optimizer.pt" in files[0]) == (kind in ("own optimizer", "user's optimizer"))


OTHERS = [
    ("descent", {"length_weight": "power"}, "length_weight='power', but .* was trained with 'lambda_grpo'"),
    ("descent", {"length_weight_kwargs": {"length_scale": 0.2}}, r"length_weight_kwargs=\{'length_scale': 0.2\}, but"),
    ("descent", {"length_weight_scope": "prompt"}, "length_weight_scope='prompt', but .* with 'batch'"),
    ("descent", {"drop_tied_groups": True}, "drop_tied_groups=True, but .* with False"),
    ("descent", {"positive_weight": 2.0}, "positive_weight=2.0, but .* with 1.0"),
    ("descent", {"token_weight": "tr_grpo"}, "token_weight='tr_grpo', but .* with None"),
    ("descent", {"lambda_side": "signed"}, "lambda_learning='regression', but .* with 'descent'"),
    ("descent", {"length_target": 4.0}, "lambda_learning='target', but .* with 'descent'"),
    ("descent", FIXED, "(lambda_init|lambda_learning)=.*, but .* was trained with"),
    ("descent", KINDS["no λ"], "lambda_learning=None, but .* with 'descent'"),
    ("regression", {"lambda_features": ["length", "min_logp"]}, r"lambda_features=\['length', 'min_logp'\], but"),
    ("regression", {"lambda_side": "negative"}, "lambda_side='negative', but .* with 'signed'"),
    ("no λ", {"token_weight": "ar"}, "token_weight='ar', but .* with 'tr_grpo'"),
    ("no λ", {"token_weight_kwargs": {"max": 2.0}}, r"token_weight_kwargs=\{'max': 2.0\}, but .* with None"),
    ("no λ", {"token_weight_inside_clip": True}, "token_weight_inside_clip=True, but .* with False"),
    ("fixed", {"lambda_init": 0.5}, "lambda_init=0.5, but .* with 0.25"),
    ("fixed", {"lambda_learnable": True, "lambda_init": 0, "lambda_learning_rate": 1.0}, "lambda_init=None, but"),
    ("descent", {"optim": "sgd"}, "λ is in the trainer's SGD now, but in .* it was in the trainer's AdamW"),
    ("descent", {"optim": "adafactor"}, "λ is in an AdamW of its own now, but in .* it was in the trainer's AdamW"),
    ("own optimizer", {"optim": "adamw_torch"}, "λ is in the trainer's AdamW now, but .* in an AdamW of its own"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "message"), OTHERS, ids=str)
def test_another_set_up_is_refused_with_a_remedy_that_works(kind, options, message, whole, tmp_path):
    first, checkpoint = whole(kind)
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path, kind, resume=checkpoint, **options)
    assert re.search("Resume with (that one|the optimizer and engine of that run)", str(error.value))
    folder = re.search(r"start from these weights instead, pass model='([^']+)'", str(error.value)).group(1)
    advised = re.search(r"lambda_init=(\S+) to a new trainer", str(error.value))
    assert (advised is None) == (kind == "no λ")
    if advised is not None:
        assert float(advised.group(1)) == pytest.approx(read_lambda_file(folder)["lambda"], rel=1e-5)
    fresh = make(tmp_path / "fresh", kind, model=Qwen2ForCausalLM.from_pretrained(folder), **options)
    assert len(fresh.train().metrics) and fresh.state.global_step == 4


def test_every_setting_in_the_file_is_compared(whole, tmp_path):
    """Fault 13."""
    _, checkpoint = whole("fixed")
    settings = read_lambda_file(checkpoint)["settings"]
    trainer = make(tmp_path, "fixed")
    names = {name for name in trainer.args.__dataclass_fields__ if name.startswith(("length_weight", "token_weight"))}
    assert names | {"drop_tied_groups", "positive_weight", "lambda_side", "lambda_features"} <= settings.keys()
    for key in settings:
        changed = tmp_path / key / "checkpoint-2"
        shutil.copytree(checkpoint, changed)
        content = json.loads((changed / "lambda.json").read_text())
        content["settings"][key] = "another"
        (changed / "lambda.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"^{key}=.*'another'"):
            trainer.train(resume_from_checkpoint=str(changed))


def test_settings_that_may_change_on_the_way(whole, tmp_path):
    value = read_lambda_file(whole("descent")[1])["lambda"]
    slow = run(tmp_path, resume=whole("descent")[1], lambda_learning_rate=1e-9)
    assert slow.lambdas == pytest.approx([value, value])  # and not at the rate in the saved optimizer
    bounds = [-0.01, abs(value) / 2] if value > 0 else [-abs(value) / 2, 0.01]
    resumed = run(tmp_path, resume=whole("descent")[1], lambda_bounds=bounds, lambda_learning_rate=1e-9)
    assert resumed.lambdas[0] == pytest.approx(bounds[value > 0]) and len(resumed.lambdas) == 2
    run(tmp_path, "target", resume=whole("target")[1], length_target=0.5)


def test_an_output_folder_is_no_checkpoint(whole, tmp_path):
    trainer = whole("descent")[0].trainer
    trainer.save_model(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="has no trainer_state.json: it is no checkpoint"):
        run(tmp_path, resume=tmp_path / "out")
    trainer.state.save_to_json(str(tmp_path / "out" / "trainer_state.json"))  # `save_state` of Hugging Face's scripts
    run(tmp_path, save_only_model=True)
    for folder in (tmp_path / "out", tmp_path / "checkpoint-2"):
        assert not (folder / "optimizer.pt").exists()
        message = "holds a model and no optimizer state of λ: it is an output folder.*lambda_init="
        with pytest.raises(ValueError, match=message) as error:
            run(tmp_path, resume=folder)
        assert f"pass model={str(folder)!r}" in str(error.value)
    run(tmp_path, "fixed", save_only_model=True)  # without a λ that learns nothing is missing
    run(tmp_path, "fixed", resume=tmp_path / "checkpoint-2")


def test_a_checkpoint_of_trls_trainer(tmp_path):
    harness.train_trl(output_dir=str(tmp_path), save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=r"lambda.json cannot be read \(FileNotFoundError.*pass model="):
        run(tmp_path / "mine", resume=tmp_path / "checkpoint-1")
    resumed = run(tmp_path / "mine", "no weights", resume=tmp_path / "checkpoint-1", optim="sgd", learning_rate=0.0)
    assert resumed.trainer.state.global_step == 4


DAMAGE = {
    "empty": lambda text: "",
    "torn": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[]",
    "no key": lambda text: text.replace('"skipped"', '"skip"'),
    **{
        x: lambda text, x=x: re.sub(r'"lambdas": \[[^\]]+\]', f'"lambdas": [{x}]', text)
        for x in ("NaN", "1e300", '"0"')
    },
    "a huge integer": lambda text: text.replace('"skipped": 0', '"skipped": ' + "9" * 5000),
    "settings that are none": lambda text: re.sub(r'"settings": \{[^}]*\}', '"settings": 3', text),
    "nested": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(damage, whole, tmp_path):
    copy = tmp_path / "checkpoint-2"
    shutil.copytree(whole("descent")[1], copy)
    text = (copy / "lambda.json").read_text()
    (copy / "lambda.json").write_text(DAMAGE[damage](text))
    assert (copy / "lambda.json").read_text() != text
    with pytest.raises(ValueError, match="lambda.json cannot be read .* it is damaged, or .*pass model=") as error:
        run(tmp_path, resume=copy)
    assert len(str(error.value)) < 700


def test_lambda_json_beside_every_saved_model(whole, tmp_path):
    result, checkpoint = whole("descent")
    for step in (2, 4):
        saved = read_lambda_file(checkpoint.parent / f"checkpoint-{step}")
        assert (saved["lambda"], saved["global_step"]) == (result.lambdas[step - 1], step)  # to the last bit
        assert saved["learnable"] and saved["lambdas"] == [saved["lambda"]]
        assert saved["optimizer"] == "the trainer's AdamW" and saved["settings"]["lambda_learning"] == "descent"
    result.trainer.save_model(str(tmp_path))
    saved = read_lambda_file(tmp_path)
    assert (saved["lambda"], saved["optimizer"]) == (result.lambdas[-1], None) and not list(tmp_path.glob("*.tmp"))
    whole("no weights")[0].trainer.save_model(str(tmp_path))  # into the folder of an earlier run
    assert not (tmp_path / "lambda.json").exists()


def test_an_adapter_has_its_lambda_beside_it_and_computes_what_was_trained(whole):
    result, checkpoint = whole("LoRA")
    folder = checkpoint.parent / "checkpoint-4"
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()
    assert read_lambda_file(folder)["lambda"] == result.lambdas[-1] != 0.0
    tokens = torch.tensor([[3, 7, 9, 11]])
    trained, base = result.trainer.model.eval()(tokens).logits, build_model()
    untouched = base.eval()(tokens).logits
    reloaded = PeftModel.from_pretrained(base, folder)
    assert torch.equal(reloaded.eval()(tokens).logits, trained) and not torch.equal(trained, untouched)


def test_the_best_model_brings_its_lambda(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 12, "max_steps": 6}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    arguments = {"trainer_options": {"eval_dataset": Batch().dataset()}, "output_dir": str(tmp_path)}
    result = train_ours(**OPTIONS | options | arguments)
    losses = [entry["eval_loss"] for entry in result.trainer.state.log_history if "eval_loss" in entry]
    best = losses.index(max(losses))
    assert len(losses) == 3 and best != 2
    assert result.trainer.lambda_value == result.lambdas[2 * best + 1] != result.lambdas[-1]


def test_a_push_takes_lambda_along(whole, tmp_path, monkeypatch):
    _, checkpoint = whole("descent")
    trainer, seen = make(tmp_path, lambda_init=0.25), []
    found = lambda self, folder: seen.append((tmp_path / "lambda.json").read_text())  # noqa: E731
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", found)
    trainer._push_from_checkpoint(str(checkpoint))
    assert json.loads(seen[0])["lambda"] == trainer.lambda_value


# Event -> the step at which it comes, and that of the newest whole checkpoint then.
ENDINGS = dict(zip(EVENTS, ((5, 4), (5, 4), (6, 4), (6, 6)), strict=True))
JOB = {"trainer": "lambda", "noise": 0.2}
TRAINING = OPTIONS | IN_TWO | {"max_steps": 8, "lambda_init": 0.4, "token_weight": "tr_grpo", "learning_rate": 5e-3}
# Processes, options, and the rest of the job.
CASES = {
    "one process": (1, {}, {}),
    "two iterations": (1, {"num_iterations": 2}, {}),
    "own optimizer": (1, {}, {"own_optimizer": True}),
    "two processes": (2, {"per_device_train_batch_size": 3}, {}),
}
KILLS = [*(("one process", event) for event in ENDINGS), ("own optimizer", "no trainer_state.json")]
KILLS += [(case, "between two micro-batches") for case in ("two iterations", "two processes")]


def job(folder, case, **more):
    _, options, rest = CASES[case]
    return JOB | {"options": TRAINING | options | {"output_dir": str(folder)}} | rest | more


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Results of all ranks, by case where uninterrupted, by kill where resumed."""
    folder = tmp_path_factory.mktemp("killed")
    outputs = {key: folder / str(number) for number, key in enumerate([*CASES, *KILLS])}
    results = {}
    for processes in (1, 2):
        kills = [kill for kill in KILLS if CASES[kill[0]][0] == processes]
        dying = []
        for case, event in kills:
            kill = {"event": event, "step": ENDINGS[event][0], "marker": f"{outputs[case, event]}-died"}
            dying.append(job(outputs[case, event], case, kill=kill | {"rank": processes - 1}))
        launches = folder / f"killed{processes}"
        if processes == 1:
            died = launch(dying, launches, 1, command=[sys.executable])
            assert died == [[{"exit_code": -signal.SIGKILL}]] * len(kills)
        else:  # one rank dies, and torchrun ends the other
            with pytest.raises(RuntimeError, match=r"Signal 9 \(SIGKILL\)"):
                launch(dying, launches, 2)
            assert not any(read_results(launches, 1, 2).values())
        assert [Path(f"{outputs[k]}-died").read_text() for k in kills] == [event for _, event in kills]
        jobs = {case: job(outputs[case], case) for case in CASES if CASES[case][0] == processes}
        for case, event in kills:
            output = outputs[case, event]
            if event == "no trainer_state.json":
                jobs[case, event, "refused"] = job(output, case, resume=True, is_refused=True)
            jobs[case, event] = job(output, case, resume=str(output / f"checkpoint-{ENDINGS[event][1]}"))
        todo = list(jobs.values())
        done = [[run_job(job)] for job in todo] if processes == 1 else launch(todo, folder / "ended", processes)
        results |= dict(zip(jobs, done, strict=True))
    return results


@pytest.mark.parametrize("kill", KILLS, ids=" | ".join)
def test_killed_and_resumed_equals_uninterrupted(kill, ended):
    case, event = kill
    for mine, theirs in zip(ended[kill], ended[case], strict=True):
        assert mine["lambdas"] == theirs["lambdas"][ENDINGS[event][1] :] and len(set(theirs["lambdas"])) == 8
        for part in ("lambda_state", "model"):
            assert theirs[part]
            assert_equal_tensors(mine[part], theirs[part])
    assert numbers(ended[kill][0]["history"][:-1]) == numbers(ended[case][0]["history"][:-1])


def test_the_torn_checkpoint_is_refused(ended):
    torn = [key for key in ended if key[-1] == "refused"]
    assert len(torn) == 2
    for key in torn:
        assert re.search("checkpoint-6 has no trainer_state.json.*Resume from an earlier one", ended[key][0]["error"])
