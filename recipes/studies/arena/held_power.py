"""A control of the arena: which right answer counts more, without right answers counting more on the whole."""

from dataclasses import dataclass

import torch

from trl_lambda.weights import ResponseRows
from trl_lambda.weights.members import Power
from trl_lambda.weights.rows import group_mean, one_where_zero, sides


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

    def __call__(self, rows: ResponseRows, lam: torch.Tensor | None) -> torch.Tensor:
        weights = super().__call__(rows, lam)
        chosen = sides(rows.advantages, rows.has_tokens, self.side) != 0
        # The token mass is one factor over the scope: it cancels in the ratio to the mean.
        return torch.where(chosen, weights / one_where_zero(group_mean(weights, chosen)), torch.ones_like(weights))


held_positive3 = HeldPower("positive", ("length", "mean_logp", "min_logp"))
