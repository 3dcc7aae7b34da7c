"""Every pair of checkpoint and configuration of λ: it resumes as documented, or the message's advice works."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from support import Batch, build, build_model, config, watch

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

OPTIONS = {
    "max_steps": 4,
    "learning_rate": 1e-3,
    "lambda_learning_rate": 0.5,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "save_strategy": "steps",
    "save_steps": 2,
}
FIXED = {"lambda_learnable": False, "lambda_learning_rate": 0.1}
ABSENT = {"aggregation": "dapo", "lambda_learning_rate": 0.1}


def trainer_of(folder, *, companion=False, model=None, **options):
    batch = Batch()
    model = build_model() if model is None else model
    arguments = {}
    if companion:
        # What the trainer would build: the model's part of the state is the same with and without a companion.
        decay = [p for n, p in model.named_parameters() if "norm" not in n and "bias" not in n]
        rest = [p for n, p in model.named_parameters() if "norm" in n or "bias" in n]
        groups = [{"params": decay, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.0}]
        arguments["optimizers"] = (torch.optim.AdamW(groups, lr=1e-3), None)
    args = config(LambdaGRPOConfig, batch, output_dir=str(folder), **(OPTIONS | options))
    return build(LambdaGRPOTrainer, args, batch, model, **arguments)


def run(folder, *, resume=None, **options):
    trainer = trainer_of(folder, **options)
    result = watch(trainer)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return result


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Per kind: the uninterrupted run and the folder of its checkpoint at step 2."""
    folder = tmp_path_factory.mktemp("pairs")
    kinds = {
        "learned": {},
        "companion": {"companion": True},
        "fixed": FIXED | {"lambda_init": 0.25},
        "absent": ABSENT,
    }
    return {name: (run(folder / name, **kind), folder / name / "checkpoint-2") for name, kind in kinds.items()}


def saved_lambda(checkpoint: Path) -> float:
    return json.loads((checkpoint / "lambda.json").read_text())["lambda"]


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return run(*args, **kwargs)


@pytest.mark.parametrize("before", ["learned", "companion"])
@pytest.mark.parametrize("companion", [False, True], ids=["to the trainer's optimizer", "to a companion"])
def test_learned_goes_on_in_either_home_to_the_last_bit(checkpoints, tmp_path, before, companion):
    whole, checkpoint = checkpoints[before]
    resumed = quietly(tmp_path, resume=checkpoint, companion=companion)
    assert (resumed.trainer._lambda.companion is not None) == companion
    assert resumed.lambdas == whole.lambdas[2:]
    for name, value in whole.parameters().items():
        assert torch.equal(resumed.parameters()[name], value), name


def test_learned_to_fixed_says_the_value_and_then_resumes(checkpoints, tmp_path):
    _, checkpoint = checkpoints["learned"]
    with pytest.raises(ValueError, match="lambda_init=0.0 is fixed") as error:
        run(tmp_path, resume=checkpoint, **FIXED)
    advised = float(re.search(r"Resume with lambda_init=(\S+)\.$", str(error.value)).group(1))
    resumed = quietly(tmp_path, resume=checkpoint, lambda_init=advised, **FIXED)
    assert resumed.lambdas == [pytest.approx(saved_lambda(checkpoint), abs=1e-12)] * 2
    assert len(resumed.losses) == 2


def test_companion_to_fixed(checkpoints, tmp_path):
    _, checkpoint = checkpoints["companion"]
    value = saved_lambda(checkpoint)
    assert quietly(tmp_path, resume=checkpoint, lambda_init=value, **FIXED).lambdas == [value, value]


@pytest.mark.parametrize("companion", [False, True], ids=["to the trainer's optimizer", "to a companion"])
def test_fixed_to_learned_goes_on_from_its_value(checkpoints, tmp_path, companion):
    whole, checkpoint = checkpoints["fixed"]
    resumed = quietly(tmp_path, resume=checkpoint, lambda_init=0.25, companion=companion)
    assert len(resumed.lambdas) == 2 and resumed.lambdas[0] != 0.25 and abs(resumed.lambdas[0] - 0.25) < 0.6
    state = resumed.trainer._lambda.companion or resumed.trainer.optimizer
    assert state.state[resumed.trainer._lambda.tensor]["step"].item() == 2
    # The model's moments went on: its first step after the checkpoint is that of the uninterrupted run.
    assert resumed.losses[0] == whole.losses[2]


@pytest.mark.parametrize("before", ["learned", "companion", "fixed"])
def test_lambda_to_none_raises_and_its_advice_works(checkpoints, tmp_path, before):
    _, checkpoint = checkpoints[before]
    with pytest.raises(ValueError, match="aggregation='dapo' has no λ, but .* was trained with") as error:
        run(tmp_path, resume=checkpoint, **ABSENT)
    advised = re.search(r"pass model='([^']+)' to a new trainer", str(error.value)).group(1)
    model = type(build_model()).from_pretrained(advised)
    assert len(run(tmp_path, model=model, **ABSENT).losses) == 4


def test_none_to_lambda_raises_and_its_advice_works(checkpoints, tmp_path):
    _, checkpoint = checkpoints["absent"]
    with pytest.raises(ValueError, match="lambda.json is missing") as error:
        run(tmp_path, resume=checkpoint)
    advised = re.search(r"pass model='([^']+)' to a new trainer", str(error.value)).group(1)
    model = type(build_model()).from_pretrained(advised)
    assert len(set(run(tmp_path, model=model).lambdas)) == 4


def test_another_member_raises_and_its_advice_works(checkpoints, tmp_path):
    whole, checkpoint = checkpoints["learned"]
    with pytest.raises(ValueError, match="aggregation='power', but .* trained with 'lambda'.*Resume with that one"):
        run(tmp_path, resume=checkpoint, aggregation="power")
    assert quietly(tmp_path, resume=checkpoint, aggregation="lambda").lambdas == whole.lambdas[2:]


def test_a_value_outside_the_bounds_is_projected_before_the_first_loss(checkpoints, tmp_path):
    _, checkpoint = checkpoints["fixed"]
    seen = []
    trainer = trainer_of(tmp_path, lambda_init=0.05, lambda_bounds=[0.0, 0.1])
    inner = type(trainer).compute_loss

    def noting(self, *args, **kwargs):
        seen.append(self.lambda_value)
        return inner(self, *args, **kwargs)

    type(trainer).compute_loss = noting
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert seen[0] == pytest.approx(0.1) and max(seen) <= 0.1 + 1e-7


def test_without_any_optimizer_state_a_warning(checkpoints, tmp_path):
    import shutil

    for kind, companion in (("learned", False), ("companion", True)):
        copy = tmp_path / kind / "checkpoint-2"
        shutil.copytree(checkpoints[kind][1], copy)
        (copy / "optimizer.pt").unlink()
        (copy / "lambda_optimizer.json").unlink(missing_ok=True)
        with pytest.warns(UserWarning, match="without its optimizer state: it is not in the checkpoint"):
            resumed = run(tmp_path / kind, resume=copy, companion=companion)
        assert len(resumed.lambdas) == 2


DAMAGE = {
    "lambda.json": {
        "400 digits": lambda text: text.replace('"skipped": 0', '"skipped": ' + "9" * 5000),
        "a huge integer": lambda text: re.sub(r'"lambda": [^,]+', '"lambda": ' + "9" * 400, text),
        "infinity": lambda text: re.sub(r'"lambda": [^,]+', '"lambda": Infinity', text),
        "1e300": lambda text: re.sub(r'"lambda": [^,]+', '"lambda": 1e300', text),
        "a text": lambda text: re.sub(r'"lambda": [^,]+', '"lambda": "0.1"', text),
        "nested": lambda text: '{"lambda": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "a list": lambda text: "[]",
        "null": lambda text: "null",
        "no key": lambda text: text.replace('"skipped"', '"skip"'),
        "torn": lambda text: text[: len(text) // 2],
        "empty": lambda text: "",
    },
    "lambda_optimizer.json": {
        "null groups": lambda text: json.dumps(json.loads(text) | {"param_groups": None}),
        "two groups": lambda text: json.dumps(json.loads(text) | {"param_groups": [{"params": [0]}] * 2}),
        "a NaN moment": lambda text: re.sub(r'("exp_avg": \{[^}]*"values": \[)[^\]]*', r"\1NaN", text, flags=re.S),
        "another shape": lambda text: re.sub(r'("exp_avg": \{[^}]*"shape": \[)[^\]]*', r"\g<1>2", text, flags=re.S),
        "two values": lambda text: re.sub(
            r'("exp_avg": \{[^}]*"shape": \[)[^\]]*(\][^\[]*\[)[^\]]*', r"\g<1>2\g<2>1, 2", text, flags=re.S
        ),
        "an unknown dtype": lambda text: text.replace('"float32"', '"float33"', 1),
        "no state": lambda text: json.dumps({"param_groups": json.loads(text)["param_groups"]}),
        "nested": lambda text: "[" * 100_000,
        "torn": lambda text: text[: len(text) // 2],
    },
}


@pytest.mark.parametrize(("file", "damage"), [(file, name) for file, kinds in DAMAGE.items() for name in kinds])
def test_damaged_files_are_named(checkpoints, tmp_path, file, damage):
    import shutil

    companion = file == "lambda_optimizer.json"
    copy = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoints["companion" if companion else "learned"][1], copy)
    text = (copy / file).read_text()
    (copy / file).write_text(DAMAGE[file][damage](text))
    assert (copy / file).read_text() != text
    with pytest.raises(ValueError, match=f"{file} is damaged .*To start λ.* afresh") as error:
        run(tmp_path, resume=copy, companion=companion)
    assert len(str(error.value)) < 700
