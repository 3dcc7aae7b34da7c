"""
How λ learns: objects that turn what a generation batch shows into a gradient for λ's own parameter group.

    "descent"      dL/dλ of the policy loss by autograd, arXiv 2510.06870. For side "both" only.
    "regression"   ∇ ½|λ - κw|²: λ follows κ times w, the ridge regression of A on what λ weighs (this project's).
    "target"       a controller that holds the mean completion length at a set point (this project's).

The last two see the gathered lengths, features and advantages, which every process has alike, so that their gradient
needs no reduction and is the same on every process to the last bit.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from ..trl_seam.generation_batch import GenerationBatch
from ..weights.features import centred_features
from ..weights.sides import sides

RULES = ("descent", "regression", "target")
# Parts of the sums of "regression" that stay from one generation batch to the next.
_DECAY = 0.9
# Ridge of "regression", relative to each feature's own sum of squares; for several features, which are correlated.
_RIDGE = 0.1


class Rule(ABC):
    """What λ's gradient is made of, beside autograd. One object per run."""

    @abstractmethod
    def observe(self, batch: GenerationBatch, mean_reward: float) -> None:
        """Take in a new generation batch of training, the same on every process, and its mean reward."""

    @abstractmethod
    def gradient(self, lam: torch.Tensor) -> torch.Tensor | None:
        """Gradient of λ, the shape of `lam`, for the next optimizer step; `None` while there is nothing to follow."""

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
    ``n = Σ_groups (G - 1)``: for one feature that is ``1 - se²/β²``. The gradient is ``λ - κw``.

    Args:
        features (`tuple[str, ...]`): what λ weighs, K names.
        gain (`float`): κ.
    """

    def __init__(self, features: tuple[str, ...], gain: float) -> None:
        size = len(features)
        self._features = features
        self._gain = gain
        # Σ x xᵀ, Σ x a, Σ a² and n, of one matrix: it is decayed, saved and restored as a whole.
        self._sums = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        self._count = 0.0

    def observe(self, batch: GenerationBatch, mean_reward: float) -> None:
        self._sums *= _DECAY
        self._count *= _DECAY
        if batch.advantages is None:
            return
        lengths, advantages = batch.lengths.double(), batch.advantages.double()
        has_tokens = lengths > 0
        signal = (sides(advantages, has_tokens, "signed") != 0).any(dim=1, keepdim=True) & has_tokens
        count = signal.sum(dim=1, keepdim=True)
        a = (advantages - (advantages * signal).sum(dim=1, keepdim=True) / count.clamp(min=1)) * signal
        x = centred_features(self._features, lengths, has_tokens, batch.features) * signal.unsqueeze(-1)
        rows = torch.cat([x, a.unsqueeze(-1)], dim=-1).flatten(0, 1)
        self._sums += (rows.T @ rows).cpu()
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
        sums = torch.tensor(_numbers(state["sums"], self._sums.numel()), dtype=torch.float64)
        self._sums, self._count = sums.view_as(self._sums), _numbers([state["count"]], 1)[0]


class Target(Rule):
    """
    Hold the mean completion length of a generation batch at a set point: a proportional-integral controller on
    ``e = ln(L/target)``, in the form that has no hidden integrator, so that λ's bounds stop its windup.

    Per generation batch λ moves, before its optimizer's momentum, by ``-rate · (K_I·e_t + K_P·(e_t - e_{t-1}))``, L
    smoothed by one half per generation batch, the movement spread evenly over the optimizer steps of the batch. With
    "positive" and "signed" λ > 0 lengthens; with "negative" it shortens, and the sign is turned.

    Args:
        target (`float`): above 1, the mean completion length in own tokens; up to 1, a part of the length at the
            start, which is the mean over the first `START` generation batches.
        steps (`float`): optimizer steps per generation batch.
        side (`str`): whose lengths λ weighs.
        bounds (`tuple[float, float]`): of λ, to tell when it stands at one.
    """

    START = 4
    K_I, K_P = 0.3, 3.0
    _SMOOTHING = 0.5
    # At λ's default learning rate, 0.1, a gradient of 10 moves λ by 1.
    _PER_RATE = 10.0
    # For warnings: generation batches at a bound, how far off that is, and how much reward is a fall.
    _PATIENCE, _FAR, _FALL = 20, 0.15, 0.1

    def __init__(self, target: float, steps: float, side: str, bounds: tuple[float, float]) -> None:
        self._target = target if target > 1 else math.nan
        self._part = target
        self._steps = max(steps, 1.0)
        self._sign = -1.0 if side == "negative" else 1.0
        self._bounds = bounds
        self._seen = 0
        self._start = 0.0  # sum of the first lengths
        self._length = math.nan
        self._error = math.nan
        self._move = 0.0
        self._at_bound = 0
        self._reward = math.nan  # smoothed
        self._best = -math.inf
        self._warned: set[str] = set()

    def observe(self, batch: GenerationBatch, mean_reward: float) -> None:
        lengths = batch.lengths.double()
        rows = float((lengths > 0).sum())
        if rows == 0:
            self._move = 0.0
            return
        mean = float(lengths.sum()) / rows
        self._seen += 1
        if math.isnan(self._target):
            self._start += mean
            if self._seen < self.START:
                return
            self._target = self._part * self._start / self._seen
        smooth = self._SMOOTHING
        self._length = mean if math.isnan(self._length) else smooth * self._length + (1 - smooth) * mean
        error = math.log(self._length / self._target)
        change = 0.0 if math.isnan(self._error) else error - self._error
        self._error = error
        self._move = self.K_I * error + self.K_P * change
        if not math.isnan(mean_reward):
            self._reward = mean_reward if math.isnan(self._reward) else 0.9 * self._reward + 0.1 * mean_reward
            self._best = max(self._best, self._reward)

    def gradient(self, lam: torch.Tensor) -> torch.Tensor:
        self._warn(float(lam.detach().max()))
        return torch.full_like(lam, self._sign * self._PER_RATE * self._move / self._steps).detach()

    def _warn(self, lam: float) -> None:
        """Say once that the target cannot be held, or what it costs."""
        low, high = self._bounds
        far = not math.isnan(self._error) and abs(self._error) > self._FAR
        self._at_bound = self._at_bound + 1 if far and (lam <= low + 1e-3 or lam >= high - 1e-3) else 0
        if self._at_bound > self._PATIENCE * self._steps and "bound" not in self._warned:
            self._warned.add("bound")
            warnings.warn(
                f"length_target={self._target:.1f} tokens is not met: λ has stood at its bound {lam:.2f} for "
                f"{self._PATIENCE} generation batches, and the mean length is {self._length:.1f}. The task may need "
                "that length: raise the target, or widen lambda_bounds.",
                UserWarning,
                stacklevel=2,
            )
        fallen = self._best - self._reward > self._FALL * max(abs(self._best), 1e-9)
        if self._seen > 2 * self._PATIENCE and fallen and abs(lam) > 0.1 and "reward" not in self._warned:
            self._warned.add("reward")
            warnings.warn(
                f"the mean reward has fallen from {self._best:.3f} to {self._reward:.3f} since length_target="
                f"{self._target:.1f} began to act (λ = {lam:.2f}): the target may be below what the task needs.",
                UserWarning,
                stacklevel=2,
            )

    def metrics(self) -> dict[str, float]:
        return {"lambda/target_gap": self._error}

    _STATE = ("_target", "_seen", "_start", "_length", "_error", "_move", "_at_bound", "_reward", "_best")

    def state_dict(self) -> dict[str, Any]:
        values = {name.lstrip("_"): getattr(self, name) for name in self._STATE}
        return {name: None if not math.isfinite(value) else value for name, value in values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._STATE:
            value = state[name.lstrip("_")]
            missing = -math.inf if name == "_best" else math.nan
            setattr(self, name, missing if value is None else type(getattr(self, name))(_numbers([value], 1)[0]))


def _numbers(values: Any, count: int) -> list[float]:
    """`values` as finite floats, as many as needed."""
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"the rule's statistics are not {count} values")
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError("the rule's statistics are not finite numbers")
    return numbers
