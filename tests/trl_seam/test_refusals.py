"""What would bypass the weights is refused before any model is loaded, in a sentence that names the way out."""

import re

import pytest
from harness import Batch, config
from trl import GRPOConfig, GRPOTrainer
from user_weights import half, linear, power

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer, TRGRPOConfig, TRGRPOTrainer

OURS, TR = (LambdaGRPOTrainer, LambdaGRPOConfig), (TRGRPOTrainer, TRGRPOConfig)


def refused(message, classes=OURS, change=None, **arguments):
    batch, args = Batch(), config(classes[1], Batch())
    for name, value in (change or {}).items():  # after the configuration has checked itself
        setattr(args, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        classes[0]("a/model-to-download", batch.reward, args, batch.dataset(), rollout_func=batch.rollout, **arguments)


def test_another_config():
    refused("args must be a LambdaGRPOConfig for LambdaGRPOTrainer, got GRPOConfig", (LambdaGRPOTrainer, GRPOConfig))
    refused("replace it by trl_lambda.TRGRPOConfig", (TRGRPOTrainer, LambdaGRPOConfig))


F = {"length_weight": half}
OPTIONS = [
    ({}, {"loss_type": "grpo"}, "loss_type='grpo' brings its own reduction"),  # f and TRL's own division by length
    ({}, {"length_weight": "grpo", "lambda_init": 1.0}, "lambda_init=1.0 has no effect"),
    ({}, {"token_weight": "tr_grpo", "token_weight_kwargs": {"min": 2.0}}, "0 < min <= max"),
    # Of a weight that the trainer's own replaces.
    (F, {"length_weight": "power"}, "length_weight='power' has no effect beside the trainer's own length_weight"),
    (F, {"length_weight_kwargs": {"length_scale": 0.2}}, "length_weight_kwargs={'length_scale': 0.2} has no effect"),
    (F, {"lambda_init": 0.5}, "lambda_init=0.5 has no effect with length_weight='user_weights.half'"),
    ({"length_weight": power}, {"lambda_side": "signed"}, "lambda_side='signed' has no effect with"),
    (
        {"token_weight": linear},
        {"token_weight": "tr_grpo"},
        "token_weight='tr_grpo' has no effect beside the trainer's",
    ),
]


@pytest.mark.parametrize(("weights", "change", "message"), OPTIONS)
def test_options_are_checked_by_the_trainer_too(weights, change, message):
    refused(message, change=change, **weights)


@pytest.mark.parametrize("method", ["compute_liger_loss", "_chunked_logps"])  # to TRL 1.13, in TRL 1.14
def test_liger_where_it_bypasses_the_loss(monkeypatch, method):
    monkeypatch.setattr(GRPOTrainer, method, None, raising=False)
    refused(
        "use_liger_kernel=True makes this TRL compute its loss in a fused kernel or", change={"use_liger_kernel": True}
    )


def test_unsloth_as_a_base_class_and_as_a_patched_method(monkeypatch):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return None

    compute_loss.__module__ = "unsloth_compiled_cache.UnslothTrainers"
    based = type("Ours", (LambdaGRPOTrainer, type("UnslothGRPOTrainer", (GRPOTrainer,), {})), {})
    patched = type("Patched", (LambdaGRPOTrainer,), {"compute_loss": compute_loss})
    for trainer_class in (based, patched):
        refused("Unsloth has replaced GRPOTrainer's loss", (trainer_class, LambdaGRPOConfig))
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", compute_loss)
    refused("Unsloth has replaced GRPOTrainer's loss", TR)
