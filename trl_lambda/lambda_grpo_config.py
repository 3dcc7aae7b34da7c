"""`LambdaGRPOConfig` and `TRGRPOConfig`: the fields added to `GRPOConfig`, and every refusal that needs no model."""

import math
import warnings
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from .preference.files import LARGEST_FLOAT32
from .preference.rules import RULES
from .preference.target import TARGET_BOUNDS
from .weights import SCOPES, LengthWeight, TokenWeight, make_length_weight, make_token_weight
from .weights.length_weight import LENGTH_WEIGHTS
from .weights.token_weight import TOKEN_WEIGHTS

_TRL_FIELDS = tuple(f.name for f in fields(GRPOConfig))
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

_NUMBER_FIELDS = (
    "lambda_init",
    "lambda_gain",
    "positive_weight",
    "length_target",
    "lambda_learning_rate",
    "lambda_adam_eps",
    "lambda_max_grad_norm",
    "length_scale",
    "regulation_alpha",
    "regulation_slope",
    "regulation_center",
    "regulation_min",
    "regulation_max",
)
_LAMBDA_FIELDS = ("lambda_init", "lambda_bounds")
_GROUP_FIELDS = (
    "lambda_rule",
    "lambda_gain",
    "length_target",
    "lambda_learning_rate",
    "lambda_adam_eps",
    "lambda_max_grad_norm",
)
_TOKEN_PREFIX = "regulation_"
# Options of ours that are parameters of some member: without effect beside a member that does not have them.
_members: Any = (LENGTH_WEIGHTS.values(), TOKEN_WEIGHTS.values())
_LENGTH_PARAMETERS = {  # parameter of a member -> option
    f.name: f.metadata.get("option", f.name) for member in _members[0] for f in fields(member)
}
_TOKEN_PARAMETERS = sorted({f.name for member in _members[1] for f in fields(member)})


@dataclass
class LambdaGRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`LambdaGRPOTrainer`].

    This class includes only the parameters that are added to [`~trl.GRPOConfig`], whose own keep their meaning, with
    one exception: while `aggregation` is set, `loss_type` chooses the surrogate only (`"dapo"`: PPO clip, `"cispo"`,
    `"vespo"`, `"sapo"`), and the reduction is `aggregation`'s.

    Parameters:
        > Length weight f (arXiv 2510.06870)

        aggregation (`str` or `None`, *optional*, defaults to `"lambda"`):
            How much a response counts for its length. `"lambda"`: G · softmax of h^λ over the group, the paper's, and
            the default: at equal `lambda_learning_rate` it moves less in effect, and stayed nearer to λ = 0's reward
            on the two main tasks of `recipes/arena`;
            `"power"`: (|o|/μ)^λ with the token mass preserved, which is DAPO at λ = 0 and, where every response has
            tokens, GRPO at λ = -1;
            `"grpo"`, `"dapo"`, `"dr_grpo"`: the fixed members; `"balanced"`: right and wrong responses of a group each
            count for their number, whatever their length (arXiv 2605.04077, as its abstract reads); `None`: TRL's own
            reduction for `loss_type`. With tools, lengths are the policy's own tokens, while the budget that
            `"dr_grpo"` divides by, `max_completion_length`, includes tool output; and where an environment owns the
            data, members of a group may not share a start: lengths of different tasks are then compared.
        aggregation_scope (`str`, *optional*, defaults to `"batch"`):
            `"batch"`: token mean over the generation batch, as TRL does; `"prompt"`: token mean of each prompt, then
            the mean over prompts, the paper's formula as written.
        lambda_side (`str`, *optional*, defaults to `"both"`):
            Whose lengths λ weighs: `"both"`: every response's, the paper; `"signed"`: λ·sign(A); `"positive"`: those
            with A > 0 only; `"negative"`: those with A < 0 only. With the last three (this project's) λ > 0 makes a
            longer right answer count more, without making a longer wrong one count more too.
        lambda_features (`list[str]`, *optional*, defaults to `["length"]`):
            What λ weighs, one λ each: `"length"`, `"mean_logp"`, `"min_logp"` (mean and least log-probability of the
            own tokens under the sampling policy). More than length with `"power"` and a side other than `"both"`.
            They are taken from TRL's old log-probabilities; where TRL computes none (one optimizer step per generation
            batch without vLLM) they cost one more forward pass without gradient per generation batch.
        lambda_rule (`str`, *optional*):
            How λ learns. `"descent"`: on the policy loss, the paper; side `"both"` only. `"regression"`: λ follows
            `lambda_gain` times the regression of the advantage on what λ weighs. `"target"`: a controller that holds
            the mean completion length at `length_target`. `None`: descent for side `"both"`, target where
            `length_target` is set, else regression.
        lambda_gain (`float`, *optional*, defaults to `2.0`):
            κ of `"regression"`, > 0.
        positive_weight (`float`, *optional*, defaults to `1.0`):
            c > 0: a response with A > 0 counts c times, the token mass preserved over the scope. With any
            `aggregation`, `None` included.
        length_target (`float`, *optional*):
            What `"target"` steers the mean completion length to: above 1, a number of own tokens; up to 1, a part of
            the length at the start (the mean over the first four generation batches). With it `lambda_side="both"`
            means `"positive"`, and λ is held in [-3, 3] where `lambda_bounds` is not set. λ's group then has no
            momentum, and λ goes 1 - exp(-12·`lambda_learning_rate`) of its way within a generation batch.
        lambda_init (`float`, *optional*, defaults to `0.0`):
            λ at step 0; of the first feature, where there are several. 0 is DAPO's token mean.
        lambda_learnable (`bool`, *optional*, defaults to `True`):
            Whether λ is trained. `False` keeps it at `lambda_init`, without a parameter group.
        lambda_learning_rate (`float`, *optional*, defaults to `0.1`):
            Base learning rate of λ's parameter group. The schedule is the model's. 0.1 was kept after `recipes/arena`:
            λ had the right sign in all 12 seeds of both tasks where length matters, and with `"lambda"` the reward was
            not told apart from λ = 0's. A faster λ won nothing; with `"power"` it was 2.5 points lower on one task.
        lambda_adam_eps (`float`, *optional*, defaults to `1.0`):
            `eps` of λ's group in Adam-like optimizers. Far above the gradient, it makes the step proportional to the
            gradient (momentum SGD, as in the paper's setting) instead of sign-like. In `recipes/arena` λ's mean where
            length matters was 8 to 20 times its spread where length is idle, against 4 to 6 times with plain steps.
        lambda_max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Bound of |dL/dλ|, apart from the model's `max_grad_norm`. 0 turns it off.
        lambda_bounds (`list[float]`, *optional*):
            `[low, high]`: λ is projected into them after each step.
        length_scale (`float`, *optional*, defaults to `1/9`):
            r of h = 1 + r·z. Must be below 1/√(G-1) for G generations per prompt.

        > Token weight v (arXiv 2511.00066 and 2505.12929)

        token_regulation (`str` or `None`, *optional*):
            `"sigmoid"`: clip(α·σ(k·(π - p0)), L, U), TR-GRPO; `"linear"`: α·π + 1 - α, AR; `None`: no token weight.
            π is the current policy's probability of the token, a constant to the gradient.
        regulation_alpha (`float`, *optional*):
            α: 2.0 for `"sigmoid"` and 0.2 for `"linear"` if `None`.
        regulation_slope (`float`, *optional*, defaults to `9.0`):
            k of the sigmoid.
        regulation_center (`float`, *optional*, defaults to `0.25`):
            p0 of the sigmoid, a probability.
        regulation_min (`float`, *optional*, defaults to `1.0`):
            L of the sigmoid, > 0.
        regulation_max (`float`, *optional*, defaults to `1.4`):
            U of the sigmoid, >= L.
        regulation_inside_clip (`bool`, *optional*, defaults to `False`):
            `True`: min(vρA, clip(vρ)A), Eq. 9 of arXiv 2511.00066 as its reviews read it; with ε = 0.2 every token
            with v > 1.2 and A > 0 then has no gradient. `False`: v·min(ρA, clip(ρ)A).

        > Metrics

        token_metrics (`bool`, *optional*, defaults to `True`):
            Whether to log the metrics that look at every token, `token_weight/*`, `clipped/*` and `share/*`. Those of
            responses and of λ are logged in any case.

    Raises:
        `ValueError`: a value is out of range, or an option cannot be honoured in this combination; the message names
        the field, its value and what is accepted.
    """

    aggregation: str | None = field(
        default="lambda",
        metadata={
            "help": "How much a response counts for its length: 'lambda' (softmax of h^λ), 'power' ((|o|/μ)^λ), "
            "'grpo', 'dapo', 'dr_grpo', or none for TRL's own reduction of `loss_type`."
        },
    )
    aggregation_scope: str = field(
        default="batch",
        metadata={
            "help": "'batch': token mean over the generation batch, as TRL does. 'prompt': token mean of each prompt, "
            "then the mean over prompts."
        },
    )
    lambda_side: str = field(
        default="both",
        metadata={
            "help": "Whose lengths λ weighs: 'both', 'signed' (by the sign of the advantage), 'positive' (A > 0), "
            "'negative' (A < 0)."
        },
    )
    lambda_features: list[str] = field(
        default_factory=lambda: ["length"],
        metadata={"help": "What λ weighs, one λ each: any of 'length', 'mean_logp', 'min_logp'."},
    )
    lambda_rule: str | None = field(
        default=None,
        metadata={
            "help": "How λ learns: 'descent' on the policy loss, 'regression' of the advantage on what λ weighs, "
            "'target' (a set point for the length), or none: what goes with side and length_target."
        },
    )
    lambda_gain: float = field(default=2.0, metadata={"help": "κ of lambda_rule='regression'."})
    positive_weight: float = field(
        default=1.0, metadata={"help": "Responses with A > 0 count this many times, token mass preserved."}
    )
    length_target: float | None = field(
        default=None,
        metadata={
            "help": "Mean completion length that lambda_rule='target' steers to: above 1 in tokens, up to 1 as a part "
            "of the length at the start."
        },
    )
    lambda_init: float = field(default=0.0, metadata={"help": "λ at step 0. 0 is DAPO's token mean."})
    lambda_learnable: bool = field(
        default=True, metadata={"help": "Whether λ is trained. False keeps it at `lambda_init`."}
    )
    lambda_learning_rate: float = field(
        default=0.1,
        metadata={"help": "Base learning rate of λ's parameter group. The schedule is the model's."},
    )
    lambda_adam_eps: float = field(
        default=1.0,
        metadata={
            "help": "`eps` of λ's group in Adam-like optimizers. Far above the gradient, it makes the step "
            "proportional to the gradient instead of sign-like."
        },
    )
    lambda_max_grad_norm: float = field(
        default=1.0, metadata={"help": "Bound of |dL/dλ|, apart from the model's `max_grad_norm`. 0 turns it off."}
    )
    lambda_bounds: list[float] | None = field(
        default=None, metadata={"help": "[low, high]: λ is projected into them after each step."}
    )
    length_scale: float = field(
        default=1 / 9,
        metadata={"help": "r of h = 1 + r·z. Must be below 1/sqrt(G-1) for G generations per prompt."},
    )
    token_regulation: str | None = field(
        default=None,
        metadata={
            "help": "Token weight, increasing in the policy's own probability of the token: 'sigmoid' (TR-GRPO), "
            "'linear' (AR), or none."
        },
    )
    regulation_alpha: float | None = field(
        default=None, metadata={"help": "α of the token weight: 2.0 for 'sigmoid', 0.2 for 'linear' if not set."}
    )
    regulation_slope: float = field(default=9.0, metadata={"help": "k of the sigmoid token weight."})
    regulation_center: float = field(default=0.25, metadata={"help": "p0 of the sigmoid token weight."})
    regulation_min: float = field(default=1.0, metadata={"help": "Lower bound L of the sigmoid token weight, > 0."})
    regulation_max: float = field(default=1.4, metadata={"help": "Upper bound U of the sigmoid token weight, >= L."})
    regulation_inside_clip: bool = field(
        default=False,
        metadata={
            "help": "True: the token weight multiplies the ratio inside min and clip (Eq. 9 of arXiv 2511.00066). "
            "False: it multiplies the clipped surrogate."
        },
    )
    token_metrics: bool = field(
        default=True,
        metadata={
            "help": "Whether to log the metrics that look at every token, 'token_weight/*', 'clipped/*' and 'share/*'."
        },
    )

    @property
    def has_lambda(self) -> bool:
        """Whether `aggregation` is a member with a λ."""
        return self.aggregation is not None and LENGTH_WEIGHTS[self.aggregation].has_lambda

    def make_length_weight(self) -> LengthWeight | None:
        """The member f that `aggregation` names, with its parameters; `None` for TRL's own reduction."""
        options = {name: getattr(self, option) for name, option in _LENGTH_PARAMETERS.items()}
        if self.length_target is not None and self.lambda_side == "both":
            options["side"] = "positive"
        if isinstance(self.lambda_features, list):
            options["features"] = tuple(self.lambda_features)
        return None if self.aggregation is None else make_length_weight(self.aggregation, options)

    def make_token_weight(self) -> TokenWeight | None:
        """The member v that `token_regulation` names, with its parameters; `None` for no token weight."""
        options = {name: getattr(self, _TOKEN_PREFIX + name) for name in _TOKEN_PARAMETERS}
        name = self.token_regulation
        return None if name is None else make_token_weight(name, options, prefix=_TOKEN_PREFIX)

    def __post_init__(self) -> None:
        # The command line passes "none" as a string.
        self.aggregation = _none_from_text(self.aggregation)
        self.token_regulation = _none_from_text(self.token_regulation)
        self.lambda_rule = _none_from_text(self.lambda_rule)
        for name in _NUMBER_FIELDS:  # YAML reads 1e-2 as text
            setattr(self, name, _number_from_text(getattr(self, name)))
        if isinstance(self.lambda_bounds, list | tuple):
            self.lambda_bounds = [_number_from_text(bound) for bound in self.lambda_bounds]  # type: ignore[misc]
        self.validate()
        self._warn_about_score_function()
        super().__post_init__()

    def validate(self, length_weight: LengthWeight | None = None, token_weight: TokenWeight | None = None) -> None:
        """
        Check every added field, and the fields of `GRPOConfig` that it goes with. The trainer does so again, for
        fields that were assigned later and for weights that were passed to it.

        Args:
            length_weight ([`LengthWeight`], *optional*): takes the place of `aggregation`'s member.
            token_weight ([`TokenWeight`], *optional*): takes the place of `token_regulation`'s member.

        Raises:
            `ValueError`: as for the class.
        """
        self._check_numbers()
        if self.aggregation is not None and self.aggregation not in LENGTH_WEIGHTS:
            raise ValueError(
                f"aggregation={self.aggregation!r} is unknown; accepted: {', '.join(LENGTH_WEIGHTS)} or None."
            )
        for name, given in (("aggregation", length_weight), ("token_regulation", token_weight)):
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if given is not None and value != default:
                raise ValueError(f"{name}={value!r} has no effect beside {given.name}: leave it at {default!r}.")
        f = self.make_length_weight() if length_weight is None else length_weight
        v = self.make_token_weight() if token_weight is None else token_weight
        self._check_length_weight(f)
        self._check_unused(f, v)
        if f is not None and f.has_lambda and self.lambda_learnable:
            self._check_rule(f)
        if self.regulation_inside_clip:
            self._check_inside_clip()

    def _check_numbers(self) -> None:
        for name in _NUMBER_FIELDS:
            value = getattr(self, name)
            if not (_is_number(value) or value is None and name in ("regulation_alpha", "length_target")):
                raise ValueError(f"{name}={value!r} must be a number, got {type(value).__name__}.")
        if not abs(self.lambda_init) <= LARGEST_FLOAT32:
            raise ValueError(f"lambda_init={self.lambda_init} must be finite in float32, the dtype of λ.")
        for name in ("lambda_learning_rate", "lambda_adam_eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be finite and > 0.")
        for name in ("lambda_gain", "positive_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be finite and > 0.")
        target, most = self.length_target, self.max_completion_length
        if target is not None and not (0 < target < math.inf and (most is None or target <= most)):
            raise ValueError(f"length_target={target} must be > 0 and at most max_completion_length={most}.")
        if not self.lambda_max_grad_norm >= 0:
            raise ValueError(f"lambda_max_grad_norm={self.lambda_max_grad_norm} must be >= 0 (0 turns the clip off).")
        if self.lambda_bounds is not None:
            self._check_bounds()

    def _check_length_weight(self, f: LengthWeight | None) -> None:
        if self.aggregation_scope not in SCOPES:
            raise ValueError(
                f"aggregation_scope={self.aggregation_scope!r} is unknown; accepted: {', '.join(SCOPES)}."
            )
        if f is None:
            return
        if self.loss_type not in CONVERTIBLE_LOSS_TYPES:
            instead = _INSTEAD.get(self.loss_type, f"one of {', '.join(CONVERTIBLE_LOSS_TYPES)}, or aggregation=None")
            raise ValueError(
                f"loss_type={self.loss_type!r} brings its own reduction, which aggregation={f.name!r} would replace. "
                f"Use {instead}."
            )
        f.check(max(self.num_generations or 1, self.num_generations_eval or 1))

    def _check_bounds(self) -> None:
        bounds: Any = self.lambda_bounds
        numbers = isinstance(bounds, list | tuple) and len(bounds) == 2 and all(_is_number(bound) for bound in bounds)
        if not numbers or not bounds[0] < bounds[1]:
            raise ValueError(f"lambda_bounds={bounds!r} must be two numbers [low, high] with low < high.")
        if not max(map(abs, bounds)) <= LARGEST_FLOAT32:
            raise ValueError(f"lambda_bounds={bounds!r} must be finite in float32, the dtype of λ.")
        if not bounds[0] <= self.lambda_init <= bounds[1]:
            raise ValueError(f"lambda_init={self.lambda_init} must lie in lambda_bounds={bounds}.")

    def _warn_about_score_function(self) -> None:
        f = self.make_length_weight()
        by_descent = f is not None and f.has_lambda and self.rule_of(f) == "descent"
        if by_descent and self.lambda_learnable and self.loss_type in SCORE_FUNCTION_LOSS_TYPES:
            warnings.warn(
                f"loss_type={self.loss_type!r} with a learnable λ: the value of this surrogate is A·log π times a "
                "constant, of which only the gradient in the policy is meaningful, and λ descends on the value. Its "
                "sign then follows the responses' log-likelihood, not their advantage alone. Use loss_type='dapo' or "
                "'sapo', or lambda_learnable=False, for a λ that can be read as a length preference.",
                UserWarning,
                stacklevel=4,
            )

    def rule_of(self, f: LengthWeight) -> str:
        """The name of the rule that λ of `f` learns by."""
        if self.lambda_rule is not None:
            return self.lambda_rule
        if self.length_target is not None:
            return "target"
        return "descent" if getattr(f, "side", "both") == "both" else "regression"

    def _check_rule(self, f: LengthWeight) -> None:
        rule, side = self.rule_of(f), getattr(f, "side", "both")
        if rule not in RULES:
            raise ValueError(f"lambda_rule={rule!r} is unknown; accepted: {', '.join(RULES)} or None.")
        if rule == "descent" and side != "both":
            raise ValueError(
                f"lambda_rule='descent' cannot serve lambda_side={side!r}: dL/dλ would only say that right answers "
                "that are longer have more tokens. Use lambda_rule='regression' or 'target', or a fixed λ "
                "(lambda_learnable=False)."
            )
        if rule != "descent" and side == "both":
            raise ValueError(
                f"lambda_rule={rule!r} needs lambda_side='signed', 'positive' or 'negative': with side 'both' λ > 0 "
                "weighs right and wrong responses alike and does not steer."
            )
        if rule != "regression" and self.lambda_gain != self._default("lambda_gain"):
            raise ValueError(
                f"lambda_gain={self.lambda_gain} has no effect with lambda_rule={rule!r}: leave it at 2.0."
            )
        if rule == "target" and self.length_target is None:
            raise ValueError("lambda_rule='target' requires length_target: a number of tokens, or a part up to 1.")
        if rule == "target" and f.lambda_features != ("length",):
            raise ValueError(f"lambda_rule='target' weighs length alone, got lambda_features={self.lambda_features}.")
        if rule == "target" and self.lambda_bounds is None and not abs(self.lambda_init) <= TARGET_BOUNDS[1]:
            raise ValueError(
                f"lambda_init={self.lambda_init} must lie in lambda_bounds={list(TARGET_BOUNDS)}, which "
                "lambda_rule='target' has if they are not set."
            )
        if rule != "target" and self.length_target is not None:
            raise ValueError(f"length_target={self.length_target} has no effect with lambda_rule={rule!r}.")

    def _check_unused(self, f: LengthWeight | None, v: TokenWeight | None) -> None:
        """An option that differs from its default and would have no effect is a mistake, not a preference."""
        because_f = f"aggregation={f and f.name!r}"
        because_v = f"token_regulation={v and v.name!r}"
        unused: list[tuple[str, str]] = []
        if f is None or not f.has_lambda:
            unused += [(name, because_f) for name in ("lambda_learnable", *_LAMBDA_FIELDS, *_GROUP_FIELDS)]
        elif not self.lambda_learnable:
            unused += [(name, "lambda_learnable=False") for name in (*_GROUP_FIELDS, "lambda_bounds")]
        options = {option for name, option in _LENGTH_PARAMETERS.items() if not hasattr(f, name)}
        unused += [(option, because_f) for option in sorted(options - set(_TRL_FIELDS))]
        if f is None:  # "grpo" and "dr_grpo" come out the same in both scopes
            unused.append(("aggregation_scope", because_f))
        unused += [(_TOKEN_PREFIX + name, because_v) for name in _TOKEN_PARAMETERS if not hasattr(v, name)]
        if v is None:
            unused.append(("regulation_inside_clip", because_v))
        if f is None and v is None:
            unused.append(("token_metrics", f"{because_f} and {because_v}"))
        for name, because in unused:
            value, default = getattr(self, name), self._default(name)
            if value != default:
                raise ValueError(f"{name}={value!r} has no effect with {because}: leave it at {default!r}.")

    def _default(self, name: str) -> Any:
        field = self.__dataclass_fields__[name]
        return field.default if field.default is not MISSING else field.default_factory()

    def _check_inside_clip(self) -> None:
        """v inside the clip goes through `old_per_token_logps`: refuse whatever else reads that tensor."""
        other = "Use regulation_inside_clip=False"
        if self.loss_type not in CLIPPED_LOSS_TYPES:
            raise ValueError(
                f"regulation_inside_clip=True needs the PPO clip, which loss_type={self.loss_type!r} has not. "
                f"{other}, or a loss_type of {', '.join(CLIPPED_LOSS_TYPES)}."
            )
        if self.importance_sampling_level != "token":
            raise ValueError(
                "regulation_inside_clip=True weights the ratio of each token, and "
                f"importance_sampling_level={self.importance_sampling_level!r} has one ratio for all. {other}, or "
                "importance_sampling_level='token'."
            )
        if self.beta != 0.0 and self.use_bias_correction_kl:
            raise ValueError(
                f"regulation_inside_clip=True with beta={self.beta} and use_bias_correction_kl=True would weight the "
                f"KL term too. {other}, or use_bias_correction_kl=False."
            )
        if self.off_policy_mask_threshold is not None:
            raise ValueError(
                f"regulation_inside_clip=True with off_policy_mask_threshold={self.off_policy_mask_threshold} would "
                f"shift the divergence that the mask is decided on. {other}, or no off_policy_mask_threshold."
            )


@dataclass
class TRGRPOConfig(LambdaGRPOConfig):
    r"""
    Configuration class for the [`TRGRPOTrainer`]: [`LambdaGRPOConfig`] with the token weight of TR-GRPO
    (arXiv 2511.00066) on and TRL's own reduction left alone.

    Parameters:
        aggregation (`str` or `None`, *optional*, defaults to `None`):
            As in [`LambdaGRPOConfig`]; `None` leaves TRL's reduction for `loss_type`.
        token_regulation (`str` or `None`, *optional*, defaults to `"sigmoid"`):
            As in [`LambdaGRPOConfig`].
    """

    aggregation: str | None = field(
        default=None,
        metadata={
            "help": "How much a response counts for its length: 'lambda', 'power', 'grpo', 'dapo', 'dr_grpo', or "
            "none for TRL's own reduction of `loss_type`."
        },
    )
    token_regulation: str | None = field(
        default="sigmoid",
        metadata={
            "help": "Token weight, increasing in the policy's own probability of the token: 'sigmoid' (TR-GRPO), "
            "'linear' (AR), or none."
        },
    )


def _number_from_text(value: object) -> object:
    """The number that a text such as "1e-2" stands for; anything else as it is, for the checks to refuse."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _none_from_text(value: str | None) -> str | None:
    return None if isinstance(value, str) and value.lower() in ("none", "null") else value
