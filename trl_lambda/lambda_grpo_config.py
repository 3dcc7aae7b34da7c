"""`LambdaGRPOConfig` and `TRGRPOConfig`: the fields added to `GRPOConfig`. What they refuse is in `config_checks`."""

from dataclasses import dataclass, field

from trl import GRPOConfig

from .config_checks import (
    LENGTH_OPTIONS,
    TOKEN_OPTIONS,
    TOKEN_PREFIX,
    check_fields,
    check_together,
    read_texts,
    warn_about_score_function,
)
from .weights import LengthWeight, TokenWeight, make_length_weight, make_token_weight
from .weights.length_weight import LENGTH_WEIGHTS


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
            How much a response counts for its length. `"lambda"`: G · softmax of h^λ over the group, the paper's;
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
            with A > 0 only; `"negative"`: those with A < 0 only (the last three are this project's). With `"signed"`
            and `"positive"` λ > 0 makes a longer right answer count more, without making a longer wrong one count more
            too; with `"negative"` λ > 0 makes a longer wrong one count more, and the rules turn their sign.
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
            Base learning rate of λ's parameter group. The schedule is the model's. What 0.1 was tried on, and what
            came of it: `docs/arena.md`.
        lambda_adam_eps (`float`, *optional*, defaults to `1.0`):
            `eps` of λ's group in Adam-like optimizers. Far above the gradient, it makes the step proportional to the
            gradient (momentum SGD, as in the paper's setting) instead of sign-like.
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
        default=0.1, metadata={"help": "Base learning rate of λ's parameter group. The schedule is the model's."}
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
        default=1 / 9, metadata={"help": "r of h = 1 + r·z. Must be below 1/sqrt(G-1) for G generations per prompt."}
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
        options = {name: getattr(self, option) for name, option in LENGTH_OPTIONS.items()}
        if self.length_target is not None and self.lambda_side == "both":
            options["side"] = "positive"
        if isinstance(self.lambda_features, list):
            options["features"] = tuple(self.lambda_features)
        return None if self.aggregation is None else make_length_weight(self.aggregation, options)

    def make_token_weight(self) -> TokenWeight | None:
        """The member v that `token_regulation` names, with its parameters; `None` for no token weight."""
        options = {name: getattr(self, option) for name, option in TOKEN_OPTIONS.items()}
        name = self.token_regulation
        return None if name is None else make_token_weight(name, options, prefix=TOKEN_PREFIX)

    def rule_of(self, f: LengthWeight) -> str:
        """The name of the rule that λ of `f` learns by."""
        if self.lambda_rule is not None:
            return self.lambda_rule
        if self.length_target is not None:
            return "target"
        return "descent" if getattr(f, "side", "both") == "both" else "regression"

    def __post_init__(self) -> None:
        read_texts(self)
        f, _ = self.validate()
        warn_about_score_function(self, f)
        super().__post_init__()

    def validate(
        self, length_weight: LengthWeight | None = None, token_weight: TokenWeight | None = None
    ) -> tuple[LengthWeight | None, TokenWeight | None]:
        """
        Check every added field, and the fields of `GRPOConfig` that it goes with. The trainer does so again, for
        fields that were assigned later and for weights that were passed to it.

        Args:
            length_weight ([`LengthWeight`], *optional*): takes the place of `aggregation`'s member.
            token_weight ([`TokenWeight`], *optional*): takes the place of `token_regulation`'s member.

        Returns:
            `tuple`: f and v as they will be used.

        Raises:
            `ValueError`: as for the class.
        """
        check_fields(self, length_weight, token_weight)
        f = self.make_length_weight() if length_weight is None else length_weight
        v = self.make_token_weight() if token_weight is None else token_weight
        check_together(self, f, v)
        return f, v


_FIELDS = LambdaGRPOConfig.__dataclass_fields__


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

    aggregation: str | None = field(default=None, metadata=_FIELDS["aggregation"].metadata)
    token_regulation: str | None = field(default="sigmoid", metadata=_FIELDS["token_regulation"].metadata)
