"""
What every arm weighs its tokens by at ρ = 1, as one function of lengths, probabilities and advantages.

On the policy's own samples all surrogates of TRL have the gradient A·∇log π (the sequence-level ratio too: its
1/|o| Σ_t ∇log π counts |o| times), so that only reduction and weights tell arms apart, and some not even these:
`same_direction` says which. A generation batch is taken whole; cut over several steps, bnpo divides each part by its
own tokens and is dapo no more.

A λ that is learned by regression starts at 0, where it is dapo. What it becomes is a weight of its own, `*_settled`: λ
where the rule stands after all other batches, see `settled`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

import torch

from recipes.studies.alignment.factors import response_weights, token_weights
from recipes.studies.alignment.policy_gradient import Batch, group_advantages
from recipes.studies.shared.arms import ARMS, Arm, find_arm
from trl_lambda import LambdaGRPOConfig
from trl_lambda.weights import LENGTH_WEIGHTS

BASE = "dapo"  # λ = 0
UNDERSTOOD = frozenset({
    "loss_type", "epsilon", "epsilon_high", "importance_sampling_level", "length_weight", "length_weight_kwargs",
    "length_weight_scope", "lambda_init", "lambda_learnable", "lambda_learning_rate", "lambda_side",
    "lambda_features", "lambda_gain", "positive_weight", "token_weight", "token_weight_kwargs",
    "token_weight_inside_clip",
})  # fmt: skip
# How λ moves, not where it starts.
STEPPING = {"lambda_learning_rate", "lambda_gain"}


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


DEFAULTS = {field.name: _default(field) for field in fields(LambdaGRPOConfig) if field.name in UNDERSTOOD}
# How far below and above λ's start the slope of the alignment in λ is taken; of about equal effect in both families.
SLOPE_STEP = {"lambda_grpo": 2.0, "power": 0.5}
# More of λ's axis, for the families without a token weight.
GRID = {"lambda_grpo": (-4.0, -2.0, 2.0, 4.0), "power": (-2.0, -1.0, -0.5, 0.5, 1.0)}
CONTROLS = {
    "power_tr_-1": Arm(
        "GRPO × TR",
        {"length_weight": "power", "lambda_init": -1.0, "lambda_learnable": False, "token_weight": "tr_grpo"},
    ),
    "ar_0.6": find_arm("ar_0.6"),
}
REVERSED = {"tr_reversed": "tr"}  # 1/v, decreasing in the probability


@dataclass(frozen=True)
class Weight:
    """
    One weight to be aligned.

    Args:
        name (`str`): of an arm, or of a point beside the arms.
        options (`Mapping`): everything in `UNDERSTOOD`, defaults filled in.
        reversed (`bool`): its reciprocal is meant.
        settled (`bool`): it is meant with the λ that its rule finds, which `__call__` is given.
    """

    name: str
    options: Mapping[str, Any]
    reversed: bool = False
    settled: bool = False

    @property
    def learnable(self) -> bool:
        """Whether λ is learned by descent on the policy loss, and `lambda_init` only where it starts."""
        return self._learned and self.options["lambda_side"] in (None, "both")

    @property
    def follows(self) -> bool:
        """Whether λ follows a regression."""
        return self._learned and not self.learnable

    @property
    def _learned(self) -> bool:
        return LENGTH_WEIGHTS[self.options["length_weight"] or BASE].has_lambda and self.options["lambda_learnable"]

    @property
    def start(self) -> torch.Tensor | float:
        """λ at step 0: `lambda_init` for the first feature, 0 for the others."""
        init, others = self.options["lambda_init"], len(self.options["lambda_features"]) - 1
        return torch.tensor([init, *[0.0] * others]) if others else init

    def __call__(
        self,
        lengths: torch.Tensor,
        logps: torch.Tensor,
        advantages: torch.Tensor,
        lam: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        w_it at ρ = 1.

        Args:
            lengths (`torch.Tensor`): tokens per completion, (P, G); they come first in their row.
            logps (`torch.Tensor`): log π_it, (P · G, T).
            advantages (`torch.Tensor`): A_i, (P, G); f and the clip may ask for their sign.
            lam (`torch.Tensor`, *optional*): λ, if not at its start; a settled weight's.

        Returns:
            `torch.Tensor`: (P · G, T), >= 0.
        """
        if self.settled and lam is None:
            raise ValueError(f"{self.name} is measured at a λ of its rule's, and none is given.")
        lam = self.start if lam is None else lam
        per_response = response_weights(self.options, lengths, logps, advantages, lam)
        weights = per_response.view(-1, 1) * token_weights(self.options, logps, advantages.view(-1, 1))
        return 1 / weights if self.reversed else weights


def lambda_gradient(weight: Weight, batch: Batch, logps: torch.Tensor) -> float:
    """
    dL/dλ of the trainer's own loss at λ's start and ρ = 1, where a token's surrogate has the value v·A.

    Args:
        weight (`Weight`): a learnable one.
        batch (`Batch`): its completions.
        logps (`torch.Tensor`): log π of their tokens, (B, T).

    Returns:
        `float`: descent moves λ against its sign.
    """
    lam = torch.tensor(weight.options["lambda_init"], dtype=torch.float64, requires_grad=True)
    advantages = group_advantages(batch.rewards)
    column = advantages.view(-1, 1)
    values = token_weights(weight.options, logps, column) * column * batch.mask
    per_response = response_weights(weight.options, batch.lengths, logps, advantages, lam)
    loss = -(per_response.flatten() * values.sum(dim=1)).sum() / batch.lengths.sum()
    return torch.autograd.grad(loss, lam)[0].item()


def make_weight(name: str, arm: Arm) -> Weight:
    """
    The weight of an arm.

    Raises:
        `ValueError`: if an option may change the gradient in a way that is not covered here.
    """
    unknown = set(arm.options) - UNDERSTOOD
    if unknown:
        raise ValueError(f"arm {name!r} sets {sorted(unknown)}, whose effect on the gradient alignment cannot tell.")
    options = {**DEFAULTS, **({"length_weight": None} if arm.trl else {}), **arm.options}
    weight = Weight(name, options)
    if options["importance_sampling_level"] != "token" and options["token_weight"] is not None:
        raise ValueError(f"arm {name!r} weighs tokens that share one ratio; alignment knows a ratio per token only.")
    if weight.learnable and (options["token_weight_inside_clip"] or options["loss_type"] != "dapo"):
        raise ValueError(f"arm {name!r} learns λ from another value than v·A, the only one alignment knows.")
    return weight


def all_weights(arms: Mapping[str, Arm] = ARMS, *, beside: bool = True) -> list[Weight]:
    """
    Every arm, λ = 0 first, then λ's axis around every arm that learns by descent, the controls, and the arms whose λ
    follows a regression, at its start and settled. Arms that cannot run again are left out.

    Args:
        arms (`Mapping[str, Arm]`): by name, `BASE` among them.
        beside (`bool`): with the controls and the reversed weights.

    Returns:
        `list[Weight]`: of distinct names; some have the same direction.
    """
    weights = {name: make_weight(name, arms[name]) for name in (BASE, *arms) if not arms[name].removed}
    for weight in [weight for weight in weights.values() if weight.learnable]:
        if _family_head(weight, weights.values()) is not weight:
            continue
        plain = weight.options["token_weight"] is None
        for lam in sorted({*_sides(weight), *(GRID[weight.options["length_weight"]] if plain else ())}):
            options = {**weight.options, "lambda_init": lam, "lambda_learnable": False}
            weights.setdefault(_beside(weight, lam), Weight(_beside(weight, lam), options))
    if beside:
        weights |= {name: make_weight(name, arm) for name, arm in CONTROLS.items()}
        weights |= {name: Weight(name, weights[of].options, reversed=True) for name, of in REVERSED.items()}
    # Last, so that what they coincide with at λ = 0 has its own name.
    following = [weight for weight in weights.values() if weight.follows]
    settled = [Weight(f"{weight.name}_settled", weight.options, settled=True) for weight in following]
    return [*(weight for weight in weights.values() if not weight.follows), *following, *settled]


def slope_sides(weight: Weight, weights: Iterable[Weight]) -> tuple[Weight, Weight]:
    """Of `all_weights`, those with λ below and above where a learnable one starts."""
    named = {other.name: other for other in weights}
    below, above = (named[_beside(_family_head(weight, named.values()), lam)] for lam in _sides(weight))
    return below, above


def _sides(weight: Weight) -> tuple[float, float]:
    start, step = weight.options["lambda_init"], SLOPE_STEP[weight.options["length_weight"]]
    return start - step, start + step


def _beside(weight: Weight, lam: float) -> str:
    """The name of a learnable weight with λ held elsewhere."""
    return f"{weight.name}_{lam:+g}"


def _family_head(weight: Weight, weights: Iterable[Weight]) -> Weight:
    """The first of the learnable weights that differ from this one in how λ is stepped only."""
    kept = UNDERSTOOD - STEPPING
    return next(other for other in weights if all(other.options[key] == weight.options[key] for key in kept))


def same_direction(weights: Iterable[Weight]) -> dict[str, str]:
    """
    The first weight that each is a constant multiple of, so that their gradients at ρ = 1 are parallel on any batch.

    Decided on random lengths, probabilities and rewards, float64, and for a settled weight at any λ other than 0.

    Args:
        weights (`Iterable[Weight]`): `BASE` first.

    Returns:
        `dict[str, str]`: by name; itself for the first of its direction.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (6, 8), generator=generator)
    logps = torch.rand(48, 30, generator=generator, dtype=torch.float64).log()
    advantages = group_advantages(torch.rand(6, 8, generator=generator, dtype=torch.float64))
    mask = torch.arange(30) < lengths.view(-1, 1)
    seen: dict[str, torch.Tensor] = {}
    result = {}
    for weight in weights:
        count = len(weight.options["lambda_features"])
        lam = torch.linspace(0.5, 1.0, count, dtype=torch.float64) if weight.settled else None
        values = (weight(lengths, logps, advantages, lam) * mask).flatten().double()
        values /= values.norm()
        result[weight.name] = next((n for n, other in seen.items() if (values - other).norm() < 1e-5), weight.name)
        seen.setdefault(result[weight.name], values)
    return result
