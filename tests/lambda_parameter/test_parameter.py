"""λ's gradient, its clip, average and scale in fp16, and the settings in `lambda.json`."""

import math

import pytest
import torch
from accelerate import Accelerator

from trl_lambda.lambda_parameter import Descent, Fixed, LambdaFile, LambdaParameter, Regression


def make(learning=None, features=("length",)) -> LambdaParameter:
    return LambdaParameter(
        0.5, learning or Descent("dapo"), bounds=None, device=torch.device("cpu"), features=features
    )


def test_the_clip_keeps_direction_and_bound_and_the_log_the_gradient_before_it():
    parameter = make(features=("length", "min_logp", "mean_logp"))
    assert parameter.values == [0.5, 0.0, 0.0] and parameter.values[0] == 0.5
    parameter.tensor.grad = torch.tensor([3.0, 0.0, -4.0])
    parameter.clip_gradient()
    assert parameter.tensor.grad.tolist() == pytest.approx([0.6, 0.0, -0.8]) and parameter.grads == [5.0]
    one = make()
    one.tensor.grad = torch.tensor([-3e38])  # its square is not finite
    one.clip_gradient()
    assert one.tensor.grad.item() == pytest.approx(-1.0) and one.grads == pytest.approx([-3e38]) and one.skipped == 0


def test_a_value_from_a_file_is_kept_in_bounds():
    parameter = make()
    parameter.bounds = (-1.0, 1.0)
    parameter.load([-7.0], 4)
    assert parameter.values[0] == -1.0 and parameter.skipped == 4


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


def test_a_tuple_in_the_settings_is_the_list_that_the_file_has_of_it(tmp_path):
    file = LambdaFile(make(), {"bounds": (1, 2), "weight": "f(g=<function g at 0x7f2a>)"}, is_needed=True)
    (tmp_path / "trainer_state.json").write_text("{}")
    file.write(tmp_path, 3, home="here")
    LambdaFile(make(), {"bounds": [1, 2], "weight": "f(g=<function g at 0x1e>)"}, is_needed=True).check(tmp_path)
    with pytest.raises(ValueError, match=r"bounds=None, but .* was trained with \[1, 2\]. Resume with that one"):
        LambdaFile(make(), {}, is_needed=True).check(tmp_path)


@pytest.mark.parametrize("value", [object(), math.nan], ids=["object", "nan"])
def test_parameters_that_json_cannot_hold_are_refused_before_training(value):
    with pytest.raises(ValueError, match=r"length_weight_kwargs and token_weight_kwargs must hold JSON values \("):
        LambdaFile(None, {"length_weight_kwargs": {"table": value}}, is_needed=True)
