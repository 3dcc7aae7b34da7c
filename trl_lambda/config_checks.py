"""Every refusal of `LambdaGRPOConfig` that needs no model, and how it reads text for what the text stands for."""

import math
import warnings
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from trl import GRPOConfig

from .preference.files import LARGEST_FLOAT32
from .preference.rules import RULES
from .preference.target import TARGET_BOUNDS
from .weights import SCOPES, LengthWeight, TokenWeight
from .weights.length_weight import LENGTH_WEIGHTS
from .weights.token_weight import TOKEN_WEIGHTS

if TYPE_CHECKING:
    from .lambda_grpo_config import LambdaGRPOConfig

# TRL's `loss_type` names a surrogate and a reduction at once. These have a reduction that a weight per response turns
# into any other one: a token mean, or (sapo) a mean of per-sequence means.
CONVERTIBLE_LOSS_TYPES = ("dapo", "cispo", "vespo", "sapo")
_INSTEAD = {
    "grpo": "loss_type='dapo' with aggregation='grpo' (the same loss), or aggregation=None",
    "dr_grpo": "loss_type='dapo' with aggregation='dr_grpo' (the same loss), or aggregation=None",
    "bnpo": "loss_type='dapo' with aggregation='dapo' (the token mean of the whole batch), or aggregation=None",
    "luspo": "loss_type='dapo' with importance_sampling_level='sequence' and aggregation='dapo' (LUSPO divided by the "
    "batch's mean length), or aggregation=None",
}
# Surrogates with the PPO clip, the only one that the paper's Eq. 9 puts the token weight into.
CLIPPED_LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo")
# Surrogates whose value is A·log π times a constant: only their gradient in the policy is meaningful.
SCORE_FUNCTION_LOSS_TYPES = ("cispo", "vespo")

_POSITIVE = ("lambda_learning_rate", "lambda_adam_eps", "lambda_gain", "positive_weight")
_OPTIONAL = ("length_target", "regulation_alpha")
_TOKEN_NUMBERS = ("regulation_slope", "regulation_center", "regulation_min", "regulation_max")
_NUMBERS = ("lambda_init", "lambda_max_grad_norm", "length_scale", *_POSITIVE, *_OPTIONAL, *_TOKEN_NUMBERS)
# How λ learns: without effect on a λ that is fixed.
_LEARNING = (
    *("lambda_rule", "lambda_gain", "length_target", "lambda_bounds"),
    *("lambda_learning_rate", "lambda_adam_eps", "lambda_max_grad_norm"),
)
# Parameter of a member -> option: without effect beside a member that does not have it.
_members: Any = (LENGTH_WEIGHTS.values(), TOKEN_WEIGHTS.values())
LENGTH_OPTIONS = {f.name: f.metadata.get("option", f.name) for member in _members[0] for f in fields(member)}
TOKEN_PREFIX = "regulation_"
TOKEN_OPTIONS = {f.name: TOKEN_PREFIX + f.name for member in _members[1] for f in fields(member)}
_TRL_OPTIONS = {f.name for f in fields(GRPOConfig)}


def read_texts(args: "LambdaGRPOConfig") -> None:
    """Put what texts stand for in their place: the command line passes "none" as one, and YAML reads 1e-2 as one."""
    for name in ("aggregation", "token_regulation", "lambda_rule"):
        if str(getattr(args, name)).lower() in ("none", "null"):
            setattr(args, name, None)
    for name in _NUMBERS:
        setattr(args, name, _number_from_text(getattr(args, name)))
    if isinstance(args.lambda_bounds, list | tuple):
        args.lambda_bounds = [_number_from_text(bound) for bound in args.lambda_bounds]  # type: ignore[misc]


def check_fields(args: "LambdaGRPOConfig", f: LengthWeight | None, v: TokenWeight | None) -> None:
    """
    Check every added field by itself.

    Args:
        args ([`LambdaGRPOConfig`]): The configuration.
        f, v: weights of the user's, which `aggregation` and `token_regulation` have to leave room for.
    """
    _check_numbers(args)
    if args.lambda_bounds is not None:
        _check_bounds(args)
    if args.aggregation is not None and args.aggregation not in LENGTH_WEIGHTS:
        raise ValueError(
            f"aggregation={args.aggregation!r} is unknown; accepted: {', '.join(LENGTH_WEIGHTS)} or None."
        )
    if args.aggregation_scope not in SCOPES:
        raise ValueError(f"aggregation_scope={args.aggregation_scope!r} is unknown; accepted: {', '.join(SCOPES)}.")
    for name, given in (("aggregation", f), ("token_regulation", v)):
        if given is not None:
            _check_default(args, name, f"beside {given.name}")


def check_together(args: "LambdaGRPOConfig", f: LengthWeight | None, v: TokenWeight | None) -> None:
    """Check the fields beside each other, beside those of `GRPOConfig` and beside the weights that are used."""
    if f is not None:
        if args.loss_type not in CONVERTIBLE_LOSS_TYPES:
            others = f"one of {', '.join(CONVERTIBLE_LOSS_TYPES)}, or aggregation=None"
            raise ValueError(
                f"loss_type={args.loss_type!r} brings its own reduction, which aggregation={f.name!r} would replace. "
                f"Use {_INSTEAD.get(args.loss_type, others)}."
            )
        f.check(max(args.num_generations or 1, args.num_generations_eval or 1))
    _check_unused(args, f, v)
    if f is not None and f.has_lambda and args.lambda_learnable:
        _check_rule(args, f)
    if args.regulation_inside_clip:
        _check_inside_clip(args)


def warn_about_score_function(args: "LambdaGRPOConfig", f: LengthWeight | None) -> None:
    """Warn where λ would descend on a value that means nothing; called while the configuration is built."""
    learns = f is not None and f.has_lambda and args.lambda_learnable and args.rule_of(f) == "descent"
    if learns and args.loss_type in SCORE_FUNCTION_LOSS_TYPES:
        warnings.warn(
            f"loss_type={args.loss_type!r} with a learnable λ: the value of this surrogate is A·log π times a "
            "constant, of which only the gradient in the policy is meaningful, and λ descends on the value. Its "
            "sign then follows the responses' log-likelihood, not their advantage alone. Use loss_type='dapo' or "
            "'sapo', or lambda_learnable=False, for a λ that can be read as a length preference.",
            UserWarning,
            stacklevel=4,
        )


def _check_numbers(args: "LambdaGRPOConfig") -> None:
    for name in _NUMBERS:
        value = getattr(args, name)
        if not (_is_number(value) or value is None and name in _OPTIONAL):
            raise ValueError(f"{name}={value!r} must be a number, got {type(value).__name__}.")
    if not abs(args.lambda_init) <= LARGEST_FLOAT32:
        raise ValueError(f"lambda_init={args.lambda_init} must be finite in float32, the dtype of λ.")
    for name in _POSITIVE:
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"{name}={getattr(args, name)} must be finite and > 0.")
    target, most = args.length_target, args.max_completion_length
    if target is not None and not (0 < target < math.inf and (most is None or target <= most)):
        raise ValueError(f"length_target={target} must be > 0 and at most max_completion_length={most}.")
    if not args.lambda_max_grad_norm >= 0:
        raise ValueError(f"lambda_max_grad_norm={args.lambda_max_grad_norm} must be >= 0 (0 turns the clip off).")


def _check_bounds(args: "LambdaGRPOConfig") -> None:
    bounds: Any = args.lambda_bounds
    numbers = isinstance(bounds, list | tuple) and len(bounds) == 2 and all(_is_number(bound) for bound in bounds)
    if not numbers or not bounds[0] < bounds[1]:
        raise ValueError(f"lambda_bounds={bounds!r} must be two numbers [low, high] with low < high.")
    if not max(map(abs, bounds)) <= LARGEST_FLOAT32:
        raise ValueError(f"lambda_bounds={bounds!r} must be finite in float32, the dtype of λ.")
    if not bounds[0] <= args.lambda_init <= bounds[1]:
        raise ValueError(f"lambda_init={args.lambda_init} must lie in lambda_bounds={bounds}.")


def _check_unused(args: "LambdaGRPOConfig", f: LengthWeight | None, v: TokenWeight | None) -> None:
    """An option that differs from its default and would have no effect is a mistake, not a preference."""
    because_f = f"with aggregation={f and f.name!r}"
    because_v = f"with token_regulation={v and v.name!r}"
    unused: list[tuple[str, str]] = []
    if f is None or not f.has_lambda:
        because = f"{because_f}, which has no λ as 'lambda' and 'power' have"
        unused += [(name, because) for name in ("lambda_learnable", "lambda_init", *_LEARNING)]
    elif not args.lambda_learnable:
        unused += [(name, "with lambda_learnable=False") for name in _LEARNING]
    of_others = {option for name, option in LENGTH_OPTIONS.items() if not hasattr(f, name)}
    unused += [(option, because_f) for option in sorted(of_others - _TRL_OPTIONS)]
    if f is None:  # "grpo" and "dr_grpo" come out the same in both scopes
        unused.append(("aggregation_scope", because_f))
    unused += [(option, because_v) for name, option in TOKEN_OPTIONS.items() if not hasattr(v, name)]
    if v is None:
        unused.append(("regulation_inside_clip", because_v))
    if f is None and v is None:
        unused.append(("token_metrics", f"{because_f} and {because_v.removeprefix('with ')}"))
    for name, because in unused:
        _check_default(args, name, because)


def _check_default(args: "LambdaGRPOConfig", name: str, because: str) -> None:
    field = args.__dataclass_fields__[name]
    value, default = getattr(args, name), field.default
    if default is MISSING:
        default = field.default_factory()
    if value != default:
        raise ValueError(f"{name}={value!r} has no effect {because}: leave it at {default!r}.")


def _check_rule(args: "LambdaGRPOConfig", f: LengthWeight) -> None:
    rule, side = args.rule_of(f), getattr(f, "side", "both")
    if rule not in RULES:
        raise ValueError(f"lambda_rule={rule!r} is unknown; accepted: {', '.join(RULES)} or None.")
    if rule == "target" and args.length_target is None:
        raise ValueError("lambda_rule='target' requires length_target: a number of tokens, or a part up to 1.")
    if rule == "target" and not hasattr(f, "side"):
        raise ValueError(
            f"length_target={args.length_target} needs aggregation='power' or 'lambda', whose λ can be led: "
            f"{f.name} has no side."
        )
    if rule == "descent" and side != "both":
        raise ValueError(
            f"lambda_rule='descent' cannot serve lambda_side={side!r}: dL/dλ would only say that right answers that "
            "are longer have more tokens. Use lambda_rule='regression' or 'target', or a fixed λ "
            "(lambda_learnable=False)."
        )
    if rule != "descent" and side == "both":
        raise ValueError(
            f"lambda_rule={rule!r} needs lambda_side='signed', 'positive' or 'negative': with side 'both' λ > 0 "
            "weighs right and wrong responses alike and does not steer."
        )
    if rule != "regression":
        _check_default(args, "lambda_gain", f"with lambda_rule={rule!r}")
    if rule != "target":
        _check_default(args, "length_target", f"with lambda_rule={rule!r}")
    elif f.lambda_features != ("length",):
        raise ValueError(f"lambda_rule='target' weighs length alone, got lambda_features={args.lambda_features}.")
    elif args.lambda_adam_eps < 1:
        raise ValueError(
            f"lambda_adam_eps={args.lambda_adam_eps} must be at least 1 with lambda_rule='target': with a smaller one "
            "Adam's step ignores how far λ has to go, and λ swings from bound to bound."
        )
    elif args.lambda_bounds is None and not abs(args.lambda_init) <= TARGET_BOUNDS[1]:
        raise ValueError(
            f"lambda_init={args.lambda_init} must lie in lambda_bounds={list(TARGET_BOUNDS)}, which "
            "lambda_rule='target' has if they are not set."
        )


def _check_inside_clip(args: "LambdaGRPOConfig") -> None:
    """v inside the clip goes through `old_per_token_logps`: refuse whatever else reads that tensor."""
    for is_refused, why, instead in (
        (
            args.loss_type not in CLIPPED_LOSS_TYPES,
            f"needs the PPO clip, which loss_type={args.loss_type!r} has not",
            f"a loss_type of {', '.join(CLIPPED_LOSS_TYPES)}",
        ),
        (
            args.importance_sampling_level != "token",
            "weights the ratio of each token, and "
            f"importance_sampling_level={args.importance_sampling_level!r} has one ratio for all",
            "importance_sampling_level='token'",
        ),
        (
            args.beta != 0.0 and args.use_bias_correction_kl,
            f"with beta={args.beta} and use_bias_correction_kl=True would weight the KL term too",
            "use_bias_correction_kl=False",
        ),
        (
            args.off_policy_mask_threshold is not None,
            f"with off_policy_mask_threshold={args.off_policy_mask_threshold} would shift the divergence that the "
            "mask is decided on",
            "no off_policy_mask_threshold",
        ),
    ):
        if is_refused:
            raise ValueError(f"regulation_inside_clip=True {why}. Use regulation_inside_clip=False, or {instead}.")


def _number_from_text(value: object) -> object:
    """The number that a text such as "1e-2" stands for; anything else as it is, for the checks to refuse."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
