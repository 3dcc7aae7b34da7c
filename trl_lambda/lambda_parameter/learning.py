"""
How λ learns: one object per run that says where λ's gradient comes from.

    "fixed"        λ stays at `lambda_init`.
    "descent"      dL/dλ of the policy loss by autograd, arXiv 2510.06870. For side "both" only.
    "regression"   ∇ ½|λ - κw|²: λ follows κ times w, the ridge regression of A on what λ weighs (this project's).
    "target"       a controller that holds the mean completion length at a set point (this project's).

The last two see lengths, features and advantages of the whole generation batch, which every process has alike. Their
gradient needs no reduction and is the same on every process to the last bit.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..generation_batch import GenerationBatch
from ..trl_seam.contract import SCORE_FUNCTION_LOSS_TYPES
from ..weights.rows import ResponseRows, advantages_differ, centred_features

# Parts of the sums of "regression" that stay from one generation batch to the next.
_DECAY = 0.9
# Ridge of "regression", relative to each feature's own sum of squares; for several features, which are correlated.
_RIDGE = 0.1
# Of λ with "target" where `lambda_bounds` is not set: "power" reaches its own limit, e^±2, within them.
TARGET_BOUNDS = (-3.0, 3.0)


class Learning:
    """
    Where λ's gradient comes from. This base class is a λ that does not learn.

    Class attributes:
        name: as in `lambda.json` and the model card.
        is_learnable: whether λ has a gradient at all.
        uses_loss: whether autograd makes it, from the policy loss.
        has_momentum: whether λ's parameter group keeps the momentum of its optimizer.
    """

    name = "fixed"
    is_learnable = False
    uses_loss = False
    has_momentum = True

    def observe(self, batch: GenerationBatch, mean_length: float) -> None:
        """
        Take in a new generation batch of training, the same on every process.

        Args:
            batch ([`GenerationBatch`]): its rows.
            mean_length (`float`): mean length of the sampled answers in own tokens, those that TRL masks included.
        """

    def gradient(self, lam: torch.Tensor) -> torch.Tensor:
        """Gradient of λ for the next optimizer step, the shape of `lam`."""
        raise TypeError(f"{self.name}: autograd makes λ's gradient")

    def learning_rate(self, base: float) -> float:
        """Learning rate of λ's parameter group, from `lambda_learning_rate`."""
        return base

    def metrics(self) -> dict[str, float]:
        """Values to log now, by metric name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Its statistics, as JSON holds them. Floats survive exactly."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the statistics from `state_dict`."""


Fixed = Learning


class Descent(Learning):
    """
    dL/dλ of the policy loss (arXiv 2510.06870).

    Args:
        loss_type (`str`): TRL's. It warns about a surrogate whose value is meaningless.
    """

    name = "descent"
    is_learnable = True
    uses_loss = True

    def __init__(self, loss_type: str) -> None:
        if loss_type in SCORE_FUNCTION_LOSS_TYPES:
            warnings.warn(
                f"loss_type={loss_type!r} with a learnable λ: only the gradient of this surrogate in the policy is "
                "meaningful, and λ descends on its value. λ's sign then follows the responses' log-likelihood, not "
                "their advantage alone. Use loss_type='dapo' or 'sapo', or lambda_learnable=False.",
                UserWarning,
                stacklevel=2,
            )


class Regression(Learning):
    """
    A critic of few features: ``w = (M + ρ·diag M)⁻¹ b``, ``M = Σ x xᵀ``, ``b = Σ x a`` over the rows of all groups
    with a signal, a and x centred in the group, both sums decayed by 0.9 per generation batch; ρ = 0.1 for several
    features and 0 for one.

    w is shrunk by the part of it that is noise, ``max(0, 1 - K·σ²/bᵀw)`` with ``σ² = (Σa² - bᵀw)/n`` and
    ``n = Σ_groups (G - 1)``. For one feature that is ``1 - se²/β²``. The gradient is ``λ - κw``. For side "negative",
    where λ > 0 makes a wrong answer with a large x count more, it is ``λ + κw``.

    Args:
        features (`tuple[str, ...]`): what λ weighs, K names.
        gain (`float`): κ.
        side (`str`): the side of λ.
    """

    name = "regression"
    is_learnable = True

    def __init__(self, features: tuple[str, ...], gain: float, side: str) -> None:
        size = len(features)
        self._features = features
        self._gain = -gain if side == "negative" else gain
        # Σ x xᵀ, Σ x a and Σ a² in one matrix: it is decayed, saved and restored as a whole.
        self._sums = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        self._count = 0.0

    def observe(self, batch: GenerationBatch, mean_length: float) -> None:
        if batch.advantages is None:
            raise ValueError(
                "λ with a lambda_side learns from one advantage per response, and the batch has one per token. Use "
                "lambda_side='both' or lambda_learnable=False."
            )
        lengths, advantages = batch.lengths.cpu().double(), batch.advantages.cpu().double()  # MPS has no float64
        rows = ResponseRows(
            lengths,
            lengths.sum(),
            statistics={name: values.cpu().double() for name, values in batch.statistics.items()},
        )
        signal = advantages_differ(advantages, rows.has_tokens) & rows.has_tokens
        count = signal.sum(dim=1, keepdim=True)
        a = (advantages - (advantages * signal).sum(dim=1, keepdim=True) / count.clamp(min=1)) * signal
        x = centred_features(self._features, rows) * signal.unsqueeze(-1)
        columns = torch.cat([x, a.unsqueeze(-1)], dim=-1).flatten(0, 1)
        self._sums = _DECAY * self._sums + columns.T @ columns
        self._count = _DECAY * self._count + float((count - 1).clamp(min=0).sum())

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
        return {"lambda/r2": float(2 * b @ w - w @ x @ w) / total if total > 0 else math.nan}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums.tolist(), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums, self._count = torch.tensor(state["sums"], dtype=torch.float64), float(state["count"])


class Target(Learning):
    """
    Proportional-integral control of λ by the mean completion length of the generation batches.

    λ sets the speed of the length, not the length: ln L moves by about k·λ per optimizer step, k unknown. So λ has to
    come back while the length arrives, which the proportional part does. The integral only cancels the drift that
    learning the task has. It counts optimizer steps, as the length's own movement does, and little of an error that
    is far. Per generation batch of n optimizer steps, with L smoothed by one half:

        e  = ln(L/target)
        I += K_I·min(n, 4)·clamp(e, ±NEAR), unless that drives λ* further past a bound;
             twice that (`UNWIND`) while I goes back to 0
        λ* = clamp(-sign·(K_P·e + I), bounds)

    The gradient is ``(λ - λ*)/width``, width that of the bounds. The learning rate of a parameter group without
    momentum makes λ go about the same part of the way to λ* within one generation batch, however many optimizer steps
    that has. sign is -1 for side "negative", where λ > 0 shortens.

    Args:
        target (`float`): above 1, the mean completion length in own tokens; up to 1, a part of the length at the
            start, which is the mean over the first `START` generation batches.
        steps (`float`): optimizer steps per generation batch, n.
        side (`str`): the side of λ.
        bounds (`Sequence[float]`): of λ, low and high.
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

    def __init__(self, target: float, steps: float, side: str, bounds: Sequence[float], init: float = 0.0) -> None:
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
        return (self._bounds[1] - self._bounds[0]) * -math.expm1(-self.SPEED * base / max(self._steps, 1.0))

    def metrics(self) -> dict[str, float]:
        return {"lambda/target_gap": math.nan if self._error is None else self._error}

    _STATE = ("seen", "start", "length", "error", "integral", "goal")

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, f"_{name}") for name in self._STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._STATE:
            setattr(self, f"_{name}", state[name])
