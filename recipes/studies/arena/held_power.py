"""A control of the arena: which right answer counts more, without right answers counting more on the whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trl_lambda.weights.length_weight import Power
from trl_lambda.weights.sides import sides


@dataclass(frozen=True)
class HeldPower(Power):
    """
    `"power"` for one side, with the mean of f over a group's responses of that side held at 1; f = 1 elsewhere.

    With side "positive" right and wrong answers then keep their balance, and λ only chooses among right answers. The
    token mass is not preserved.
    """

    name = "held_power"
    formula = "power, mean of f over a group's right answers held at 1"
    source = "a control of the arena"

    def __call__(
        self,
        lengths: torch.Tensor,
        lam: torch.Tensor,
        has_tokens: torch.Tensor,
        dim: Any,
        advantages: torch.Tensor | None = None,
        features: Mapping[str, torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        weights = super().__call__(lengths, lam, has_tokens, dim, advantages, features)
        chosen = sides(advantages, has_tokens, self.side) != 0
        # The token mass is one factor over the scope: it cancels in the ratio to the mean.
        mean = (weights * chosen).sum(dim=1, keepdim=True) / chosen.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.where(chosen, weights / mean.masked_fill(mean == 0, 1), torch.ones_like(weights))


held_positive3 = HeldPower("positive", ("length", "mean_logp", "min_logp"))
