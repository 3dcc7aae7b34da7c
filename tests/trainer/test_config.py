"""Defaults, command-line forms and every refusal of the configuration, each read for its message."""

import dataclasses
import math
import re
import warnings

import pytest
from harness import Batch, train
from transformers import HfArgumentParser
from trl import GRPOConfig

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer, LengthWeight, TokenWeight, TRGRPOConfig

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
POWER, TARGET, FIXED = (
    {"length_weight": "power"},
    {"length_weight": "power", "length_target": 9},
    {"lambda_learnable": False},
)
TR, OFF = {"token_weight": "tr_grpo"}, {"length_weight": None}
INSIDE = TR | {"token_weight_inside_clip": True}


def half(lengths):
    return 0.5 + 0 * lengths


def steep(lengths, lam, scale=2.0):
    return (scale * lam * lengths / lengths.max()).exp()


def by_surprise(probs, floor=0.5):
    return floor + 1 - probs


class Own(LengthWeight):
    name = "own"

    def __init__(self, slope=1.0):
        self.slope = slope

    def __call__(self, rows, lam):
        return 1 + self.slope * rows.lengths


def own_fields(config_class):
    inherited = {f.name for f in dataclasses.fields(GRPOConfig)}
    return {f.name: f for f in dataclasses.fields(config_class) if f.name not in inherited}


def test_fields_and_defaults():
    for config_class, changed in ((LambdaGRPOConfig, {}), (TRGRPOConfig, OFF | TR)):
        config = config_class(**BASE)
        assert {name: getattr(config, name) for name in own_fields(config_class)} == DEFAULTS | changed
    assert len(own_fields(LambdaGRPOConfig)) == 17 and own_fields(TRGRPOConfig).keys() == DEFAULTS.keys()


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_field_is_documented_twice(name):
    for config_class in (LambdaGRPOConfig, TRGRPOConfig):
        assert len(own_fields(config_class)[name].metadata["help"]) > 20
    (documented,) = re.findall(rf"^        {name} \((.+)\):$", LambdaGRPOConfig.__doc__, re.MULTILINE)
    default = DEFAULTS[name]
    assert ("defaults to" in documented) == (default is not None)
    if default is not None:
        assert f"defaults to `{str(default) if not isinstance(default, str) else chr(34) + default + chr(34)}`" in (
            documented.replace('["', "['").replace('"]', "']")
        )
    help_text = own_fields(LambdaGRPOConfig)["length_weight"].metadata["help"]
    assert all(
        f"'{member}'" in help_text for member in ("lambda_grpo", "power", "grpo", "dapo", "dr_grpo", "balanced")
    )


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


def test_the_side_of_a_target_is_positive_by_default():
    assert LambdaGRPOConfig(**BASE).side == "both"
    assert LambdaGRPOConfig(**BASE, **TARGET).side == "positive"
    assert LambdaGRPOConfig(**BASE, **TARGET, lambda_side="negative").side == "negative"


@pytest.mark.parametrize(
    ("options", "length_weight", "token_weight"),
    [
        ({"length_weight": f"{__name__}.half"}, f"{__name__}.half", None),
        ({"length_weight": f"{__name__}.steep", "length_weight_kwargs": {"scale": 3.0}, "lambda_init": 0.5},
         f"{__name__}.steep(scale=3.0)", None),
        ({"length_weight": f"{__name__}.Own", "length_weight_kwargs": {"slope": 2.0}}, "own", None),
        ({"token_weight": f"{__name__}.by_surprise"} | OFF, None, f"{__name__}.by_surprise"),
        ({"token_weight": f"{__name__}.by_surprise", "token_weight_kwargs": {"floor": 1.0}}, "lambda_grpo",
         f"{__name__}.by_surprise(floor=1.0)"),
    ],
)  # fmt: skip
def test_a_dotted_path_names_a_weight_of_the_users(options, length_weight, token_weight):
    run = train(LambdaGRPOTrainer, LambdaGRPOConfig, **options)
    f, v = run.trainer.length_weight, run.trainer.token_weight
    assert (f and f.name, v and v.name) == (length_weight, token_weight)
    passed = {}
    if "." in (length_weight or ""):
        passed["length_weight"] = f.function
    if v is not None:
        passed["token_weight"] = v.function
    if passed:  # the same as the object itself, passed to the trainer
        rest = {k: x for k, x in options.items() if k == "lambda_init" or (k == "length_weight" and x is None)}
        assert train(LambdaGRPOTrainer, LambdaGRPOConfig, trainer_options=passed, **rest).losses == run.losses
    else:
        assert f.slope == 2.0


LEGAL = [
    POWER | {"lambda_side": "signed", "lambda_features": ["mean_logp", "length"], "lambda_gain": 1.0},
    POWER | {"lambda_side": "negative", "lambda_learnable": False, "lambda_init": -2.0},
    TARGET | {"lambda_bounds": [-5.0, 5.0], "lambda_init": 4.0, "positive_weight": 2.0},
    {"length_weight": "lambda_grpo", "length_target": 0.6, "lambda_side": "signed"},
    {"length_weight_kwargs": {"length_scale": 0.3}, "length_weight_scope": "prompt", "drop_tied_groups": True},
    {"length_weight": "dr_grpo"} | TR | {"token_weight_kwargs": {"min": 0.5, "max": 2}},
    {"length_weight": "balanced", "positive_weight": 0.5},
    OFF | {"loss_type": "luspo", "positive_weight": 3.0, "importance_sampling_level": "sequence"},
    OFF | {"loss_type": "bnpo", "token_weight": "ar"},
    {"loss_type": "sapo"} | TR,
    INSIDE,
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
    *(({}, name, value) for name, value in (
        ("token_weight_kwargs", {"alpha": 0.5}), ("lambda_gain", 1.0))),
    (TARGET, "lambda_gain", 1.0),
    ({"lambda_side": "signed"}, "lambda_features", ["length", "mean_logp"]),
    ({"length_weight": f"{__name__}.steep"}, "lambda_side", "signed"),
    ({"length_weight": f"{__name__}.steep"}, "length_target", 9.0),
]  # fmt: skip


@pytest.mark.parametrize(("options", "name", "value"), NO_EFFECT, ids=str)
def test_an_option_without_effect_is_refused(options, name, value):
    message = re.escape(f"{name}={value!r} has no effect") + ".*" + re.escape(f"leave it at {DEFAULTS[name]!r}.")
    with pytest.raises(ValueError, match=message):
        LambdaGRPOConfig(**BASE, **options, **{name: value})


def test_inside_the_clip_is_judged_with_the_trainers_own_weight():
    config = LambdaGRPOConfig(**BASE, token_weight_inside_clip=True)
    assert config.make_weights(token_weight=by_surprise)[1].function is by_surprise
    with pytest.raises(ValueError, match="token_weight_inside_clip=True has no effect with token_weight=None: leave"):
        config.make_weights()


REFUSALS = [
    ({"length_weight": "mean"}, "length_weight='mean' is unknown; accepted: lambda_grpo, power, grpo, dapo, dr_grpo"),
    ({"length_weight": "lambda"}, "length_weight='lambda' is unknown"),
    ({"length_weight": "no.such.module"}, "length_weight='no.such.module' cannot be imported (ModuleNotFoundError"),
    ({"length_weight": f"{__name__}.nothing"}, "cannot be imported (AttributeError"),
    ({"token_weight": "tanh"}, "token_weight='tanh' is unknown; accepted: tr_grpo, ar, a dotted path"),
    ({"token_weight": "math.sqrt"}, "A weight is called by name with any of: probs, advantages"),
    ({"length_weight_kwargs": {"r": 0.1}}, "has 'r': 0.1; 'lambda_grpo' accepts numbers for: length_scale"),
    (POWER | {"length_weight_kwargs": {"length_scale": 0.1}}, "'power' accepts numbers for: nothing"),
    (POWER | {"length_weight_kwargs": {"side": 1}}, "length_weight_kwargs has 'side'"),
    (TR | {"token_weight_kwargs": {"k": 9}}, "'tr_grpo' accepts numbers for: alpha, slope, center, min, max"),
    (TR | {"token_weight_kwargs": {"slope": "9"}}, "token_weight_kwargs has 'slope': '9'"),
    ({"token_weight": "ar", "token_weight_kwargs": {"max": 2.0}}, "'ar' accepts numbers for: alpha"),
    ({"length_weight_kwargs": {"length_scale": 0.0}}, "length_scale=0 must be > 0"),
    ({"length_weight_kwargs": {"length_scale": 0.4}}, "length_scale=0.4 must be > 0 and, for groups of 8"),
    ({"num_generations_eval": 100}, "length_scale=0.111111 must be > 0 and, for groups of 100"),
    (TR | {"token_weight_kwargs": {"alpha": 0.0}}, "alpha, slope > 0"),
    (TR | {"token_weight_kwargs": {"center": 2.0}}, "center in [0, 1]"),
    (TR | {"token_weight_kwargs": {"min": 2.0}}, "0 < min <= max"),
    ({"token_weight": "ar", "token_weight_kwargs": {"alpha": 1.1}}, "needs alpha in [0, 1]"),
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
    ({"lambda_bounds": [0.0]}, "lambda_bounds=[0.0] must be two finite numbers"),
    ({"lambda_bounds": 1}, "lambda_bounds=1 must be two finite numbers"),
    ({"lambda_bounds": [math.nan, 1.0]}, "lambda_bounds=[nan, 1.0] must be two finite numbers"),
    ({"lambda_bounds": [None, 1]}, "lambda_bounds=[None, 1] must be two finite numbers"),
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
    ({"loss_type": "grpo"}, "Use loss_type='dapo' with length_weight='grpo' (the same loss), or length_weight=None"),
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


def test_a_list_of_features_that_is_wrong_is_shown_as_it_was_given():
    with pytest.raises(ValueError) as error:  # it was told of as a tuple that must be a list (newcomer's F8)
        LambdaGRPOConfig(**BASE, **POWER, lambda_side="signed", lambda_features=["len"])
    assert str(error.value).count("('len',)") == 0 and "['len']" in str(error.value)


@pytest.mark.parametrize("old", ["aggregation", "token_regulation", "length_scale", "lambda_rule", "lambda_adam_eps"])
def test_old_names_are_gone(old):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{old}'"):
        LambdaGRPOConfig(**BASE, **{old: None})


@pytest.mark.parametrize("loss_type", ["cispo", "vespo"])
def test_a_lambda_that_descends_on_a_score_function_surrogate_warns(loss_type):
    with pytest.warns(UserWarning, match=f"loss_type='{loss_type}' with a learnable λ"):
        train(LambdaGRPOTrainer, LambdaGRPOConfig, loss_type=loss_type)
    for quiet in (FIXED, {"length_weight": "grpo"}, POWER | {"lambda_side": "signed"}):
        train(LambdaGRPOTrainer, LambdaGRPOConfig, Batch(), loss_type=loss_type, **quiet)


def test_the_weights_of_a_config_are_members():
    f, v = LambdaGRPOConfig(**BASE, **TR).make_weights()
    assert isinstance(f, LengthWeight) and isinstance(v, TokenWeight)
    assert LambdaGRPOConfig(**BASE, **OFF).make_weights() == (None, None)
