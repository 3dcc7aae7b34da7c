"""
How λ learns: objects that turn what a generation batch shows into a gradient for λ's own parameter group.

    "descent"      dL/dλ of the policy loss by autograd, arXiv 2510.06870. For side "both" only.
    "regression"   ∇ ½|λ - κw|²: λ follows κ times w, the ridge regression of A on what λ weighs (this project's).
    "target"       a controller that holds the mean completion length at a set point (this project's): `target`.

The last two see the gathered lengths, features and advantages, which every process has alike, so that their gradient
needs no reduction and is the same on every process to the last bit.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from ..trl_seam.generation_batch import GenerationBatch
from ..weights.features import centred_features
from ..weights.sides import advantages_differ

RULES = ("descent", "regression", "target")
# Parts of the sums of "regression" that stay from one generation batch to the next.
_DECAY = 0.9
# Ridge of "regression", relative to each feature's own sum of squares; for several features, which are correlated.
_RIDGE = 0.1


class Rule(ABC):
    """
    What λ's gradient is made of, beside autograd. One object per run.

    Class attributes: `momentum`, whether λ's parameter group keeps the momentum of its optimizer.
    """

    momentum = True

    @abstractmethod
    def observe(self, batch: GenerationBatch, mean_reward: float, mean_length: float | None = None) -> None:
        """
        Take in a new generation batch of training, the same on every process, and what TRL has logged of it: its mean
        reward and, where rows may be masked that have been sampled, its mean length in own tokens.
        """

    @abstractmethod
    def gradient(self, lam: torch.Tensor) -> torch.Tensor | None:
        """Gradient of λ, the shape of `lam`, for the next optimizer step; `None` while there is nothing to follow."""

    def learning_rate(self, base: float) -> float:
        """Learning rate of λ's parameter group, from `lambda_learning_rate`."""
        return base

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """What to log of it now."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Its statistics, as JSON holds them; floats survive exactly."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the statistics; a `ValueError` if they are not those of this rule."""


class Regression(Rule):
    """
    A critic of few features: ``w = (M + ρ·diag M)⁻¹ b``, ``M = Σ x xᵀ``, ``b = Σ x a`` over the rows of all groups
    with a signal, a and x centred in the group, both sums decayed by 0.9 per generation batch; ρ = 0.1 for several
    features and 0 for one.

    w is shrunk by the part of it that is noise, ``max(0, 1 - K·σ²/bᵀw)`` with ``σ² = (Σa² - bᵀw)/n`` and
    ``n = Σ_groups (G - 1)``: for one feature that is ``1 - se²/β²``. The gradient is ``λ - κw``;
    for side "negative", where λ > 0 counts those wrong answers more that x is large of, it is ``λ + κw``.

    Args:
        features (`tuple[str, ...]`): what λ weighs, K names.
        gain (`float`): κ.
        side (`str`): whose features λ weighs.
    """

    def __init__(self, features: tuple[str, ...], gain: float, side: str = "signed") -> None:
        size = len(features)
        self._features = features
        self._gain = -gain if side == "negative" else gain
        # Σ x xᵀ, Σ x a, Σ a² and n, of one matrix: it is decayed, saved and restored as a whole.
        self._sums = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        self._count = 0.0

    def observe(self, batch: GenerationBatch, mean_reward: float, mean_length: float | None = None) -> None:
        self._sums *= _DECAY
        self._count *= _DECAY
        if batch.advantages is None:
            return
        lengths, advantages = batch.lengths.cpu().double(), batch.advantages.cpu().double()  # MPS has no float64
        has_tokens = lengths > 0
        signal = advantages_differ(advantages, has_tokens) & has_tokens
        count = signal.sum(dim=1, keepdim=True)
        a = (advantages - (advantages * signal).sum(dim=1, keepdim=True) / count.clamp(min=1)) * signal
        values = {name: value.cpu() for name, value in batch.features.items()}
        x = centred_features(self._features, lengths, has_tokens, values) * signal.unsqueeze(-1)
        rows = torch.cat([x, a.unsqueeze(-1)], dim=-1).flatten(0, 1)
        self._sums += rows.T @ rows
        self._count += float((count - 1).clamp(min=0).sum())

    def slopes(self) -> torch.Tensor:
        """w, shrunk, (K,); zeros while no batch has had a signal."""
        x, b, total = self._sums[:-1, :-1], self._sums[:-1, -1], self._sums[-1, -1]
        diagonal = x.diagonal()
        if self._count <= 0 or not bool((diagonal > 0).any()):
            return torch.zeros_like(b)
        ridge = _RIDGE if len(self._features) > 1 else 0.0
        # A feature that has not varied yet has no slope: its row and column are 0.
        w = torch.linalg.solve(x + torch.diag(ridge * diagonal + (diagonal <= 0).double()), b)
        explained = float(b @ w)
        if explained <= 0:
            return torch.zeros_like(b)
        noise = max(float(total) - explained, 0.0) / self._count
        return w * max(0.0, 1.0 - len(self._features) * noise / explained)

    def gradient(self, lam: torch.Tensor) -> torch.Tensor:
        return lam.detach() - (self._gain * self.slopes()).to(lam)

    def metrics(self) -> dict[str, float]:
        x, b, total = self._sums[:-1, :-1], self._sums[:-1, -1], float(self._sums[-1, -1])
        w = self.slopes()
        r2 = float(2 * b @ w - w @ x @ w) / total if total > 0 else math.nan
        metrics = {"lambda/r2": r2}
        if "length" in self._features:
            k = self._features.index("length")
            metrics["lambda/slope"] = float(b[k] / x[k, k]) if x[k, k] > 0 else math.nan
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums.flatten().tolist(), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        sums = torch.tensor(finite_numbers(state["sums"], self._sums.numel()), dtype=torch.float64)
        self._sums, self._count = sums.view_as(self._sums), finite_numbers([state["count"]], 1)[0]


def finite_numbers(values: Any, count: int) -> list[float]:
    """`values` as finite floats, as many as needed."""
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"the rule's statistics are not {count} values")
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError("the rule's statistics are not finite numbers")
    return numbers
