"""λ led to a length: a controller that holds the mean completion length of a run at a set point (this project's)."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..generation_batch import GenerationBatch
from .learning import Learning

# Of λ where `lambda_bounds` is not set: weights of right answers then differ by up to e² either way.
TARGET_BOUNDS = (-3.0, 3.0)


class Target(Learning):
    """
    Proportional-integral control of λ by the mean completion length of the generation batches.

    λ sets the speed of the length, not the length: ln L moves by about k·λ per optimizer step, k unknown. So λ has to
    come back while the length arrives, which the proportional part does. The integral only cancels the drift that
    learning the task has. It counts optimizer steps, as the length's own movement does, and little of an error that
    is far. Per generation batch of n optimizer steps, with L smoothed by one half:

        e  = ln(L/target)
        I += K_I·min(n, 4)·clamp(e, ±NEAR), unless that drives λ* further past a bound
        λ* = clamp(-sign·(K_P·e + I), bounds)

    The gradient is ``(λ - λ*)/width``, width that of the bounds. The learning rate of a parameter group without
    momentum makes λ go about the same part of the way to λ* within one generation batch, however many optimizer steps
    that has. sign is -1 for side "negative", where λ > 0 shortens.

    Args:
        target (`float`): above 1, the mean completion length in own tokens; up to 1, a part of the length at the
            start, which is the mean over the first `START` generation batches.
        steps (`float`): optimizer steps per generation batch, n.
        side (`str`): the side of λ.
        bounds (`tuple[float, float]`): of λ.
        init (`float`): λ at step 0, and λ* where e = 0 then.
    """

    name = "target"
    is_learnable = True
    has_momentum = False
    START = 4
    K_P, K_I, NEAR, UNWIND = 6.0, 0.05, 0.25, 2.0
    SMOOTHING = 0.5
    # λ goes 1 - exp(-SPEED·lambda_learning_rate) of the way to λ* within a generation batch: 0.7 at the default 0.1.
    SPEED = 12.0

    def __init__(self, target: float, steps: float, side: str, bounds: tuple[float, float], init: float = 0.0) -> None:
        self._asked = target
        self._steps = steps
        self._sign = -1.0 if side == "negative" else 1.0
        self._bounds = bounds
        self._seen = 0
        self._start = 0.0  # sum of the first START lengths
        self._length: float | None = None  # smoothed
        self._error: float | None = None
        self._integral = -self._sign * init
        self._goal: float | None = None  # λ*

    @property
    def set_point(self) -> float | None:
        """The target in own tokens; `None` while the length at the start is not known yet."""
        if self._asked > 1:
            return self._asked
        return self._asked * self._start / self.START if self._seen >= self.START else None

    def observe(self, batch: GenerationBatch, mean_length: float) -> None:
        if not mean_length > 0:  # nothing sampled
            return
        self._seen += 1
        if self._seen <= self.START:
            self._start += mean_length
        if self.set_point is None:
            return
        before = mean_length if self._length is None else self._length
        self._length = self.SMOOTHING * before + (1 - self.SMOOTHING) * mean_length
        self._error = math.log(self._length / self.set_point)
        low, high = self._bounds
        move = self.K_I * min(self._steps, 4.0) * max(-self.NEAR, min(self.NEAR, self._error))
        if move * self._integral < 0:
            move *= self.UNWIND
        wanted = -self._sign * (self.K_P * self._error + self._integral + move)
        self._goal = min(max(wanted, low), high)
        if (wanted - self._goal) * -self._sign * move <= 0:  # else λ* is outside, and would be driven further
            self._integral += move

    def gradient(self, lam: torch.Tensor) -> torch.Tensor:
        if self._goal is None:
            return torch.zeros_like(lam)
        return (lam.detach() - self._goal) / (self._bounds[1] - self._bounds[0])

    def learning_rate(self, base: float) -> float:
        """The width of λ's bounds times the part of the way that one of the batch's optimizer steps goes."""
        low, high = self._bounds
        return (high - low) * -math.expm1(-self.SPEED * base / max(self._steps, 1.0))

    def metrics(self) -> dict[str, float]:
        return {"lambda/target_gap": math.nan if self._error is None else self._error}

    _STATE = ("seen", "start", "length", "error", "integral", "goal")

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, f"_{name}") for name in self._STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._STATE:
            setattr(self, f"_{name}", state[name])
