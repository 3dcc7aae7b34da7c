"""What the trainer refuses, each read for its message, before any model is loaded."""

import re

import pytest
from support import Batch, build, config
from trl import GRPOConfig

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer, TRGRPOConfig, TRGRPOTrainer
from trl_lambda.trl_seam import refusals

NO_MODEL = "a/model-that-would-have-to-be-downloaded"


def refused(message, config_class=LambdaGRPOConfig, trainer_class=LambdaGRPOTrainer, trainer_options=None, **options):
    batch = Batch()
    arguments = {"reward_funcs": batch.reward, "train_dataset": batch.dataset()} | (trainer_options or {})
    arguments.setdefault("rollout_func", batch.rollout)
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer_class(model=NO_MODEL, args=config(config_class, batch, **options), **arguments)


def test_plain_config():
    refused("args must be a LambdaGRPOConfig for LambdaGRPOTrainer, got GRPOConfig", GRPOConfig)
    refused("replace it by trl_lambda.TRGRPOConfig", GRPOConfig, TRGRPOTrainer)
    refused("args must be a TRGRPOConfig", LambdaGRPOConfig, TRGRPOTrainer)


def test_adam_eps_where_there_is_none():
    batch = Batch()
    trainer = build(LambdaGRPOTrainer, config(LambdaGRPOConfig, batch, optim="sgd", lambda_adam_eps=0.5), batch)
    with pytest.raises(ValueError, match="lambda_adam_eps=0.5 has no effect: SGD has no scalar eps"):
        trainer.create_optimizer()


def test_a_field_assigned_after_the_config_was_built():
    batch = Batch()
    args = config(LambdaGRPOConfig, batch, aggregation="grpo")
    args.loss_type = "grpo"  # f and TRL's own division by length at once
    with pytest.raises(ValueError, match="loss_type='grpo' brings its own reduction"):
        LambdaGRPOTrainer(NO_MODEL, batch.reward, args, batch.dataset(), rollout_func=batch.rollout)


def test_liger_where_it_bypasses_the_loss(monkeypatch):
    monkeypatch.setattr(refusals, "liger_bypasses_loss", lambda trainer_class: True)
    monkeypatch.setattr(LambdaGRPOConfig, "use_liger_kernel", True)
    batch = Batch()
    args = config(LambdaGRPOConfig, batch)
    args.use_liger_kernel = True
    with pytest.raises(ValueError, match="use_liger_kernel=True makes this TRL compute its loss in a fused kernel"):
        LambdaGRPOTrainer(NO_MODEL, batch.reward, args, batch.dataset(), rollout_func=batch.rollout)


def test_unsloth(monkeypatch):
    monkeypatch.setattr(refusals, "patched_by_unsloth", lambda trainer_class: True)
    refused("Unsloth has replaced GRPOTrainer's loss")


def test_tr_config_takes_the_same_refusals():
    with pytest.raises(ValueError, match="regulation_slope=9.5 has no effect with token_regulation='linear'"):
        config(TRGRPOConfig, Batch(), token_regulation="linear", regulation_slope=9.5)
