"""In place of TRL's trainer: the same arguments, rewards, logs and waits for the device."""

import json
import math
import traceback
from collections import Counter

import pytest
import torch
import user_weights
from harness import LORA, Batch, build, build_model, build_tokenizer, by_length, config, train, watch
from harness import train_ours as run
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer, TRGRPOConfig, TRGRPOTrainer
from trl_lambda.metrics.loss_metrics import LossMetrics

CUT = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
STEPS, POWER = {"max_steps": 3, "learning_rate": 1e-2}, {"length_weight": "power"}


def test_args_none_builds_a_default_config(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL's default is bf16, which its check allows on a GPU only.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    for trainer_class, config_class in [(LambdaGRPOTrainer, LambdaGRPOConfig), (TRGRPOTrainer, TRGRPOConfig)]:
        trainer = trainer_class(model_folder, lambda completions, **kwargs: [0.0], train_dataset=Batch().dataset())
        assert type(trainer.args) is config_class and trainer.args.output_dir.endswith(f"-{trainer_class._name}")
    assert (trainer.length_weight, trainer.token_weight.name) == (None, "tr_grpo")


def test_arguments_by_position_as_trl_takes_them():
    batch, model, tokenizer = Batch(), build_model(), build_tokenizer()
    args = config(LambdaGRPOConfig, batch)
    trainer = LambdaGRPOTrainer(model, batch.reward, args, batch.dataset(), None, tokenizer)
    assert trainer.model is model and trainer.args is args and trainer.processing_class is tokenizer
    assert len(trainer.train_dataset) == 3 and trainer.eval_dataset is None


def test_a_weight_passed_to_the_trainer_is_in_the_args_that_are_logged():
    batch, args = Batch(), config(LambdaGRPOConfig, Batch())
    trainer = build(LambdaGRPOTrainer, args, batch, length_weight=user_weights.half, token_weight=lambda probs: probs)
    assert trainer.args.length_weight.endswith("half") and "<lambda>" in trainer.args.token_weight
    assert (args.length_weight, args.token_weight) == ("lambda_grpo", None) and trainer.lambda_value is None
    trainer.train()
    whole = run(trainer_options={"token_weight": lambda probs: 2 * probs}, length_weight="dapo")
    assert trainer.seen_losses[0] == pytest.approx(whole.losses[0] / 4, rel=1e-6)


def test_what_rewards_log_stays_theirs():
    seen = {}

    def with_metrics(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **kwargs):
        seen["step"] = trainer_state.global_step
        log_metric("mine", 1.0)
        log_extra("length_weight", [f"mine {len(ids)}" for ids in completion_ids])
        return [float(len(ids)) for ids in completion_ids]

    batch = Batch()
    result = run(batch, trainer_options={"reward_funcs": [with_metrics, batch.reward]}, log_completions=True)
    assert seen["step"] == 0 and result.logs[0]["mine"] == 1.0
    assert list(result.trainer._logs["extra"]["length_weight"])[0] == "mine 3"  # a column of the user's stays his


class LogNow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = state.global_step == 2


def test_a_log_ordered_by_a_later_callback_has_the_metrics():
    result = run(**STEPS, logging_steps=100, trainer_options={"callbacks": [LogNow()]})
    assert [entry["step"] for entry in result.logs] == [2]
    assert {"lambda/value", "length_weight/ess", "share/length_q1", "lambda/grad"} <= result.logs[0].keys()
    assert result.logs[0]["lambda/value"] == result.lambdas[1]


def test_an_epoch_that_ends_within_a_logging_interval_changes_no_metric():
    """The same three batches in one epoch and in three: sums over tokens of the whole interval, not means of means."""
    logged, reduced = [], []

    class Counting(LossMetrics):
        def flush(self, accelerator):
            metrics = super().flush(accelerator)
            reduced.append(bool(metrics))
            return metrics

    for repeats, epochs in ((3, 1), (1, 3)):
        batch = Batch(lengths=[[3, 1, 12, 6]])
        options = {"logging_steps": 3, "learning_rate": 0.05, "lambda_init": 1.0, "lambda_learnable": False}
        args = config(LambdaGRPOConfig, batch, num_train_epochs=epochs, max_steps=-1, **options)
        trainer = build(LambdaGRPOTrainer, args, batch, train_dataset=batch.dataset(repeats=repeats))
        result = watch(trainer)
        trainer._loss_metrics["train"] = Counting()
        trainer.train()
        logged += result.logs
    assert len(logged) == 2 and sum(reduced) == 2  # once each, when the log is due
    ours = [key for key in logged[0] if key.startswith(("share/", "length_weight/", "advantage/", "lambda/", "mass/"))]
    assert len(ours) > 15 and all(logged[0][key] == logged[1][key] for key in ours)


class Syncs(TorchDispatchMode):
    """Operations that make a host wait for its device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        indices = args[1] if name.startswith(("index", "_index")) and isinstance(args[1], (list, tuple)) else ()
        by_mask = any(torch.is_tensor(index) and index.dtype in (torch.bool, torch.uint8) for index in indices)
        # `places_of` looks at values on a CPU only.
        if (name in self.WAITS or by_mask) and "places_of" not in [f.name for f in traceback.extract_stack()]:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def syncs_of(trainer_class, config_class, **options):
    syncs = Syncs()

    class Watched(trainer_class):
        def compute_loss(self, *args, **kwargs):
            with syncs:
                return super().compute_loss(*args, **kwargs)

    Watched.__name__ = trainer_class.__name__
    train(Watched, config_class, max_steps=2, **CUT, **options)
    return Counter(syncs.seen)


@pytest.mark.parametrize("options", [{}, {"token_weight": "tr_grpo", "token_weight_inside_clip": True}], ids=str)
def test_the_loss_waits_for_the_device_as_often_as_trls(options):
    theirs = syncs_of(GRPOTrainer, GRPOConfig, loss_type="dapo")
    assert sum(theirs.values()) > 8  # the watch does see TRL's own
    assert syncs_of(LambdaGRPOTrainer, LambdaGRPOConfig, **options) == theirs


def test_reentrant_checkpointing_with_features_does_not_warn():
    options = POWER | {"lambda_side": "signed", "lambda_features": ["length", "mean_logp"]}
    options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    run(**options, trainer_options={"peft_config": LoraConfig(**LORA)})


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("options", [{}, POWER | {"lambda_side": "signed"}, POWER | {"length_target": 4.0}], ids=str)
def test_a_reward_that_is_not_finite_is_not_remembered(options, value):
    batch, calls = by_length(), []

    def once(row, **kwargs):
        calls.append(row)
        rewards = [batch.rewards[r] for r in row]
        return [value, *rewards[1:]] if len(calls) == 2 else rewards

    result = run(batch, trainer_options={"reward_funcs": once}, max_steps=4, **options)
    assert all(map(math.isfinite, result.lambdas)) and result.lambdas[-1] not in (0.0, result.lambdas[-2])
    json.dumps(result.trainer._lambda.learning.state_dict(), allow_nan=False)
