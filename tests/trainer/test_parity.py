"""TRL's own loss is the oracle wherever a member coincides with a `loss_type`: loss and gradient."""

import pytest
from harness import (
    LENGTHS,
    Batch,
    assert_equal_in_double,
    assert_same_bits,
    build_model,
    tool_mask,
    train,
    train_ours,
    train_trl,
)

from trl_lambda import TRGRPOConfig, TRGRPOTrainer

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
# Groups of 4 over micro-batches of 3 rows; the learning rate takes the second step of a generation batch off policy.
CUT = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
CUT |= {"max_steps": 2, "learning_rate": 0.02}
FIXED = {"lambda_learnable": False}
WEIGHT_ONE = [{"length_weight": "dapo"}, FIXED, FIXED | {"length_weight": "power"}]
LEVELS = ["token", "sequence"]
BOTH_LEVELS = pytest.mark.parametrize(("level", "beta"), [("token", 0.1), ("sequence", 0.0)])


def both(ours: dict, theirs: dict, batch=None, *, model=None, double=False, **options):
    fresh = (build_model(double=True) if double else model for _ in range(2))
    mine = train_ours(batch, model=next(fresh), **options, **ours)
    return mine, train_trl(batch, model=next(fresh), **options, **theirs)


@BOTH_LEVELS
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_on_is_trl(loss_type, level, beta, model_folder):
    options = CUT | {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta, "model": model_folder}
    mine, theirs = both({"length_weight": None}, {}, **options)
    assert_same_bits(mine, theirs)
    assert [log.keys() for log in mine.logs] == [log.keys() for log in theirs.logs]


@BOTH_LEVELS
@pytest.mark.parametrize("ours", WEIGHT_ONE)
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_weight_one_is_trl_token_mean_to_the_last_bit(loss_type, ours, level, beta, model_folder):
    options = CUT | {"loss_type": loss_type, "importance_sampling_level": level, "beta": beta, "model": model_folder}
    mine, theirs = both(ours, {}, **options)
    assert_same_bits(mine, theirs)
    clip = [key for key in theirs.logs[-1] if key.startswith("clip_ratio")]
    assert {key: mine.logs[-1][key] for key in clip} == {key: theirs.logs[-1][key] for key in clip}


@pytest.mark.parametrize("length_weight", ["lambda_grpo", "power"])
def test_a_learnable_lambda_at_zero_is_trl_dapo_to_the_last_bit(length_weight):
    mine, theirs = both({"length_weight": length_weight}, {}, **CUT | {"max_steps": 1})
    assert_same_bits(mine, theirs)
    assert mine.lambda_grads[0] != 0.0


MEMBERS = [
    ({"length_weight": "grpo"}, {"loss_type": "grpo"}),
    ({"length_weight": "grpo", "length_weight_scope": "prompt"}, {"loss_type": "grpo"}),
    ({"length_weight": "power", "lambda_init": -1.0, "lambda_learnable": False}, {"loss_type": "grpo"}),
    ({"length_weight": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    ({"length_weight": "dr_grpo", "length_weight_scope": "prompt"}, {"loss_type": "dr_grpo"}),
    ({"length_weight": "grpo", "loss_type": "sapo"}, {"loss_type": "sapo"}),
]
CUTS = [
    CUT,
    # An accumulation window over two generation batches.
    CUT | {"steps_per_generation": 2, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 4},
    CUT | {"num_iterations": 2, "max_steps": 4},
    CUT | {"gradient_accumulation_steps": 1, "steps_per_generation": 1, "per_device_train_batch_size": 12},
]


@pytest.mark.parametrize(
    ("cut", "level"), [(0, "token"), (0, "sequence"), (1, "sequence"), (2, "token"), (3, "token")]
)
@pytest.mark.parametrize(("ours", "theirs"), MEMBERS)
def test_members_equal_trl_loss_types(ours, theirs, level, cut):
    assert_equal_in_double(*both(ours, theirs, double=True, **CUTS[cut], importance_sampling_level=level))


FEATURES = {
    "delta": {"delta": 1.1},
    "entropy bonus": {"entropy_coef": 0.05},
    "entropy quantile": {"top_entropy_quantile": 0.5},
    "off-policy mask": {"off_policy_mask_threshold": 1e-5},
    "truncated": {"mask_truncated_completions": True},
    "tools": {},
    "kl": {"beta": 0.1},
    "biased kl": {"beta": 0.1, "use_bias_correction_kl": False},
    "batch rewards": {"scale_rewards": "batch"},
}


def feature_batch(feature: str) -> Batch:
    return Batch(
        truncated={1, 5, 8, 9, 10, 11} if feature == "truncated" else set(),  # the third group whole
        env_mask=tool_mask(LENGTHS) if feature == "tools" else None,
    )


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("ours", WEIGHT_ONE)
def test_weight_one_is_trl_with_every_feature(ours, feature, model_folder):
    options = CUT | FEATURES[feature] | {"model": model_folder}
    assert_same_bits(*both(ours, {}, feature_batch(feature), **options))


# KL is reduced by TRL's own loss_type, token mean here and sequence mean there: it stays unweighted, and so differs.
@pytest.mark.parametrize("feature", [name for name in FEATURES if "kl" not in name])
@pytest.mark.parametrize("member", ["grpo", "dr_grpo"])
def test_members_equal_trl_with_every_feature(member, feature):
    options = CUT | FEATURES[feature]
    runs = both({"length_weight": member}, {"loss_type": member}, feature_batch(feature), double=True, **options)
    assert_equal_in_double(*runs)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "sapo", "luspo"])
def test_a_token_weight_of_one_leaves_every_reduction_alone(loss_type):
    """AR with α = 0 weights every token by 1, through the (B, T) path."""
    options = CUT | {"loss_type": loss_type}
    mine = train(TRGRPOTrainer, TRGRPOConfig, token_weight="ar", token_weight_kwargs={"alpha": 0.0}, **options)
    assert_same_bits(mine, train_trl(**options))


def test_evaluation_with_one_generation_per_prompt_is_trl():
    batch = Batch(lengths=[[3], [9], [5], [1]])
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "num_generations_eval": 1, "eval_steps": 1}
    options |= {"per_device_eval_batch_size": 4, "eval_strategy": "steps"}
    options |= {"trainer_options": {"eval_dataset": batch.dataset()}}
    runs = train_ours(batch, lambda_init=3.0, **options), train_trl(batch, **options)
    mine, theirs = (next(log for log in run.trainer.state.log_history if "eval_loss" in log) for run in runs)
    assert mine["eval_loss"] == theirs["eval_loss"] and mine["eval_length_weight/ess"] == 1.0
