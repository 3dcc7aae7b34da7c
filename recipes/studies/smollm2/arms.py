"""The arms of the study: those of the arena by their names there, and the study's own."""

from typing import Any

from recipes.studies.shared import arms
from recipes.studies.shared.arms import Arm

_DAPO = {"length_weight": "dapo"}
_PREFERENCE: dict[str, Any] = {
    "length_weight": "power",
    "lambda_side": "positive",
    "lambda_features": ["length", "mean_logp", "min_logp"],
}
# Right answers count 3 times in one, and a third as often in the other.
OWN: dict[str, Arm] = {
    "dapo_again": Arm("dapo with other replies: the yardstick", {"loss_type": "dapo"}, trl=True),
    "positive_weight_0.3": Arm("right answers count 0.3 times", {**_DAPO, "positive_weight": 0.3}),
    "prompt_mean": Arm("token mean of each prompt", {**_DAPO, "length_weight_scope": "prompt"}),
    "prompt_mean_live": Arm(
        "token mean of each prompt, tied groups dropped",
        {**_DAPO, "length_weight_scope": "prompt", "drop_tied_groups": True},
    ),
    "constant_1.3": Arm(
        "every token weighs 1.3: a larger step",
        {"length_weight": None, "token_weight": "tr_grpo", "token_weight_kwargs": {"min": 1.3, "max": 1.3}},
    ),
}
MAIN = ("dapo", "softmax", "tr", "softmax_tr")
TARGET, CUT = 6, 8  # tokens
_REWARDS = "recipes.studies.shared.length_rewards"
# Four ways to the same length. LACONIC's η is the published one, 0.002.
OWN |= {
    "length_target": Arm("length_target", {"length_weight": "power", "length_target": float(TARGET)}),
    "laconic": Arm(
        "LACONIC's penalty", {"loss_type": "dapo"}, trl=True, rewards={f"{_REWARDS}.laconic": {"budget": TARGET}}
    ),
    "distance": Arm(
        "distance to the target", {"loss_type": "dapo"}, trl=True, rewards={f"{_REWARDS}.distance": {"target": TARGET}}
    ),
    "cut": Arm("a lower max_completion_length", {"loss_type": "dapo", "max_completion_length": CUT}, trl=True),
}


def find_arm(name: str) -> Arm:
    """The arm of that name; a KeyError if there is none."""
    return OWN[name] if name in OWN else arms.find_arm(name)
