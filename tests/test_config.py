"""Defaults, command-line forms and every refusal of the configuration, each read for its message."""

import dataclasses
import math
import re
import warnings

import pytest
from transformers import HfArgumentParser
from trl import GRPOConfig

from trl_lambda import LambdaGRPOConfig, TRGRPOConfig

BASE = {"output_dir": "unused", "bf16": False, "use_cpu": True, "report_to": "none"}

DEFAULTS = {
    "aggregation": "lambda",
    "aggregation_scope": "batch",
    "lambda_init": 0.0,
    "lambda_learnable": True,
    "lambda_learning_rate": 0.1,
    "lambda_adam_eps": 1.0,
    "lambda_max_grad_norm": 1.0,
    "lambda_bounds": None,
    "lambda_side": "both",
    "lambda_features": ["length"],
    "lambda_rule": None,
    "lambda_gain": 2.0,
    "positive_weight": 1.0,
    "length_target": None,
    "length_scale": 1 / 9,
    "token_regulation": None,
    "regulation_alpha": None,
    "regulation_slope": 9.0,
    "regulation_center": 0.25,
    "regulation_min": 1.0,
    "regulation_max": 1.4,
    "regulation_inside_clip": False,
    "token_metrics": True,
}


def own_fields(config_class):
    inherited = {f.name for f in dataclasses.fields(GRPOConfig)}
    return {f.name: f for f in dataclasses.fields(config_class) if f.name not in inherited}


def defaults(config_class):
    fields = own_fields(config_class).items()
    return {name: f.default_factory() if f.default is dataclasses.MISSING else f.default for name, f in fields}


def test_fields_and_defaults():
    assert defaults(LambdaGRPOConfig) == DEFAULTS
    changed = {"aggregation": None, "token_regulation": "sigmoid"}
    assert defaults(TRGRPOConfig) == DEFAULTS | changed
    LambdaGRPOConfig(**BASE), TRGRPOConfig(**BASE)


def test_every_field_is_documented_twice():
    for name, f in own_fields(LambdaGRPOConfig).items():
        assert f.metadata["help"]
        assert re.search(rf"^ +{name} \(", LambdaGRPOConfig.__doc__, re.MULTILINE), name


def test_command_line():
    parser = HfArgumentParser(LambdaGRPOConfig)
    arguments = ["--output_dir", "x", "--bf16", "false", "--use_cpu", "--report_to", "none"]
    (config,) = parser.parse_args_into_dataclasses(
        [*arguments, "--aggregation", "none", "--token_regulation", "linear", "--regulation_alpha", "0.6"]
    )
    assert config.aggregation is None and config.token_regulation == "linear" and config.regulation_alpha == 0.6
    (config,) = parser.parse_args_into_dataclasses([*arguments, "--lambda_bounds", "-1", "2.5"])
    assert config.lambda_bounds == [-1.0, 2.5] and config.aggregation == "lambda"


REFUSALS = [
    (
        {"aggregation": "mean"},
        "aggregation='mean' is unknown; accepted: lambda, power, grpo, dapo, dr_grpo, balanced or None",
    ),
    ({"aggregation_scope": "group"}, "aggregation_scope='group' is unknown; accepted: batch, prompt"),
    ({"lambda_init": math.nan}, "lambda_init=nan must be finite"),
    ({"lambda_init": math.inf}, "lambda_init=inf must be finite"),
    ({"lambda_learning_rate": 0.0}, "lambda_learning_rate=0.0 must be finite and > 0"),
    ({"lambda_learning_rate": math.nan}, "lambda_learning_rate=nan must be finite"),
    ({"lambda_adam_eps": -1.0}, "lambda_adam_eps=-1.0 must be finite and > 0"),
    ({"lambda_max_grad_norm": -1.0}, "lambda_max_grad_norm=-1.0 must be >= 0"),
    ({"lambda_max_grad_norm": math.nan}, "lambda_max_grad_norm=nan must be >= 0"),
    ({"lambda_bounds": [1.0, 1.0]}, "lambda_bounds=[1.0, 1.0] must be two numbers [low, high] with low < high"),
    ({"lambda_bounds": [0.0]}, "lambda_bounds=[0.0] must be two numbers"),
    ({"lambda_bounds": [math.nan, 1.0]}, "lambda_bounds=[nan, 1.0] must be two numbers"),
    ({"lambda_bounds": [1.0, 2.0]}, "lambda_init=0.0 must lie in lambda_bounds=[1.0, 2.0]"),
    ({"length_scale": 0.0}, "length_scale=0.0 must be finite and > 0"),
    ({"length_scale": 0.4}, "length_scale=0.4 is too large for groups of 8 responses"),
    ({"num_generations_eval": 100}, "length_scale=0.111111 is too large for groups of 100 responses"),
    ({"loss_type": "grpo"}, "Use loss_type='dapo' with aggregation='grpo'"),
    ({"loss_type": "dr_grpo"}, "Use loss_type='dapo' with aggregation='dr_grpo'"),
    ({"loss_type": "bnpo"}, "Use loss_type='dapo' with aggregation='dapo'"),
    ({"loss_type": "luspo"}, "importance_sampling_level='sequence' and aggregation='dapo'"),
    ({"loss_type": "new"}, "loss_type='new' brings its own reduction"),
    ({"token_regulation": "tanh"}, "token_regulation='tanh' is unknown; accepted: 'sigmoid', 'linear'"),
    ({"token_regulation": "sigmoid", "regulation_alpha": 0.0}, "regulation_alpha=0.0 must be finite and > 0"),
    ({"token_regulation": "linear", "regulation_alpha": 1.1}, "regulation_alpha=1.1 must be in [0, 1]"),
    ({"token_regulation": "sigmoid", "regulation_slope": 0.0}, "regulation_slope=0.0 must be finite and > 0"),
    ({"token_regulation": "sigmoid", "regulation_center": 2.0}, "regulation_center=2.0 must be a probability"),
    ({"token_regulation": "sigmoid", "regulation_min": 0.0}, "regulation_min=0.0 must be finite and > 0"),
    (
        {"token_regulation": "sigmoid", "regulation_min": 2.0},
        "regulation_max=1.4 must be finite and >= regulation_min",
    ),
    ({"aggregation": "grpo", "lambda_init": 1.0}, "lambda_init=1.0 has no effect with aggregation='grpo'"),
    ({"aggregation": None, "lambda_bounds": [-1, 1]}, "lambda_bounds=[-1, 1] has no effect with aggregation=None"),
    ({"aggregation": "dapo", "lambda_learning_rate": 0.2}, "lambda_learning_rate=0.2 has no effect with aggregation"),
    ({"lambda_learnable": False, "lambda_adam_eps": 0.1}, "lambda_adam_eps=0.1 has no effect with lambda_learnable"),
    ({"lambda_learnable": False, "lambda_bounds": [-1, 1]}, "lambda_bounds=[-1, 1] has no effect with lambda_learn"),
    ({"aggregation": "power", "length_scale": 0.2}, "length_scale=0.2 has no effect with aggregation='power'"),
    ({"aggregation": None, "aggregation_scope": "prompt"}, "aggregation_scope='prompt' has no effect"),
    ({"regulation_alpha": 0.5}, "regulation_alpha=0.5 has no effect with token_regulation=None"),
    ({"regulation_inside_clip": True}, "regulation_inside_clip=True has no effect with token_regulation=None"),
    ({"token_regulation": "linear", "regulation_max": 2.0}, "regulation_max=2.0 has no effect with token_regulation="),
]
INSIDE = {"token_regulation": "sigmoid", "regulation_inside_clip": True}
INSIDE_REFUSALS = [
    ({"loss_type": "cispo"}, "needs the PPO clip, which loss_type='cispo' has not"),
    ({"loss_type": "sapo"}, "needs the PPO clip, which loss_type='sapo' has not"),
    ({"loss_type": "vespo"}, "needs the PPO clip, which loss_type='vespo' has not"),
    ({"loss_type": "luspo", "aggregation": None}, "needs the PPO clip, which loss_type='luspo' has not"),
    ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' has one ratio for all"),
    ({"beta": 0.1}, "beta=0.1 and use_bias_correction_kl=True would weight the KL term"),
    ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5 would shift the divergence"),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_bounds": 1}, "lambda_bounds=1 must be two numbers"),
        ({"lambda_bounds": [None, 1]}, "lambda_bounds=[None, 1] must be two numbers"),
        ({"lambda_bounds": [0.0, 1e39]}, "lambda_bounds=[0.0, 1e+39] must be finite in float32"),
        ({"lambda_bounds": ["low", "high"]}, "lambda_bounds=['low', 'high'] must be two numbers"),
        ({"lambda_init": 1e39}, "lambda_init=1e+39 must be finite in float32"),
        ({"lambda_init": "half"}, "lambda_init='half' must be a number, got str"),
        ({"lambda_learning_rate": None}, "lambda_learning_rate=None must be a number, got NoneType"),
        ({"lambda_max_grad_norm": True}, "lambda_max_grad_norm=True must be a number, got bool"),
        ({"aggregation": None, "aggregation_scope": "prompt"}, "aggregation_scope='prompt' has no effect"),
        ({"aggregation": "dapo", "lambda_learnable": False}, "lambda_learnable=False has no effect"),
        ({"aggregation": None, "token_metrics": False}, "token_metrics=False has no effect"),
    ],
)
def test_what_cannot_be_or_has_no_effect(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LambdaGRPOConfig(**BASE, **options)


def test_numbers_that_yaml_reads_as_text():
    read = LambdaGRPOConfig(**BASE, lambda_bounds=["-1e0", "1e0"], lambda_init="5e-1", lambda_learning_rate="1e-2")
    assert (read.lambda_bounds, read.lambda_init, read.lambda_learning_rate) == ([-1.0, 1.0], 0.5, 0.01)


@pytest.mark.parametrize(("options", "message"), REFUSALS)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LambdaGRPOConfig(**BASE, **options)


@pytest.mark.parametrize(("options", "message"), INSIDE_REFUSALS)
def test_refusals_inside_the_clip_say_what_to_use(options, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            LambdaGRPOConfig(**BASE, **INSIDE, **options)
    assert "Use regulation_inside_clip=False, or" in str(error.value)


def test_fields_assigned_later_are_checked_by_validate():
    config = LambdaGRPOConfig(**BASE, aggregation="grpo")
    config.loss_type = "grpo"
    with pytest.raises(ValueError, match="loss_type='grpo' brings its own reduction"):
        config.validate()


def test_accepted_inside_the_clip():
    LambdaGRPOConfig(**BASE, **INSIDE)
    LambdaGRPOConfig(**BASE, **INSIDE, beta=0.1, use_bias_correction_kl=False)
    TRGRPOConfig(**BASE, regulation_inside_clip=True, loss_type="grpo", delta=1.5)


@pytest.mark.parametrize("loss_type", ["cispo", "vespo"])
def test_a_learnable_lambda_on_a_score_function_surrogate_warns(loss_type):
    with pytest.warns(UserWarning, match=f"loss_type='{loss_type}' with a learnable λ"):
        LambdaGRPOConfig(**BASE, loss_type=loss_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        LambdaGRPOConfig(**BASE, loss_type=loss_type, lambda_learnable=False)
        LambdaGRPOConfig(**BASE, loss_type=loss_type, aggregation="grpo")
