"""`LambdaGRPOConfig` and `TRGRPOConfig`: the fields added to `GRPOConfig`, and every refusal that needs no model."""

import math
from dataclasses import MISSING, dataclass, field
from typing import Any

import torch
from trl import GRPOConfig

from .trl_seam.contract import CLIPPED_LOSS_TYPES, CONVERTIBLE_LOSS_TYPES
from .weights import (
    LENGTH_WEIGHTS,
    SCOPES,
    SIDES,
    TOKEN_WEIGHTS,
    LengthWeight,
    TokenWeight,
    as_length_weight,
    as_token_weight,
    weight_from_name,
)

_INSTEAD = {
    "grpo": "loss_type='dapo' with length_weight='grpo' (the same policy loss)",
    "dr_grpo": "loss_type='dapo' with length_weight='dr_grpo' (the same policy loss)",
    "bnpo": "loss_type='dapo' with length_weight='dapo' (the token mean of the whole batch)",
    "luspo": "loss_type='dapo' with importance_sampling_level='sequence' and length_weight='dapo' (LUSPO divided by "
    "the batch's mean length)",
}
_NUMBERS = ("positive_weight", "lambda_init", "lambda_learning_rate", "lambda_gain")
# Options without effect with length_weight=None, with a fixed λ, and without λ.
_REDUCTION = ("length_weight_kwargs", "length_weight_scope", "drop_tied_groups")
_LEARNING = ("lambda_gain", "length_target", "lambda_bounds", "lambda_learning_rate")
_LAMBDA = ("lambda_side", "lambda_features", "lambda_init", "lambda_learnable", *_LEARNING)


@dataclass
class LambdaGRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`LambdaGRPOTrainer`].

    This class includes only the parameters that are added to [`~trl.GRPOConfig`], whose own keep their meaning. One
    exception: while `length_weight` is set, `loss_type` selects only the surrogate loss (`"dapo"`: PPO clip,
    `"cispo"`, `"vespo"`, `"sapo"`), and `length_weight` is the reduction.

    Parameters:
        > Length weight f (arXiv 2510.06870)

        length_weight (`str` or `None`, *optional*, defaults to `"lambda_grpo"`):
            Weight of a response by its length. `"lambda_grpo"`: G · softmax of h^λ over the group, the paper's.
            `"power"`: (|o|/μ)^λ with the token mass preserved; λ = 0 is DAPO and, where every response has tokens,
            λ = -1 is GRPO. `"grpo"`, `"dapo"`, `"dr_grpo"`: the fixed members. `"balanced"`: right and wrong responses
            of a group each count for their number (arXiv 2605.04077). A dotted path: a function or [`LengthWeight`] of
            your own. `None`: TRL's own reduction for `loss_type`. With tools, lengths are the policy's own tokens,
            while `max_completion_length`, the divisor of `"dr_grpo"`, includes tool output.
        length_weight_kwargs (`dict`, *optional*):
            Parameters of that member. `"lambda_grpo"`: `{"length_scale": 1/9}`, r of h = 1 + r·z, below 1/√(G-1);
            larger means that long and short responses differ more. For a dotted path they are passed by name.
        length_weight_scope (`str`, *optional*, defaults to `"batch"`):
            Scope of the token mean. `"batch"`: the generation batch, as in TRL. `"prompt"`: the token mean of each
            prompt, then the mean over prompts, the λ-GRPO paper's formula as read here.
        drop_tied_groups (`bool`, *optional*, defaults to `False`):
            Leave groups whose responses all have the same reward out of the denominator too (arXiv 2510.13786). The
            step is larger the more groups are tied.
        positive_weight (`float`, *optional*, defaults to `1.0`):
            c > 0: a response with A > 0 counts c times, the token mass preserved over the scope. With any
            `length_weight`, `None` included. c > 1 lowers the entropy: watch it, and try c < 1 where it collapses.
        lambda_side (`str`, *optional*):
            Responses that λ weights: `"both"`, every one (the paper); `"signed"`, λ·sign(A); `"positive"`, those with
            A > 0; `"negative"`, those with A < 0. `None`: both, or positive with `length_target`.
        lambda_features (`list[str]`, *optional*, defaults to `["length"]`):
            What λ weights, one λ each: `"length"`, `"mean_logp"`, `"min_logp"` (mean and least log-probability of the
            own tokens under the sampling policy). Any list but `["length"]` needs `length_weight="power"` and a side
            other than `"both"`.
        length_target (`float`, *optional*):
            Set point of the mean completion length: above 1, a number of own tokens; up to 1, a part of the length at
            the start (the mean over the first four generation batches). λ then follows a controller, within [-3, 3]
            if `lambda_bounds` is not set.
        lambda_init (`float`, *optional*, defaults to `0.0`):
            λ at step 0, of the first feature where there are several. 0 is DAPO's token mean. Larger: long responses
            count more.
        lambda_learnable (`bool`, *optional*, defaults to `True`):
            Whether λ is trained: by descent on the loss for side `"both"`, by a controller with `length_target`, else
            by regression of the advantage on the features. `False` keeps it at `lambda_init`.
        lambda_learning_rate (`float`, *optional*, defaults to `0.1`):
            Base learning rate of λ's parameter group. Larger: λ moves faster. The schedule is the model's.
        lambda_bounds (`list[float]`, *optional*):
            `[low, high]`: λ is projected into them after each step.
        lambda_gain (`float`, *optional*, defaults to `2.0`):
            How far λ follows the regression, κ > 0. Larger: responses that look like right ones count more.

        > Token weight v (arXiv 2511.00066 and 2505.12929)

        token_weight (`str` or `None`, *optional*):
            Weight of a token by π, the current policy's probability of it, a constant to the gradient. `"tr_grpo"`:
            clip(α·σ(k·(π - p0)), L, U). `"ar"`: α·π + 1 - α. A dotted path: a function or [`TokenWeight`] of your own.
            `None`: no token weight.
        token_weight_kwargs (`dict`, *optional*):
            Parameters of that member. `"tr_grpo"`: `alpha` α = 2.0, `slope` k = 9.0, `center` p0 = 0.25, `min`
            L = 1.0, `max` U = 1.4. `"ar"`: `alpha` α = 0.2. Larger `max` or `alpha`: probable tokens count more.
        token_weight_inside_clip (`bool`, *optional*, defaults to `False`):
            `True`: min(vρA, clip(vρ)A), Eq. 9 of arXiv 2511.00066 as its reviews read it. With ε = 0.2 every token
            with v > 1.2 and A > 0 then has no gradient, and accuracy fell in our study. `False`: v·min(ρA, clip(ρ)A).

        > Metrics

        token_metrics (`bool`, *optional*, defaults to `True`):
            Log the metrics that look at every token: `token_weight/*` and `share/*`.

    Raises:
        `ValueError`: a value is out of range, or an option cannot be honoured in this combination.
    """

    length_weight: str | None = field(
        default="lambda_grpo",
        metadata={
            "help": "Weight of a response by its length: 'lambda_grpo' (softmax of h^λ, λ learned), 'power' "
            "((length/mean)^λ), 'grpo', 'dapo', 'dr_grpo', 'balanced', a dotted path to your own function, or none to "
            "keep TRL's reduction of loss_type."
        },
    )
    length_weight_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Parameters of the length weight, such as '{\"length_scale\": 0.11}' for 'lambda_grpo' (larger: "
            "long and short responses differ more)."
        },
    )
    length_weight_scope: str = field(
        default="batch",
        metadata={
            "help": "'batch': token mean over the generation batch, as in TRL. 'prompt': every prompt counts the "
            "same, however many tokens its responses have."
        },
    )
    drop_tied_groups: bool = field(
        default=False,
        metadata={
            "help": "True: groups whose responses all have the same reward leave the denominator too. Steps are "
            "larger the more groups are tied."
        },
    )
    positive_weight: float = field(
        default=1.0,
        metadata={
            "help": "Larger than 1: right answers (A > 0) count more than wrong ones, and entropy falls faster. Below "
            "1: wrong ones count more."
        },
    )
    lambda_side: str | None = field(
        default=None,
        metadata={
            "help": "Responses that λ weights: 'both', 'signed' (by the sign of the advantage), 'positive' (A > 0), "
            "'negative' (A < 0). Default: both, or positive with length_target."
        },
    )
    lambda_features: list[str] = field(
        default_factory=lambda: ["length"],
        metadata={
            "help": "What λ weights, one λ each: any of 'length', 'mean_logp', 'min_logp'. Any list but ['length'] "
            "needs length_weight='power' and a lambda_side other than 'both'."
        },
    )
    length_target: float | None = field(
        default=None,
        metadata={
            "help": "Hold the mean completion length here: above 1 in tokens, up to 1 as a part of the length at the "
            "start. Smaller: shorter answers."
        },
    )
    lambda_init: float = field(
        default=0.0, metadata={"help": "λ at step 0. Larger: long responses count more. 0 is DAPO's token mean."}
    )
    lambda_learnable: bool = field(
        default=True, metadata={"help": "Whether λ is trained. False keeps it at lambda_init."}
    )
    lambda_learning_rate: float = field(
        default=0.1, metadata={"help": "Learning rate of λ. Larger: λ moves faster. The schedule is the model's."}
    )
    lambda_bounds: list[float] | None = field(default=None, metadata={"help": "[low, high]: λ is kept between them."})
    lambda_gain: float = field(
        default=2.0,
        metadata={"help": "With a lambda_side: larger makes responses that look like right ones count more (κ)."},
    )
    token_weight: str | None = field(
        default=None,
        metadata={
            "help": "Weight of a token by the policy's own probability of it: 'tr_grpo' (sigmoid, clipped), 'ar' "
            "(linear), a dotted path to your own function, or none."
        },
    )
    token_weight_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Parameters of the token weight: alpha, slope, center, min, max of 'tr_grpo', alpha of 'ar'. "
            "Larger max or alpha: probable tokens count more."
        },
    )
    token_weight_inside_clip: bool = field(
        default=False,
        metadata={
            "help": "True: the token weight multiplies the ratio inside the clip (Eq. 9 of arXiv 2511.00066), which "
            "cost accuracy in our study. False: it multiplies the clipped loss."
        },
    )
    token_metrics: bool = field(
        default=True,
        metadata={"help": "Log token_weight/* and share/*, which look at every token."},
    )

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "length_weight_kwargs", "token_weight_kwargs"]

    @property
    def side(self) -> str:
        """The side of λ, `lambda_side` or its default."""
        return self.lambda_side or ("both" if self.length_target is None else "positive")

    def __post_init__(self) -> None:
        for name in ("length_weight", "token_weight"):
            if str(getattr(self, name)).lower() in ("none", "null"):  # the command line has no other word for it
                setattr(self, name, None)
        super().__post_init__()
        self._check_weights(*self._named_weights())

    def make_weights(self, length_weight: Any = None, token_weight: Any = None) -> tuple[Any, Any]:
        """
        Check every added field, and make the weights that they name.

        Args:
            length_weight, token_weight (`Any`, *optional*): of the trainer, in place of the fields' own.

        Returns:
            `tuple`: the [`LengthWeight`] and the [`TokenWeight`], `None` for no such weight.

        Raises:
            `ValueError`: as for the class.
        """
        f, v = self._named_weights()
        if length_weight is not None:
            self._refuse(["length_weight", "length_weight_kwargs"], "beside the trainer's own length_weight")
            f = as_length_weight(length_weight)
        if token_weight is not None:
            self._refuse(["token_weight", "token_weight_kwargs"], "beside the trainer's own token_weight")
            v = as_token_weight(token_weight)
        self._check_weights(f, v)
        if v is None:
            self._refuse(["token_weight_inside_clip"], "with token_weight=None")
        return f, v

    def _named_weights(self) -> tuple[LengthWeight | None, TokenWeight | None]:
        self._check_values()
        own = {
            "side": self.side,
            "features": tuple(self.lambda_features),
            "max_completion_length": self.max_completion_length,
        }
        return (
            weight_from_name(self.length_weight, self.length_weight_kwargs, own, LENGTH_WEIGHTS, "length_weight"),
            weight_from_name(self.token_weight, self.token_weight_kwargs, {}, TOKEN_WEIGHTS, "token_weight"),
        )

    def _check_values(self) -> None:
        for name in (*_NUMBERS, *(() if self.length_target is None else ("length_target",))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name}={value!r} must be a number, got {type(value).__name__}.")
        largest = torch.finfo(torch.float32).max  # float32 is the dtype of λ
        bounds: Any = (-largest, largest) if self.lambda_bounds is None else self.lambda_bounds
        is_pair = (
            isinstance(bounds, list | tuple) and len(bounds) == 2 and all(isinstance(b, int | float) for b in bounds)
        )
        low, high = bounds if is_pair else (math.nan, math.nan)
        target, longest = self.length_target, self.max_completion_length
        for name, is_right, accepted in (
            ("positive_weight", 0 < self.positive_weight < math.inf, "finite and > 0"),
            ("lambda_learning_rate", 0 < self.lambda_learning_rate < math.inf, "finite and > 0"),
            ("lambda_gain", 0 < self.lambda_gain < math.inf, "finite and > 0"),
            (
                "length_target",
                target is None or 0 < target <= (longest or largest),
                f"> 0 and at most {longest} tokens",
            ),
            ("lambda_bounds", -largest <= low < high <= largest, "two finite numbers, low < high"),
            (
                "lambda_init",
                low <= self.lambda_init <= high,
                f"finite in float32 and in lambda_bounds={self.lambda_bounds}",
            ),
            ("lambda_features", isinstance(self.lambda_features, list | tuple), "a list"),
            ("length_weight_scope", self.length_weight_scope in SCOPES, f"one of {', '.join(SCOPES)}"),
            ("lambda_side", self.side in SIDES, f"one of {', '.join(SIDES)}"),
            (
                "length_weight",
                isinstance(self.length_weight, str | None),
                "a name or dotted path. Functions go to the trainer",
            ),
            (
                "token_weight",
                isinstance(self.token_weight, str | None),
                "a name or dotted path. Functions go to the trainer",
            ),
            ("length_weight_kwargs", isinstance(self.length_weight_kwargs, dict | None), "a dict, or JSON of one"),
            ("token_weight_kwargs", isinstance(self.token_weight_kwargs, dict | None), "a dict, or JSON of one"),
        ):
            if not is_right:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {accepted}.")

    def _check_weights(self, f: LengthWeight | None, v: TokenWeight | None) -> None:
        name, target, is_inside = f and f.name, self.length_target, self.token_weight_inside_clip
        # In order: where f has no λ, the second row has refused whatever the rows on λ are about.
        for is_idle, options, because in (
            (f is None, _REDUCTION, "with length_weight=None, TRL's own reduction"),
            (f is None or not f.has_lambda, _LAMBDA, f"with length_weight={name!r}, which has no λ"),
            (type(f) not in LENGTH_WEIGHTS.values(), ("lambda_side", "length_target"), f"with length_weight={name!r}"),
            (name != "power", ("lambda_features",), f"with length_weight={name!r}: set 'power'"),
            (not self.lambda_learnable, _LEARNING, "with lambda_learnable=False"),
            (
                f is None or f.side == "both" or target is not None,
                ("lambda_gain",),
                "unless λ learns by regression: a lambda_side, and no length_target",
            ),
            (v is None, ("token_weight_kwargs",), "with token_weight=None"),
            (f is None and v is None and self.positive_weight == 1, ("token_metrics",), "without a weight"),
        ):
            if is_idle:
                self._refuse(options, because)
        if f is not None:
            f.check(max(self.num_generations or 1, self.num_generations_eval or 1))
        if v is not None:
            v.check()
        instead = _INSTEAD.get(self.loss_type, f"one of {', '.join(CONVERTIBLE_LOSS_TYPES)}")
        # v inside the clip goes through `old_per_token_logps`: refuse whatever else reads that tensor.
        for option, is_refused, why in (
            ("loss_type", f is not None and self.loss_type not in CONVERTIBLE_LOSS_TYPES, "brings its own reduction, "
             f"which length_weight={name!r} would replace. Use {instead}, or length_weight=None to keep it"),
            ("drop_tied_groups", self.drop_tied_groups and self.multi_objective_aggregation == "normalize_then_sum",
             "requires multi_objective_aggregation='sum_then_normalize': else equal sums can have advantages"),
            ("length_target", target is not None and self.side == "both",
             "needs another lambda_side: with 'both' λ does not steer the length"),
            ("length_target", target is not None and list(self.lambda_features) != ["length"],
             "weights length alone: leave lambda_features"),
            ("length_target", target is not None and self.lambda_bounds is None and abs(self.lambda_init) > 3,
             "keeps λ in [-3, 3], lambda_init too"),
            ("token_weight_inside_clip", is_inside and self.loss_type not in CLIPPED_LOSS_TYPES,
             f"requires a loss_type of {', '.join(CLIPPED_LOSS_TYPES)}. Or use False"),
            ("token_weight_inside_clip", is_inside and self.importance_sampling_level != "token",
             "requires importance_sampling_level='token'. Or use False"),
            ("token_weight_inside_clip", is_inside and self.beta != 0.0 and self.use_bias_correction_kl,
             "requires use_bias_correction_kl=False, or beta=0. Or use False"),
            ("token_weight_inside_clip", is_inside and self.off_policy_mask_threshold is not None,
             "requires off_policy_mask_threshold=None. Or use False"),
        ):  # fmt: skip
            if is_refused:
                raise ValueError(f"{option}={getattr(self, option)!r} {why}.")

    def _refuse(self, names: Any, because: str) -> None:
        """Refuse options that differ from their default and would have no effect."""
        for name in names:
            own = self.__dataclass_fields__[name]
            default = own.default if own.default is not MISSING else own.default_factory()
            if getattr(self, name) not in (default, None):  # None asks for nothing
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect {because}: leave it at {default!r}.")


@dataclass
class TRGRPOConfig(LambdaGRPOConfig):
    r"""
    Configuration class for the [`TRGRPOTrainer`]: [`LambdaGRPOConfig`] with TR-GRPO's token weight (arXiv 2511.00066)
    on and TRL's own reduction left alone.

    Parameters:
        length_weight (`str` or `None`, *optional*, defaults to `None`):
            As in [`LambdaGRPOConfig`]. `None` leaves TRL's reduction for `loss_type`.
        token_weight (`str` or `None`, *optional*, defaults to `"tr_grpo"`):
            As in [`LambdaGRPOConfig`].
    """

    length_weight: str | None = field(
        default=None, metadata=LambdaGRPOConfig.__dataclass_fields__["length_weight"].metadata
    )
    token_weight: str | None = field(
        default="tr_grpo", metadata=LambdaGRPOConfig.__dataclass_fields__["token_weight"].metadata
    )
