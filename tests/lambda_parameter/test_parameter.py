"""λ's value, gradient, clip, bounds and parameter group, and `lambda.json`."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from harness import Batch, build, config, train

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
from trl_lambda.lambda_parameter import (
    LAMBDA_FILE,
    Descent,
    Fixed,
    LambdaFile,
    LambdaParameter,
    Regression,
    Target,
    read_lambda_file,
)

CPU = torch.device("cpu")


def make(init=0.5, learning=None, bounds=None, features=("length",)) -> LambdaParameter:
    return LambdaParameter(init, learning or Descent("dapo"), bounds=bounds, device=CPU, features=features)


def test_the_clip_keeps_direction_and_bound_and_the_log_the_gradient_before_it():
    parameter = make(features=("length", "min_logp", "mean_logp"))
    assert parameter.values == [0.5, 0.0, 0.0] and parameter.values[0] == 0.5
    parameter.tensor.grad = torch.tensor([3.0, 0.0, -4.0])
    parameter.clip_gradient()
    assert parameter.tensor.grad.tolist() == pytest.approx([0.6, 0.0, -0.8]) and parameter.grads == [5.0]
    one = make()
    for gradient, clipped in ((-0.3, -0.3), (-7.0, -1.0), (3e38, 1.0)):
        one.tensor.grad = torch.tensor([gradient])
        one.clip_gradient()
        assert one.tensor.grad.item() == pytest.approx(clipped)
    assert one.grads == pytest.approx([-0.3, -7.0, 3e38]) and one.skipped == 0


@pytest.mark.parametrize("gradient", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_dropped_and_counted(gradient):
    parameter = make()
    optimizer = torch.optim.SGD([parameter.group(0.1, {})])
    for value, lam in ((gradient, 0.5), (1.0, 0.4)):
        parameter.tensor.grad = torch.tensor([value])
        parameter.clip_gradient()
        optimizer.step()
        parameter.finish_step()
        assert parameter.values[0] == pytest.approx(lam) and parameter.tensor.grad is None
    assert parameter.skipped == 1


def test_bounds_hold_after_each_step_and_after_a_load():
    parameter = make(bounds=(-1.0, 1.0))
    with torch.no_grad():
        parameter.tensor.fill_(3.0)
    parameter.finish_step()
    assert parameter.values[0] == 1.0
    tensor = parameter.tensor
    parameter.load([-7.0], 4)
    assert parameter.tensor is tensor and parameter.values[0] == -1.0 and parameter.skipped == 4


def test_average_gradient_joins_without_one_and_leaves_other_learning_alone():
    parameter, rule = make(), make(learning=Regression(("length",), 2.0, "positive"))
    for each in (parameter, rule):
        each.average_gradient(Accelerator(cpu=True))
    assert parameter.tensor.grad.tolist() == [0.0] and rule.tensor.grad is None
    assert parameter.for_loss.requires_grad and not rule.for_loss.requires_grad
    assert not make(learning=Fixed()).tensor.requires_grad and rule.tensor.requires_grad


def test_fp16_scaling_is_taken_out_and_overflow_skips():
    parameter, weight = make(), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.add_param_group(parameter.group(0.1, optimizer.defaults))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for overflow in (False, True):
        before = parameter.values[0]
        loss = (weight * 3 + parameter.tensor * 0.5).sum() * (math.inf if overflow else 1.0)
        scaler.scale(loss).backward()
        parameter.average_gradient(Accelerator(cpu=True))
        scaler.unscale_(optimizer)
        parameter.clip_gradient()
        scaler.step(optimizer)
        scaler.update()
        parameter.finish_step()
        optimizer.zero_grad()
        assert parameter.values[0] == pytest.approx(before if overflow else before - 0.05)
    assert parameter.skipped == 1 and weight.item() == pytest.approx(0.7)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop"])
@pytest.mark.parametrize("target", [None, 4.0])
def test_the_group_has_the_options_that_lambda_needs_and_the_models_keep_theirs(optim, target):
    options = {"length_weight": "power", "length_target": target, "lambda_learning_rate": 0.2, "weight_decay": 0.1}
    options |= {"optim": optim, "learning_rate": 1e-3, "adam_beta1": 0.8}
    if optim == "rmsprop":
        options["optim_args"] = "momentum=0.5"
    trainer = build(LambdaGRPOTrainer, config(LambdaGRPOConfig, Batch(), **options), Batch())
    *models, own = trainer.create_optimizer().param_groups
    steps_way = 6 * -math.expm1(-12 * 0.2)  # the width of [-3, 3], and the part of the way of a lone step
    assert own["params"] == [trainer._lambda.tensor] and own["name"] == "lambda" and own["weight_decay"] == 0.0
    assert own["lr"] == pytest.approx(0.2 if target is None else steps_way)
    assert all(group["lr"] == 1e-3 for group in models) and any(group["weight_decay"] == 0.1 for group in models)
    if optim != "sgd":
        assert own["eps"] == 1.0 and all(group["eps"] == 1e-8 for group in models)
    if "adamw" in optim:
        assert all(group["betas"] == (0.8, 0.999) for group in models)
        assert own["betas"] == ((0.8, 0.999) if target is None else (0.0, 0.0))
    if optim == "rmsprop":
        assert own["momentum"] == (0.5 if target is None else 0.0)
    everything = [id(p) for group in (*models, own) for p in group["params"]]
    trained = {id(p) for p in trainer.model.parameters()} | {id(trainer._lambda.tensor)}
    assert len(everything) == len(set(everything)) and set(everything) == trained


# ---- lambda.json ----


def learned(kind):
    learning = {
        "descent": lambda: Descent("dapo"),
        "regression": lambda: Regression(("length",), 2.0, "signed"),
        "target": lambda: Target(40.0, 2, "positive", (-3.0, 3.0)),
    }[kind]()
    return make(0.25, learning)


@pytest.mark.parametrize("kind", ["descent", "regression", "target"])
def test_the_file_holds_lambda_and_how_it_learns(kind, tmp_path):
    from trl_lambda.generation_batch import GenerationBatch

    parameter, lengths = learned(kind), torch.tensor([[3, 9, 4]], dtype=torch.int32)
    advantages = torch.tensor([[1.0, -0.5, -0.5]])
    parameter.learning.observe(GenerationBatch(torch.arange(3), lengths, lengths.sum(), advantages), 50.0)
    parameter.load([1 / 3], 2)
    (tmp_path / "trainer_state.json").write_text("{}")
    LambdaFile(parameter, {"side": "both"}, is_needed=True).write(tmp_path, 7, home="an AdamW of its own")
    saved = read_lambda_file(tmp_path)
    assert saved["lambda"] == parameter.values[0] and saved["lambdas"] == parameter.values
    assert (saved["skipped"], saved["learnable"], saved["global_step"]) == (2, True, 7)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("lambda")] == [LAMBDA_FILE]
    other = learned(kind)
    file = LambdaFile(other, {"side": "both"}, is_needed=True)
    file.check(tmp_path)
    file.load(tmp_path, home="an AdamW of its own")
    assert other.values == parameter.values and other.skipped == 2
    assert other.learning.state_dict() == parameter.learning.state_dict()
    alone = learned(kind)  # the value without the state, as for the best model
    LambdaFile(alone, {"side": "both"}, is_needed=True).load(tmp_path)
    assert alone.values == parameter.values and alone.learning.state_dict() == learned(kind).learning.state_dict()
    with pytest.raises(ValueError, match=r"λ is in the trainer's SGD now, but in .* it was in an AdamW of its own"):
        file.load(tmp_path, home="the trainer's SGD")
    LambdaFile(None, {}, is_needed=False).write(tmp_path, 0)  # a run without weights leaves none behind
    assert not (tmp_path / LAMBDA_FILE).exists()


REMEDY = "To start from these weights instead, pass model='.*' to a new trainer"


def test_what_cannot_be_resumed_is_refused_with_a_remedy(tmp_path):
    file = LambdaFile(make(0.25), {"length_weight": "power", "bounds": (1, 2)}, is_needed=True)
    with pytest.raises(ValueError, match=r"has no trainer_state.json: .* Resume from an earlier one"):
        file.check(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"lambda.json cannot be read \(FileNotFoundError: .* {REMEDY}"):
        file.check(tmp_path)
    LambdaFile(None, {}, is_needed=False).check(tmp_path)  # no weights before and none now
    file.write(tmp_path, 3)
    remedy = REMEDY.replace("'.*'", r"'.*' and lambda_init=0.25")
    with pytest.raises(ValueError, match=f"(?s)holds a model and no optimizer state of λ: .*{remedy}"):
        file.check(tmp_path)
    file.write(tmp_path, 3, home="here")
    file.check(tmp_path)  # a tuple is a list in the file, and the same
    for settings, change in (
        ({"length_weight": "lambda_grpo", "bounds": (1, 2)}, "length_weight='lambda_grpo', but .* with 'power'"),
        ({"length_weight": "power"}, r"bounds=None, but .* was trained with \[1, 2\]"),
        (
            {"length_weight": "power", "bounds": (1, 2), "side": "signed"},
            "side='signed', but .* was trained with None",
        ),
    ):
        with pytest.raises(ValueError, match=rf"{change}. Resume with that one. {remedy}"):
            LambdaFile(make(), settings, is_needed=True).check(tmp_path)
    good = json.loads((tmp_path / LAMBDA_FILE).read_text())
    damages = ["", "[]", '{"lambda": 1', "[" * 10**5]
    damages += [
        json.dumps({key: value for key, value in good.items() if key != missing})
        for missing in ("lambdas", "skipped", "settings")
    ]
    damages += [
        json.dumps(good | change)
        for change in ({"lambdas": [math.nan]}, {"lambdas": ["x"]}, {"skipped": None}, {"settings": 3})
    ]
    for damage in damages:
        (tmp_path / LAMBDA_FILE).write_text(damage)
        with pytest.raises(ValueError, match=rf"lambda.json cannot be read .*: it is damaged, or .* {REMEDY}"):
            file.check(tmp_path)


@pytest.mark.parametrize("value", [object(), math.nan], ids=["object", "nan"])
def test_parameters_that_json_cannot_hold_are_refused_before_training(value):
    with pytest.raises(ValueError, match=r"length_weight_kwargs and token_weight_kwargs must hold JSON values \("):
        LambdaFile(None, {"length_weight_kwargs": {"table": value}}, is_needed=True)


def test_a_file_is_beside_every_saved_model(tmp_path):
    run = train(
        LambdaGRPOTrainer, LambdaGRPOConfig, output_dir=str(tmp_path), max_steps=2, save_strategy="steps", save_steps=1
    )
    run.trainer.save_model()
    for folder, lam, home in (
        (tmp_path / "checkpoint-1", run.lambdas[0], "the trainer's SGD"),
        (tmp_path, run.lambdas[1], None),
    ):
        saved = read_lambda_file(folder)
        assert saved["lambda"] == lam and saved["optimizer"] == home
        assert (
            saved["settings"]["length_weight"] == "lambda_grpo" and saved["settings"]["lambda_learning"] == "descent"
        )
