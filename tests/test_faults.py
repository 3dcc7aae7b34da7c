"""What goes wrong in real runs: training goes on or stops with a clear error, and λ and the checkpoint stay valid."""

import json
import math
import os

import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch import launch
from support import Batch, build_model, config, train
from trl import GRPOConfig, GRPOTrainer
from worker import run_job

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
from trl_lambda.preference.lambda_parameter import LambdaParameter
from trl_lambda.weights import length_weights, probability_weights

BOTH = {"aggregation": "lambda", "lambda_init": 0.7, "token_regulation": "sigmoid"}
CUT = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 1e-3}


def survives(tmp_path, batch=None, **options):
    """Three steps; λ, the model and the checkpoint are valid afterwards, and the checkpoint can be resumed."""
    arguments = BOTH | CUT | {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 3} | options
    result = train(LambdaGRPOTrainer, LambdaGRPOConfig, batch, **arguments)
    assert all(math.isfinite(value) for value in result.lambdas)
    assert all(p.isfinite().all() for p in result.trainer.model.parameters())
    saved = json.loads((tmp_path / "checkpoint-3" / "lambda.json").read_text())
    assert saved["lambda"] == result.lambdas[-1]
    return result


def unmoved(result):
    assert result.lambdas == [pytest.approx(0.7)] * 3


def test_all_completions_masked(tmp_path):
    batch = Batch(truncated=set(range(12)))
    result = survives(tmp_path, batch, mask_truncated_completions=True)
    unmoved(result)
    assert result.losses == [0.0] * 6


def test_a_group_masked_whole(tmp_path):
    batch = Batch(truncated={4, 5, 6, 7})
    result = survives(tmp_path, batch, mask_truncated_completions=True)
    assert len(set(result.lambdas)) == 3


def test_all_rewards_equal(tmp_path):
    batch = Batch()
    batch.rewards = [1.0] * 12
    unmoved(survives(tmp_path, batch))


@pytest.mark.parametrize("value", [None, math.nan])
@pytest.mark.parametrize("rows", [{0}, {4, 5, 6, 7}, set(range(12))])
def test_rewards_that_are_missing(tmp_path, rows, value):
    batch = Batch()
    batch.rewards = [value if row in rows else reward for row, reward in enumerate(batch.rewards)]
    result = survives(tmp_path, batch)
    if len(rows) == 12:
        unmoved(result)


@pytest.mark.parametrize("length", [1, 7])
def test_all_lengths_equal(tmp_path, length):
    """σ = 0: every weight is 1 whatever λ is, and λ has no gradient."""
    result = survives(tmp_path, Batch(lengths=[[length] * 4] * 3))
    unmoved(result)
    assert result.logs[0]["length_weight/min"] == result.logs[0]["length_weight/max"] == 1.0


def test_two_responses_per_group(tmp_path):
    survives(tmp_path, Batch(lengths=[[1, 12], [5, 5], [3, 2]]), per_device_train_batch_size=3)


def test_bf16_autocast_and_bf16_weights(tmp_path):
    full = survives(tmp_path / "fp32")
    autocast = survives(tmp_path / "autocast", bf16=True)
    assert autocast.lambdas == pytest.approx(full.lambdas, abs=5e-3)  # bf16 has 8 bits
    weights = survives(tmp_path / "weights", model=build_model().to(torch.bfloat16))
    assert weights.trainer._lambda.tensor.dtype == torch.float32
    assert weights.lambdas == pytest.approx(full.lambdas, abs=5e-3)


def test_auto_find_batch_size_is_refused_by_trl():
    for config_class in (GRPOConfig, LambdaGRPOConfig):
        with pytest.raises(ValueError, match="auto_find_batch_size is not supported by GRPO"):
            config(config_class, Batch(), auto_find_batch_size=True)


def test_an_incomplete_last_batch(tmp_path):
    """Five prompts at three per generation batch: TRL drops the rest, and so do we."""
    batch = Batch()
    dataset = batch.dataset(repeats=2).select(range(5))
    counts = []
    pairs = [(LambdaGRPOTrainer, LambdaGRPOConfig, BOTH), (GRPOTrainer, GRPOConfig, {})]
    for trainer_class, config_class, own in pairs:
        options = CUT | {"max_steps": -1, "num_train_epochs": 2, "output_dir": str(tmp_path)} | own
        result = train(trainer_class, config_class, batch, trainer_options={"train_dataset": dataset}, **options)
        counts.append(result.trainer.state.global_step)
    assert counts[0] == counts[1] == 2


# ---- Gradients that are not finite ----


def test_not_finite_on_one_rank_only(tmp_path):
    """Every rank skips the same step, counts it, and stays at the same λ."""
    job = {
        "trainer": "lambda",
        "options": BOTH | {"per_device_train_batch_size": 6, "max_steps": 4, "learning_rate": 0.0},
        "not_finite": {"rank": 1, "step": 1},
    }
    (ranks,) = launch([job], tmp_path, 2)
    lambdas = ranks[0]["lambdas"]
    assert ranks[1]["lambdas"] == lambdas and all(map(math.isfinite, lambdas))
    assert lambdas[0] == lambdas[1] and len(set(lambdas)) == 3
    for rank in ranks:
        assert [entry["lambda/skipped"] for entry in rank["history"] if "loss" in entry] == [0, 1, 1, 1]


def test_a_log_on_one_rank_alone_does_not_wait_for_the_others(tmp_path):
    """As with GRPOTrainer: a callback may log on the main process, at any time."""
    job = {
        "trainer": "lambda",
        "options": BOTH | {"per_device_train_batch_size": 6, "max_steps": 4, "logging_steps": 4},
    }
    (ranks,) = launch([job | {"log_on_rank_0": True}], tmp_path, 2)
    assert ranks[0]["lambdas"] == ranks[1]["lambdas"] and len(ranks[0]["lambdas"]) == 4


def test_metrics_of_two_ranks_are_those_of_one_process(tmp_path):
    options = BOTH | {"max_steps": 2, "logging_steps": 2, "learning_rate": 0.0, "lambda_learning_rate": 1e-30}
    jobs = [{"trainer": "lambda", "options": options | {"per_device_train_batch_size": n}} for n in (6, 3)]
    jobs[1]["options"]["gradient_accumulation_steps"] = 2
    one = run_job({"trainer": "lambda", "options": options | {"per_device_train_batch_size": 12}})
    for ranks in launch(jobs, tmp_path, 2):
        for rank in ranks:
            mine, theirs = ([entry for entry in r["history"] if "loss" in entry][0] for r in (rank, one))
            names = [key for key in theirs if key.startswith(("token_weight/", "length_weight/", "share/length"))]
            assert len(names) >= 10
            for name in names:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_a_rank_without_a_gradient_joins_the_reduce():
    parameter = make_parameter()
    parameter.reduce_gradient(Accelerator(cpu=True))
    assert parameter.tensor.grad.tolist() == [0.0]


def make_parameter(**options) -> LambdaParameter:
    defaults = {"learnable": True, "bounds": None, "max_grad_norm": 1.0, "device": torch.device("cpu")}
    return LambdaParameter(0.5, **(defaults | options))


@pytest.mark.parametrize("scale", [1.0, 1024.0, 65536.0])
def test_the_companion_takes_fp16_loss_scaling_out(scale):
    """Two micro-batches under a loss scale, as DeepSpeed or a scaler applies it inside backward."""
    parameter, accelerator = make_parameter(), Accelerator(cpu=True)
    for factor in (0.25, 0.5):
        loss = parameter.probe_scale((parameter.tensor * factor).sum())
        assert loss.item() == 0.5 * factor
        (loss * scale).backward()
    with torch.no_grad():  # an evaluation between the steps has losses, and no backward pass
        for _ in range(3):
            parameter.probe_scale(parameter.tensor.sum())
    parameter.reduce_gradient(accelerator)
    assert parameter.tensor.grad.item() == 0.75
    parameter.finish_step()
    (parameter.probe_scale(parameter.tensor.sum()) * 2 * scale).backward()  # the next step, at another scale
    parameter.reduce_gradient(accelerator)
    assert parameter.tensor.grad.item() == 1.0


def test_in_the_main_optimizer_the_scaler_takes_the_scale_out_and_overflow_skips():
    parameter, accelerator = make_parameter(max_grad_norm=0.0), Accelerator(cpu=True)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    parameter.add_group(optimizer, learning_rate=0.1, adam_eps=None)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for overflow in (False, True):
        before = parameter.value
        loss = (weight * 3 + parameter.tensor * 2).sum() * (math.inf if overflow else 1.0)
        scaler.scale(loss).backward()
        parameter.reduce_gradient(accelerator)
        scaler.unscale_(optimizer)
        parameter.prepare_step()
        scaler.step(optimizer)
        scaler.update()
        parameter.finish_step()
        optimizer.zero_grad()
        assert parameter.value == pytest.approx(before if overflow else before - 0.2)
    assert parameter.skipped == 1 and weight.item() == pytest.approx(0.7)


# ---- Random inputs ----

EXAMPLES = int(os.environ.get("TRL_LAMBDA_EXAMPLES", "500"))  # `make fuzz` sets 50 000 each


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 64).flatmap(
        lambda g: st.lists(st.lists(st.integers(0, 131072), min_size=g, max_size=g), min_size=1, max_size=4)
    ),
    st.floats(-100, 100, width=32),
    st.sampled_from(["lambda", "power"]),
    st.sampled_from(["batch", "prompt"]),
    st.sampled_from([torch.int32, torch.int64, torch.float32]),
)
def test_any_lengths(lengths, lam, aggregation, scope, dtype):
    lengths = torch.tensor(lengths, dtype=dtype)
    parameter = torch.tensor([lam], requires_grad=True)
    weights = length_weights(lengths, parameter, aggregation=aggregation, scope=scope)
    assert weights.isfinite().all() and torch.equal(weights > 0, lengths > 0)
    weights.mul(torch.linspace(-3, 3, lengths.numel()).view_as(weights)).sum().backward()
    assert parameter.grad.isfinite().all()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.floats(max_value=0.0, allow_nan=False), min_size=1, max_size=40),
    st.sampled_from(["sigmoid", "linear"]),
    st.floats(0.0, 1.0),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_any_log_probabilities(logps, regulation, alpha, dtype):
    logps = torch.tensor(logps, dtype=torch.float64).clamp(min=-3e4).to(dtype)
    alpha = max(alpha, 1e-3) if regulation == "sigmoid" else alpha
    weights = probability_weights(logps, regulation=regulation, alpha=alpha)
    assert weights.isfinite().all() and (weights > 0).all() and weights.shape == logps.shape
    order = logps.argsort()
    assert (weights[order].diff() >= 0).all()
