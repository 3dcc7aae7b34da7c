"""The rule "target": a controller that holds the mean completion length of a run at a set point (this project's)."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ..trl_seam.generation_batch import GenerationBatch
from .rules import Rule, finite_numbers

# Of λ where `lambda_bounds` is not set: weights of right answers then differ by up to e² either way.
TARGET_BOUNDS = (-3.0, 3.0)


class Target(Rule):
    """
    Hold the mean completion length of a generation batch at a set point: proportional-integral control of λ.

    λ sets the speed of the length, not the length: ln L moves by about k·λ per optimizer step, k unknown. So λ has to
    come back while the length arrives, which the proportional part does. The integral only cancels the drift that
    learning the task has; it counts optimizer steps, as the length's own movement does, and little of an error that
    is far. Per generation batch of n optimizer steps, with L smoothed by one half:

        e  = ln(L/target)
        I += K_I·min(n, 4)·clamp(e, ±NEAR), unless that drives λ* further past a bound
        λ* = clamp(-sign·(K_P·e + I), bounds)

    The gradient ``(λ - λ*)/width``, width that of the bounds, and the learning rate of a parameter group without
    momentum are such that λ goes about the same part of the way to λ* within one generation batch, however many
    optimizer steps that has. sign is -1 for side "negative", where λ > 0 shortens.

    Args:
        target (`float`): above 1, the mean completion length in own tokens; up to 1, a part of the length at the
            start, which is the mean over the first `START` generation batches.
        steps (`float`): optimizer steps per generation batch, n.
        side (`str`): whose lengths λ weighs.
        bounds (`tuple[float, float]`): of λ.
        init (`float`): λ at step 0, and λ* where e = 0 then.
    """

    momentum = False
    START = 4
    K_P, K_I, NEAR, UNWIND = 6.0, 0.05, 0.25, 2.0
    SMOOTHING = 0.5
    # λ goes 1 - exp(-SPEED·lambda_learning_rate) of the way to λ* within a generation batch: 0.7 at the default 0.1.
    SPEED = 12.0
    # A warning comes after PATIENCE generation batches, at a bound with |e| above FAR, or with the smoothed reward
    # below its best by the part FALL and by 4 standard errors.
    PATIENCE, FAR, FALL = 30, 0.15, 0.1
    _REWARD_DECAY = 0.9

    def __init__(self, target: float, steps: float, side: str, bounds: tuple[float, float], init: float = 0.0) -> None:
        self._asked = target
        self._steps = steps
        self._sign = -1.0 if side == "negative" else 1.0
        self._bounds = bounds
        self._seen = 0
        self._start = 0.0  # sum of the first START lengths
        self._length = math.nan
        self._error = math.nan
        self._integral = -self._sign * init
        self._goal = math.nan  # λ*
        self._stuck, self._stuck_at = 0, math.nan  # generation batches at a bound without progress, and |e| then
        self._reward, self._variance, self._best = math.nan, 0.0, -math.inf  # the reward smoothed
        self._fallen = 0  # generation batches since it has
        self._warned_of_bound = self._warned_of_reward = False

    @property
    def _target(self) -> float:
        """The set point in tokens; NaN where it is a part of a length at the start that is not known yet."""
        if self._asked > 1:
            return self._asked
        return self._asked * self._start / self.START if self._seen >= self.START else math.nan

    def observe(self, batch: GenerationBatch, mean_reward: float, mean_length: float | None = None) -> None:
        lengths = batch.lengths.cpu().double()  # MPS has no float64
        rows = float((lengths > 0).sum())
        mean = float(lengths.sum()) / max(rows, 1.0) if mean_length is None else mean_length
        if not mean > 0:  # nothing sampled, or nothing logged
            return
        self._seen += 1
        if self._seen <= self.START:
            self._start += mean
        if math.isnan(self._target):
            return
        smooth = self.SMOOTHING
        self._length = mean if math.isnan(self._length) else smooth * self._length + (1 - smooth) * mean
        self._error = math.log(self._length / self._target)
        self._steer()
        self._watch_bound()
        if not math.isnan(mean_reward):
            self._watch_reward(mean_reward)

    def _steer(self) -> None:
        """Set λ*, and move the integral where no bound stands in its way."""
        low, high = self._bounds
        move = self.K_I * min(self._steps, 4.0) * max(-self.NEAR, min(self.NEAR, self._error))
        if move * self._integral < 0:
            move *= self.UNWIND
        wanted = -self._sign * (self.K_P * self._error + self._integral + move)
        self._goal = min(max(wanted, low), high)
        if (wanted - self._goal) * -self._sign * move <= 0:  # else λ* is outside, and would be driven further
            self._integral += move

    def gradient(self, lam: torch.Tensor) -> torch.Tensor:
        if math.isnan(self._goal):
            return torch.zeros_like(lam)
        return (lam.detach() - self._goal) / (self._bounds[1] - self._bounds[0])

    def learning_rate(self, base: float) -> float:
        """The width of λ's bounds times the part of the way that one of the batch's optimizer steps goes."""
        low, high = self._bounds
        return (high - low) * -math.expm1(-self.SPEED * base / max(self._steps, 1.0))

    def _watch_bound(self) -> None:
        """Say once that the target is out of reach."""
        far = abs(self._error)
        if self._goal not in self._bounds or far <= self.FAR:
            self._stuck, self._stuck_at = 0, math.nan
        elif math.isnan(self._stuck_at) or far < 0.9 * self._stuck_at:  # on its way
            self._stuck, self._stuck_at = 0, far
        else:
            self._stuck += 1
        if self._stuck == self.PATIENCE and not self._warned_of_bound:
            self._warned_of_bound = True
            warnings.warn(
                f"length_target={self._target:.1f} tokens is not met: λ has been sent to its bound {self._goal:g} for "
                f"{self.PATIENCE} generation batches, in which the mean length, {self._length:.1f}, came no nearer "
                "worth speaking of. The task may need that length: raise the target, or widen lambda_bounds.",
                UserWarning,
                stacklevel=2,
            )

    def _watch_reward(self, mean_reward: float) -> None:
        """Say once what the target costs: the smoothed reward has been below its best for long, beyond its noise."""
        decay = self._REWARD_DECAY
        gap = 0.0 if math.isnan(self._reward) else mean_reward - self._reward
        self._reward = mean_reward if math.isnan(self._reward) else self._reward + (1 - decay) * gap
        self._variance = decay * (self._variance + (1 - decay) * gap**2)
        error = math.sqrt(self._variance * (1 - decay) / (1 + decay))
        if self._seen >= 2 * self.START:  # by now the first reward counts for little
            self._best = max(self._best, self._reward)
        fallen = self._best - self._reward > max(self.FALL * abs(self._best), 4 * error)
        self._fallen = self._fallen + 1 if fallen and abs(self._goal) > 0.1 else 0
        if self._fallen == self.PATIENCE and not self._warned_of_reward:
            self._warned_of_reward = True
            warnings.warn(
                f"the mean reward has fallen from {self._best:.3f} to {self._reward:.3f} while length_target="
                f"{self._target:.1f} tokens acts (λ near {self._goal:.2f}): the target may be below what the task "
                "needs.",
                UserWarning,
                stacklevel=2,
            )

    def metrics(self) -> dict[str, float]:
        return {"lambda/target_gap": self._error}

    _STATE = (
        "_seen", "_start", "_length", "_error", "_integral", "_goal", "_stuck", "_stuck_at", "_reward",
        "_variance", "_best", "_fallen", "_warned_of_bound", "_warned_of_reward",
    )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        values = {name.lstrip("_"): getattr(self, name) for name in self._STATE}
        return {name: None if not math.isfinite(value) else value for name, value in values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._STATE:
            value, kind = state[name.lstrip("_")], type(getattr(self, name))
            if kind is bool:
                setattr(self, name, bool(value))
            elif value is None and kind is float:
                setattr(self, name, -math.inf if name == "_best" else math.nan)
            else:
                setattr(self, name, kind(finite_numbers([value], 1)[0]))
