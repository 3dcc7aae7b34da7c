"""What would bypass the weights is refused before any model is loaded, in a sentence that names the way out."""

import re

import pytest
from harness import Batch, config
from trl import GRPOConfig, GRPOTrainer

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer, TRGRPOConfig, TRGRPOTrainer

NO_MODEL = "a/model-that-would-have-to-be-downloaded"


def refused(message, trainer_class=LambdaGRPOTrainer, config_class=LambdaGRPOConfig, change=None, **arguments):
    batch = Batch()
    args = config(config_class, batch)
    for name, value in (change or {}).items():  # after the configuration has checked itself
        setattr(args, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer_class(NO_MODEL, batch.reward, args, batch.dataset(), rollout_func=batch.rollout, **arguments)


def test_another_config():
    refused("args must be a LambdaGRPOConfig for LambdaGRPOTrainer, got GRPOConfig", config_class=GRPOConfig)
    refused("replace it by trl_lambda.TRGRPOConfig", TRGRPOTrainer, GRPOConfig)
    refused("args must be a TRGRPOConfig", TRGRPOTrainer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "grpo"}, "loss_type='grpo' brings its own reduction"),  # f and TRL's own division by length
        ({"length_weight": "grpo", "lambda_init": 1.0}, "lambda_init=1.0 has no effect"),
        ({"token_weight": "tr_grpo", "token_weight_kwargs": {"min": 2.0}}, "0 < min <= max"),
    ],
)
def test_fields_assigned_after_the_config_was_built_are_checked(change, message):
    refused(message, change=change)


def test_options_of_a_weight_that_the_trainers_own_replaces():
    def own(lengths):
        return 1 + 0 * lengths

    refused("length_weight_kwargs={'length_scale': 0.2} has no effect beside the trainer's own length_weight",
            change={"length_weight_kwargs": {"length_scale": 0.2}}, length_weight=own)  # fmt: skip
    refused("lambda_init=0.5 has no effect", change={"lambda_init": 0.5}, length_weight=own)
    refused("length_weight='power' has no effect beside", change={"length_weight": "power"}, length_weight=own)


def test_liger_where_it_bypasses_the_loss(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "compute_liger_loss", None, raising=False)
    refused(
        "use_liger_kernel=True makes this TRL compute its loss in a fused kernel", change={"use_liger_kernel": True}
    )


def test_unsloth_as_a_base_class_and_as_a_patched_method(monkeypatch):
    based = type("Ours", (LambdaGRPOTrainer, type("UnslothGRPOTrainer", (GRPOTrainer,), {})), {})
    refused("Unsloth has replaced GRPOTrainer's loss", based)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return None

    compute_loss.__module__ = "unsloth_compiled_cache.UnslothTrainers"
    refused(
        "Unsloth has replaced GRPOTrainer's loss",
        type("Patched", (LambdaGRPOTrainer,), {"compute_loss": compute_loss}),
    )
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", compute_loss)
    refused("Unsloth has replaced GRPOTrainer's loss", TRGRPOTrainer, TRGRPOConfig)
