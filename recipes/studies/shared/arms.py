"""
The arms: one name per weighting, and what distinguishes its configuration from every other's.

Arms of TRL run TRL's own `GRPOTrainer`. All others run `LambdaGRPOTrainer` on TRL's `dapo` surrogate.
`recipes/studies/arena/README.md` lists which option values the names stand for.
"""

from dataclasses import dataclass, field
from typing import Any

# The last commit with the options `lambda_adam_eps` and `lambda_max_grad_norm`.
REMOVED = "ran with an option removed in 0.3.0, at commit 2d6a6b0"


@dataclass(frozen=True)
class Arm:
    """
    One weighting.

    Args:
        about (`str`): description for tables.
        options (`dict`): fields of `GRPOConfig` (if `trl`) or `LambdaGRPOConfig` that differ from the common ones.
        trl (`bool`): TRL's own trainer and reduction.
        rewards (`dict`): additional rewards: dotted path of a function that makes a reward function, and its
            arguments.
        removed (`bool`): its rows stay, and it cannot run again: see `REMOVED`.
    """

    about: str
    options: dict[str, Any] = field(default_factory=dict)
    trl: bool = False
    rewards: dict[str, dict[str, Any]] = field(default_factory=dict)
    removed: bool = False

    @property
    def key(self) -> dict[str, Any]:
        """All that distinguishes the arm, for the column `options` of its rows."""
        return {**self.options, **({"rewards": self.rewards} if self.rewards else {})}


def _trl(loss_type: str, **options: Any) -> Arm:
    return Arm(f"TRL's loss_type={loss_type!r}", {"loss_type": loss_type, **options}, trl=True)


def _fixed(length_weight: str, lam: float) -> dict[str, Any]:
    return {"length_weight": length_weight, "lambda_init": lam, "lambda_learnable": False}


def _adamw(length_weight: str) -> Arm:
    """Plain AdamW steps of about 0.01 for λ, the size of a sign step."""
    options = {"length_weight": length_weight, "lambda_adam_eps": 1e-8, "lambda_learning_rate": 0.01}
    return Arm(f"{length_weight}, plain AdamW steps of about 0.01 for λ", options, removed=True)


_LAMBDA_GRPO = {"length_weight": "lambda_grpo"}
_POWER = {"length_weight": "power"}
_THREE = ["length", "mean_logp", "min_logp"]
_DAPO = {"length_weight": "dapo"}
_POSITIVE = {**_POWER, "lambda_side": "positive"}  # λ by regression
_TR = {"token_weight": "tr_grpo"}
_AR_06 = {"token_weight": "ar", "token_weight_kwargs": {"alpha": 0.6}}
# R-B of the constants of arXiv 2511.00066, clip(2·(σ(9π) - 0.25), 1, 1.4), in the parameters of the sigmoid weight:
# the same ends, within 0.007 between them.
_TR_B = {**_TR, "token_weight_kwargs": {"alpha": 1.5, "slope": 9.48, "center": 0.049}}
# Most sampled tokens of the playground's models have π > 0.344, where the weight is U: its mean over a run is 1.38 on
# running_sum, 1.37 on knights_and_knaves, 1.39 on checked_sum and 1.31 on slippery_chain (`token_weight_mean`).
CONSTANT_WEIGHT = 1.37

ARMS: dict[str, Arm] = {
    "grpo": _trl("grpo"),
    "dapo": _trl("dapo"),
    "dr_grpo": _trl("dr_grpo"),
    "bnpo": _trl("bnpo"),
    "cispo": _trl("cispo", epsilon_high=5.0),
    "sapo": _trl("sapo"),
    "luspo": _trl("luspo", importance_sampling_level="sequence"),
    "softmax": Arm("λ-GRPO: λ of the softmax family learned, eps 1.0", _LAMBDA_GRPO),
    "softmax_fast": Arm("softmax, learning rate of λ 1.0, not 0.1", {**_LAMBDA_GRPO, "lambda_learning_rate": 1.0}),
    "softmax_adamw": _adamw("lambda_grpo"),
    "softmax_-4": Arm("softmax family, λ = -4 fixed", _fixed("lambda_grpo", -4.0)),
    "softmax_+4": Arm("softmax family, λ = +4 fixed", _fixed("lambda_grpo", 4.0)),
    "power": Arm("λ of the power family learned, eps 1.0", _POWER),
    "power_fast": Arm("power, learning rate of λ 0.3 instead of 0.1", {**_POWER, "lambda_learning_rate": 0.3}),
    "power_adamw": _adamw("power"),
    "power_-0.5": Arm("power family, λ = -0.5 fixed (halfway from DAPO to GRPO)", _fixed("power", -0.5)),
    "power_+1": Arm("power family, λ = +1 fixed", _fixed("power", 1.0)),
    "power_-1.75": Arm("power family, λ = -1.75 fixed (beyond GRPO)", _fixed("power", -1.75)),
    "delta_l": Arm("ΔL (arXiv 2509.07558), α = 0.75: power family, λ = -0.75 fixed", _fixed("power", -0.75)),
    "tr": Arm("TR-GRPO, reading R-A", {"length_weight": None, **_TR}),
    "tr_b": Arm("TR-GRPO, reading R-B", {"length_weight": None, **_TR_B}),
    "tr_inside": Arm(
        "TR-GRPO, R-A inside the clip", {"length_weight": None, **_TR, "token_weight_inside_clip": True}
    ),
    "ar": Arm("AR (arXiv 2505.12929), α = 0.2", {"length_weight": None, "token_weight": "ar"}),
    "constant": Arm(
        f"every token weighs {CONSTANT_WEIGHT}, about TR's mean on running_sum",
        {"length_weight": None, **_TR, "token_weight_kwargs": {"min": CONSTANT_WEIGHT, "max": CONSTANT_WEIGHT}},
    ),
    "softmax_tr": Arm("λ (softmax) × TR", {**_LAMBDA_GRPO, **_TR}),
    "power_tr": Arm("λ (power) × TR", {**_POWER, **_TR}),
    "balanced": Arm("Balanced Aggregation (arXiv 2605.04077)", {"length_weight": "balanced"}),
    "positive_weight_3": Arm("right answers count 3 times, nothing else", {**_DAPO, "positive_weight": 3.0}),
    "signed": Arm("length, signed, λ by regression", {**_POSITIVE, "lambda_side": "signed"}),
    "positive": Arm("length, positive, λ by regression", _POSITIVE),
    "positive3": Arm("three features, positive, λ by regression", {**_POSITIVE, "lambda_features": _THREE}),
    "positive3_tr": Arm("three features, positive × TR", {**_POSITIVE, "lambda_features": _THREE, **_TR}),
    "positive3_ar": Arm(
        "three features, positive × AR, α = 0.6",
        {**_POSITIVE, "lambda_features": _THREE, **_AR_06},
    ),
}  # fmt: skip

# The first round's, in the order in which they were planned. The others above belong to the second (`arena/PLAN.md`).
FIRST_ROUND = tuple(ARMS)[: tuple(ARMS).index("balanced")]

# Controls of the second round.
CONTROLS: dict[str, Arm] = {
    "ar_0.6": Arm("AR, α = 0.6", {"length_weight": None, **_AR_06}),
    "positive3_held": Arm(
        "three features, positive, mean of f over a group's right answers held at 1",
        {"length_weight": "recipes.studies.arena.held_power.held_positive3"},
    ),
    # Mean f of right over mean f of wrong answers in runs of positive3: 1.90 on running_sum, 1.65 on slippery_chain.
    "positive_weight_1.8": Arm(
        "right answers count 1.8 times, as much as with positive3 on average", {**_DAPO, "positive_weight": 1.8}
    ),
    "positive3_x3": Arm(
        "three features, positive, and right answers 3 times",
        {**_POSITIVE, "lambda_features": _THREE, "positive_weight": 3.0},
    ),
}


def find_arm(name: str) -> Arm:
    """The arm or control of that name; a KeyError if there is none."""
    return ARMS[name] if name in ARMS else CONTROLS[name]


BASELINES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo")
LEARNED = ("softmax", "softmax_fast", "softmax_adamw", "power", "power_fast", "power_adamw")
