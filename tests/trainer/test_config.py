"""Defaults, command-line forms and every refusal of the configuration, each read for its message."""

import ast
import dataclasses
import math
import re
import warnings

import pytest
import user_weights
from harness import train_ours
from transformers import HfArgumentParser
from trl import GRPOConfig

from trl_lambda import LambdaGRPOConfig, TRGRPOConfig
from trl_lambda.weights import LENGTH_WEIGHTS

BASE = {"output_dir": "unused", "bf16": False, "use_cpu": True, "report_to": "none"}
DEFAULTS = {
    "length_weight": "lambda_grpo",
    "length_weight_kwargs": None,
    "length_weight_scope": "batch",
    "drop_tied_groups": False,
    "positive_weight": 1.0,
    "lambda_side": None,
    "lambda_features": ["length"],
    "length_target": None,
    "lambda_init": 0.0,
    "lambda_learnable": True,
    "lambda_learning_rate": 0.1,
    "lambda_bounds": None,
    "lambda_gain": 2.0,
    "token_weight": None,
    "token_weight_kwargs": None,
    "token_weight_inside_clip": False,
    "token_metrics": True,
}
POWER, FIXED = {"length_weight": "power"}, {"lambda_learnable": False}
TARGET = POWER | {"length_target": 9}
TR, OFF = {"token_weight": "tr_grpo"}, {"length_weight": None}
INSIDE = TR | {"token_weight_inside_clip": True}


def own_fields(config_class):
    inherited = {f.name for f in dataclasses.fields(GRPOConfig)}
    return {f.name: f for f in dataclasses.fields(config_class) if f.name not in inherited}


def test_fields_and_defaults():
    for config_class, changed in ((LambdaGRPOConfig, {}), (TRGRPOConfig, OFF | TR)):
        config = config_class(**BASE)
        assert {name: getattr(config, name) for name in own_fields(config_class)} == DEFAULTS | changed


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_field_is_documented_twice(name):
    for config_class in (LambdaGRPOConfig, TRGRPOConfig):
        text = own_fields(config_class)[name].metadata["help"]
        assert len(text) > 20 and (name != "length_weight" or all(f"'{x}'" in text for x in LENGTH_WEIGHTS))
    (documented,) = re.findall(rf"^        {name} \((.+)\):$", LambdaGRPOConfig.__doc__, re.MULTILINE)
    default = documented.partition("defaults to `")[2].rstrip("`")
    assert (ast.literal_eval(default) if default else None) == DEFAULTS[name]


def test_command_line():
    base = "--output_dir x --bf16 false --use_cpu --report_to none"

    def read(texts, config_class=LambdaGRPOConfig):
        (config,) = HfArgumentParser(config_class).parse_args_into_dataclasses(f"{base} {texts}".split())
        return config

    for none in ("none", "None", "null"):
        config = read(f'--length_weight {none} --token_weight ar --token_weight_kwargs {{"alpha":0.6}}')
        assert (config.length_weight, config.token_weight, config.token_weight_kwargs) == (None, "ar", {"alpha": 0.6})
    config = read('--lambda_bounds -1 2.5 --length_weight_kwargs {"length_scale":0.2}')
    assert config.lambda_bounds == [-1.0, 2.5] and config.length_weight_kwargs == {"length_scale": 0.2}
    config = read("--length_weight power --lambda_side signed --lambda_features length mean_logp")
    assert config.lambda_features == ["length", "mean_logp"] and config.side == "signed"
    assert read("--token_weight none --length_weight grpo", TRGRPOConfig).token_weight is None


LEGAL = [
    POWER | {"lambda_side": "signed", "lambda_features": ["mean_logp", "length"], "lambda_gain": 1.0},
    POWER | {"lambda_side": "negative", "lambda_learnable": False, "lambda_init": -2.0},
    TARGET | {"lambda_bounds": [-5.0, 5.0], "lambda_init": 4.0, "positive_weight": 2.0},
    {"length_weight": "lambda_grpo", "length_target": 0.6, "lambda_side": "signed"},
    {"length_weight": "dr_grpo"} | TR | {"token_weight_kwargs": {"min": 0.5, "max": 2}},
    OFF | {"loss_type": "luspo", "positive_weight": 3.0, "importance_sampling_level": "sequence"},
    OFF | {"positive_weight": 3.0, "token_metrics": False},
    {"length_weight": "recipes.studies.arena.held_power.held_positive3", "lambda_gain": 3.0},  # its side is its own
    OFF | {"loss_type": "bnpo", "token_weight": "ar"},
    INSIDE | {"beta": 0.1, "use_bias_correction_kl": False},
    INSIDE | OFF | {"loss_type": "grpo", "delta": 1.5},
]


@pytest.mark.parametrize("options", LEGAL, ids=str)
def test_legal_combinations(options):
    LambdaGRPOConfig(**BASE, **options)


NO_EFFECT = [
    # Without f, without λ, without a λ that learns, without v.
    *((OFF, name, value) for name, value in (
        ("length_weight_kwargs", {"length_scale": 0.2}), ("length_weight_scope", "prompt"), ("drop_tied_groups", True),
        ("lambda_init", 1.0), ("lambda_bounds", [-1, 1]), ("lambda_side", "signed"), ("token_metrics", False))),
    *(({"length_weight": member}, name, value) for member in ("grpo", "balanced") for name, value in (
        ("lambda_init", 1.0), ("lambda_learning_rate", 0.2), ("lambda_learnable", False), ("lambda_side", "positive"),
        ("lambda_features", ["mean_logp"]), ("lambda_gain", 1.0), ("length_target", 9.0), ("lambda_bounds", [-1, 1]))),
    *((POWER | FIXED, name, value) for name, value in (
        ("lambda_bounds", [-1, 1]), ("lambda_learning_rate", 0.2), ("length_target", 9.0), ("lambda_gain", 1.0))),
    *(({}, name, value) for name, value in (("token_weight_kwargs", {"alpha": 0.5}), ("lambda_gain", 1.0))),
    (TARGET, "lambda_gain", 1.0),
    ({"lambda_side": "signed"}, "lambda_features", ["length", "mean_logp"]),
    ({"length_weight": "user_weights.power"}, "lambda_side", "signed"),
    ({"length_weight": "user_weights.power"}, "length_target", 9.0),
]  # fmt: skip


@pytest.mark.parametrize(("options", "name", "value"), NO_EFFECT, ids=str)
def test_an_option_without_effect_is_refused(options, name, value):
    message = re.escape(f"{name}={value!r} has no effect") + ".*" + re.escape(f"leave it at {DEFAULTS[name]!r}.")
    with pytest.raises(ValueError, match=message):
        LambdaGRPOConfig(**BASE, **options, **{name: value})


def test_inside_the_clip_is_judged_with_the_trainers_own_weight():
    config = LambdaGRPOConfig(**BASE, token_weight_inside_clip=True)
    assert config.make_weights(token_weight=user_weights.linear)[1].function is user_weights.linear
    with pytest.raises(ValueError, match="token_weight_inside_clip=True has no effect with token_weight=None: leave"):
        config.make_weights()
    config = LambdaGRPOConfig(**BASE, **OFF, num_generations=128, per_device_train_batch_size=128)  # too many for r
    assert config.make_weights(user_weights.power)[0].function is user_weights.power


REFUSALS = [
    ({"length_weight": "mean"}, "length_weight='mean' is unknown; accepted: lambda_grpo, power, grpo, dapo, dr_grpo"),
    ({"length_weight": math.sqrt}, "must be a name or dotted path. Functions go to the trainer"),
    ({"length_weight_kwargs": "length_scale=0.1"}, "length_weight_kwargs='length_scale=0.1' must be a dict, or JSON"),
    ({"length_weight": "no.such.module"}, "length_weight='no.such.module' cannot be imported (ModuleNotFoundError"),
    ({"length_weight": "user_weights.nothing"}, "cannot be imported (AttributeError"),
    ({"length_weight": "user_weights.misspelled"}, "user_weights.misspelled requires length. A weight is called"),
    ({"token_weight": "tanh"}, "token_weight='tanh' is unknown; accepted: tr_grpo, ar, a dotted path"),
    ({"token_weight": "user_weights.power"}, "user_weights.power requires lengths, lam. A weight is called by name"),
    ({"length_weight_kwargs": {"r": 0.1}}, "has 'r': 0.1; 'lambda_grpo' accepts numbers for: length_scale"),
    (POWER | {"length_weight_kwargs": {"length_scale": 0.1}}, "'power' accepts numbers for: nothing"),
    (POWER | {"length_weight_kwargs": {"side": 1}}, "length_weight_kwargs has 'side'"),
    ({"length_weight_kwargs": {"length_scale": "x"}}, "length_weight_kwargs has 'length_scale': 'x'"),
    (TR | {"token_weight_kwargs": {"k": 9}}, "'tr_grpo' accepts numbers for: alpha, slope, center, min, max"),
    ({"token_weight": "ar", "token_weight_kwargs": {"max": 2.0}}, "'ar' accepts numbers for: alpha"),
    ({"length_weight_kwargs": {"length_scale": 0.4}}, "length_scale=0.4 must be > 0 and, for groups of 8"),
    ({"num_generations_eval": 100}, "length_scale=0.111111 must be > 0 and, for groups of 100"),
    (TR | {"token_weight_kwargs": {"alpha": 0.0}}, "alpha, slope > 0"),
    ({"length_weight_scope": "group"}, "length_weight_scope='group' must be one of batch, prompt"),
    ({"lambda_side": "right"}, "lambda_side='right' must be one of both, signed, positive, negative"),
    ({"lambda_init": math.nan}, "lambda_init=nan must be finite"),
    ({"lambda_init": 1e39}, "lambda_init=1e+39 must be finite in float32"),
    ({"lambda_init": "half"}, "lambda_init='half' must be a number, got str"),
    ({"lambda_learning_rate": 0.0}, "lambda_learning_rate=0.0 must be finite and > 0"),
    ({"lambda_learning_rate": None}, "lambda_learning_rate=None must be a number, got NoneType"),
    ({"positive_weight": 0.0}, "positive_weight=0.0 must be finite and > 0"),
    ({"positive_weight": True}, "positive_weight=True must be a number, got bool"),
    (POWER | {"lambda_side": "signed", "lambda_gain": -1.0}, "lambda_gain=-1.0 must be finite and > 0"),
    ({"lambda_bounds": [1.0, 1.0]}, "lambda_bounds=[1.0, 1.0] must be two finite numbers, low < high"),
    ({"lambda_bounds": 1}, "lambda_bounds=1 must be two finite numbers"),
    ({"lambda_bounds": [math.nan, 1.0]}, "lambda_bounds=[nan, 1.0] must be two finite numbers"),
    ({"lambda_bounds": [0.0, 1e39]}, "lambda_bounds=[0.0, 1e+39] must be two finite numbers"),
    ({"lambda_bounds": ["low", "high"]}, "lambda_bounds=['low', 'high'] must be two finite numbers"),
    ({"lambda_bounds": [1.0, 2.0]}, "lambda_init=0.0 must be finite in float32 and in lambda_bounds=[1.0, 2.0]"),
    (POWER | {"lambda_side": "signed", "lambda_features": "length"}, "lambda_features='length' must be a list"),
    (POWER | {"lambda_side": "signed", "lambda_features": ["len"]}, "lambda_features=['len'] must be a list of"),
    (POWER | {"lambda_side": "signed", "lambda_features": ["length", "length"]}, "each at most once"),
    (POWER | {"lambda_features": ["length", "mean_logp"]}, "needs lambda_side='signed', 'positive' or 'negative'"),
    (TARGET | {"length_target": 0}, "length_target=0 must be > 0 and at most 512 tokens"),
    (TARGET | {"length_target": 600}, "length_target=600 must be > 0 and at most 512 tokens"),
    (TARGET | {"lambda_side": "both"}, "length_target=9 needs another lambda_side"),
    (TARGET | {"lambda_features": ["mean_logp"]}, "length_target=9 weights length alone"),
    (TARGET | {"lambda_init": 4.0}, "length_target=9 keeps λ in [-3, 3]"),
    ({"length_weight": "dr_grpo", "max_completion_length": None}, "'dr_grpo' needs max_completion_length"),
    ({"loss_type": "grpo"}, "with length_weight='grpo' (the same policy loss), or length_weight=None to keep it"),
    ({"drop_tied_groups": True, "multi_objective_aggregation": "normalize_then_sum"}, "else equal sums can have"),
    ({"loss_type": "dr_grpo"}, "Use loss_type='dapo' with length_weight='dr_grpo'"),
    ({"loss_type": "bnpo"}, "Use loss_type='dapo' with length_weight='dapo'"),
    ({"loss_type": "luspo"}, "importance_sampling_level='sequence' and length_weight='dapo'"),
    ({"loss_type": "new"}, "loss_type='new' brings its own reduction"),
    *((INSIDE | {"loss_type": loss_type}, "requires a loss_type of dapo, grpo, bnpo, dr_grpo")
      for loss_type in ("cispo", "sapo", "vespo")),
    (INSIDE | {"importance_sampling_level": "sequence"}, "requires importance_sampling_level='token'. Or use False."),
    (INSIDE | {"beta": 0.1, "use_bias_correction_kl": True}, "requires use_bias_correction_kl=False, or beta=0"),
    (INSIDE | {"off_policy_mask_threshold": 0.5}, "requires off_policy_mask_threshold=None"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSALS)
def test_refusals(options, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # TRL's own, of unusual combinations
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            LambdaGRPOConfig(**BASE, **options)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("loss_type", ["cispo", "vespo"])
def test_a_lambda_that_descends_on_a_score_function_surrogate_warns(loss_type):
    with pytest.warns(UserWarning, match=f"loss_type='{loss_type}' with a learnable λ"):
        train_ours(loss_type=loss_type)
    for quiet in (FIXED, {"length_weight": "grpo"}, POWER | {"lambda_side": "signed"}):
        train_ours(loss_type=loss_type, **quiet)
