"""In place of TRL's trainer: the same bits where no weight is on, the same arguments, rewards, data sets and logs."""

import json
import math
import sys
from collections import Counter

import pytest
import torch
from datasets import Dataset
from harness import Batch, assert_same_bits, build, build_model, build_tokenizer, config, train, watch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer, TRGRPOConfig, TRGRPOTrainer
from trl_lambda.metrics.loss_metrics import LossMetrics

CUT = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
STEPS = {"max_steps": 3, "learning_rate": 1e-2}
OFF, TR, POWER = {"length_weight": None}, {"token_weight": "tr_grpo"}, {"length_weight": "power"}


def run(batch=None, **options):
    return train(LambdaGRPOTrainer, LambdaGRPOConfig, batch, **options)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"])
def test_without_weights_it_is_trls_trainer_bit_for_bit(loss_type):
    options = STEPS | CUT | {"loss_type": loss_type, "trainer_options": {"noise": 0.3}}
    mine, theirs = run(**options, **OFF), train(GRPOTrainer, GRPOConfig, **options)
    assert_same_bits(mine, theirs)
    assert [log.keys() for log in mine.logs] == [log.keys() for log in theirs.logs]


@pytest.mark.parametrize("weight", ["lambda_grpo", "power", "dapo"])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_at_lambda_zero_and_fixed_it_is_trls_token_mean_bit_for_bit(loss_type, weight):
    options = STEPS | CUT | {"loss_type": loss_type, "trainer_options": {"noise": 0.3}}
    fixed = {} if weight == "dapo" else {"lambda_learnable": False}
    mine = run(length_weight=weight, **options, **fixed)
    assert_same_bits(mine, train(GRPOTrainer, GRPOConfig, **options))
    assert mine.logs[-1]["length_weight/ess"] == 1 if fixed else "lambda/value" not in mine.logs[-1]


def test_a_loss_that_calls_trls_is_trls():
    class Scaled(LambdaGRPOTrainer):
        loss_reduction = "token_mean"

        def _compute_loss(self, model, inputs):
            return 1.0 * super()._compute_loss(model, inputs)

    assert_same_bits(train(Scaled, LambdaGRPOConfig, **STEPS), run(**STEPS))


def test_args_none_builds_a_default_config(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL's default is bf16, which its check allows on a GPU only.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    for trainer_class, config_class in [(LambdaGRPOTrainer, LambdaGRPOConfig), (TRGRPOTrainer, TRGRPOConfig)]:
        trainer = trainer_class(model_folder, lambda completions, **kwargs: [0.0], train_dataset=Batch().dataset())
        assert type(trainer.args) is config_class and trainer.args.output_dir.endswith(f"-{trainer_class._name}")
    assert (trainer.length_weight, trainer.token_weight.name) == (None, "tr_grpo")


def test_arguments_by_position_as_trl_takes_them():
    batch = Batch()
    given = {
        "model": build_model(),
        "reward_funcs": batch.reward,
        "args": config(LambdaGRPOConfig, batch),
        "train_dataset": batch.dataset(),
        "processing_class": build_tokenizer(),
        "optimizers": (None, None),
        "peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }
    names = list(GRPOTrainer.__init__.__code__.co_varnames)[1 : GRPOTrainer.__init__.__code__.co_argcount]
    trainer = LambdaGRPOTrainer(*(given.get(name) for name in names[: names.index("peft_config") + 1]))
    assert type(trainer.model).__name__ == "PeftModelForCausalLM"


def test_a_weight_passed_to_the_trainer_is_in_the_args_that_are_logged():
    def half(lengths):
        return 0.5 + 0 * lengths

    batch = Batch()
    args = config(LambdaGRPOConfig, batch)
    trainer = build(LambdaGRPOTrainer, args, batch, length_weight=half, token_weight=lambda probs: probs)
    assert trainer.args.length_weight.endswith("half") and "<lambda>" in trainer.args.token_weight
    assert (args.length_weight, args.token_weight) == ("lambda_grpo", None) and trainer.lambda_value is None
    half_step = watch(trainer)
    trainer.train()
    whole = train(
        LambdaGRPOTrainer,
        LambdaGRPOConfig,
        trainer_options={"token_weight": lambda probs: 2 * probs},
        length_weight="dapo",
    )
    assert half_step.losses[0] == pytest.approx(whole.losses[0] / 4, rel=1e-6)


def test_rewards_and_data_sets_of_trl_keep_working():
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
    on_access = Dataset.from_dict({"text": list(batch.dataset(repeats=8)["prompt"])})
    on_access = on_access.with_transform(lambda rows: {"prompt": rows["text"]})
    options = STEPS | {"remove_unused_columns": False}
    assert run(trainer_options={"train_dataset": on_access}, **options).losses == run(**options).losses


# ---- Logs ----


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


def test_trackers_get_the_weights_metrics(tmp_path):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is in the dev extra"
    )
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "trainer_options": {"eval_dataset": Batch().dataset()}}
    result = run(report_to="tensorboard", output_dir=str(tmp_path), max_steps=2, **TR, **evaluation)
    log = events.EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent)).Reload()
    for name in ("length_weight/ess", "token_weight/at_max", "share/length_q4", "mass/positive"):
        assert f"eval/{name}" in log.Tags()["scalars"]
        logged = [event.value for event in log.Scalars(f"train/{name}")]
        assert logged == pytest.approx([entry[name] for entry in result.logs]) and len(logged) == 2


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
        if (name in self.WAITS or by_mask) and not self.is_called_by("places_of"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def is_called_by(name):
        frame = sys._getframe(2)
        while frame is not None and frame.f_code.co_name != name:
            frame = frame.f_back
        return frame is not None


def syncs_of(trainer_class, config_class, **options):
    """Synchronising operations inside `compute_loss`, over two steps of four micro-batches."""
    syncs = Syncs()

    class Watched(trainer_class):
        def compute_loss(self, *args, **kwargs):
            with syncs:
                return super().compute_loss(*args, **kwargs)

    Watched.__name__ = trainer_class.__name__
    train(Watched, config_class, max_steps=2, **CUT, **options)
    return Counter(syncs.seen)


@pytest.mark.parametrize("options", [{}, TR | {"token_weight_inside_clip": True}], ids=["f", "f and v in the clip"])
def test_the_loss_waits_for_the_device_as_often_as_trls(options):
    theirs = syncs_of(GRPOTrainer, GRPOConfig, loss_type="dapo")
    assert sum(theirs.values()) > 8  # the watch does see TRL's own
    assert syncs_of(LambdaGRPOTrainer, LambdaGRPOConfig, **options) == theirs


# ---- Runs that go wrong ----


def test_reentrant_checkpointing_with_features_does_not_warn():
    options = POWER | {"lambda_side": "signed", "lambda_features": ["length", "mean_logp"]}
    options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    run(**options, trainer_options={"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("options", [{}, POWER | {"lambda_side": "signed"}, POWER | {"length_target": 4.0}], ids=str)
def test_a_reward_that_is_not_finite_is_not_remembered(options, value):
    class Once(Batch):
        calls = 0

        def reward(self, completions, row, **kwargs):
            Once.calls += 1
            rewards = [len(self.completions[r]) / 12 for r in row]
            return [value, *rewards[1:]] if Once.calls == 2 else rewards

    Once.calls = 0
    result = run(Once(), max_steps=4, **options)
    assert all(map(math.isfinite, result.lambdas)) and result.lambdas[-1] not in (0.0, result.lambdas[-2])
    json.dumps(result.trainer.lambda_learning.state_dict(), allow_nan=False)


def test_a_run_from_which_nothing_can_be_learned_is_told_of_once():
    """Every answer cut, and equal rewards in all groups, 20 batches in a row."""
    batch = Batch(truncated=set(range(12)))
    batch.rewards = [0.0] * 12
    with pytest.warns(UserWarning, match="Nothing can be learned: in 20 generation batches in a row") as seen:
        run(batch, max_steps=42, logging_steps=50)
    assert len([w for w in seen if "Nothing can be learned" in str(w.message)]) == 1
    batch.rewards[0] = 1.0  # one group with a spread
    run(batch, max_steps=21)


def test_a_generation_batch_masked_whole_has_no_largest_weight():
    logs = run(Batch(truncated=set(range(12))), mask_truncated_completions=True, lambda_init=1.0).logs
    assert logs[0]["length_weight/max"] is None and logs[0]["length_weight/min"] is None
