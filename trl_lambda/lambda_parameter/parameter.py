"""λ itself: its value, bounds, gradient and optimizer parameter group.

λ is not a parameter of the model. There it would enter the saved weights, the weight sync with vLLM and the joint
gradient clip, and PEFT would drop it. Outside the model this room reduces, clips, clears and saves it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .learning import Learning

GROUP_NAME = "lambda"
# `eps` of λ's group in Adam-like optimizers. Far above the gradient, it makes the step proportional to the gradient
# (momentum SGD, the paper's setting). With Adam's own 1e-8 λ walks by its learning rate whatever the gradient.
ADAM_EPS = 1.0
# Bound of |dL/dλ|, apart from the model's clip: one odd batch moves λ by no more than its learning rate.
MAX_GRAD_NORM = 1.0


class LambdaParameter:
    """
    The length preference λ of arXiv 2510.06870: one scalar for the whole run, or one per feature.

    A step is `average_gradient` after the last backward pass, `clip_gradient`, the optimizer, `finish_step`.

    Args:
        init (`float`): λ at step 0, of the first feature; 0 for the others.
        learning ([`Learning`]): where λ's gradient comes from.
        bounds (`tuple[float, float]`, *optional*): λ is projected into them after each step.
        device (`torch.device`): where the losses are computed.
        features (`Sequence[str]`): what λ weighs, one λ each.
    """

    def __init__(
        self,
        init: float,
        learning: Learning,
        *,
        bounds: tuple[float, float] | None,
        device: torch.device,
        features: Sequence[str] = ("length",),
    ) -> None:
        # One element rather than 0-d (FSDP refuses 0-d parameters), float32 whatever the model's dtype.
        values = torch.tensor([init, *[0.0] * (len(features) - 1)], dtype=torch.float32, device=device)
        self.tensor = torch.nn.Parameter(values, requires_grad=learning.is_learnable)
        self.features = tuple(features)
        self.learning = learning
        self.bounds = bounds
        self.grads: list[
            float
        ] = []  # dL/dλ of each step before the clip, or its norm for several λ, since the last log
        self.skipped = 0  # steps without a finite gradient

    @property
    def value(self) -> float:
        """λ now; of the first feature, where there are several."""
        return self.tensor[0].item()

    @property
    def values(self) -> list[float]:
        """λ of every feature."""
        return self.tensor.tolist()

    @property
    def for_loss(self) -> Tensor:
        """λ as the loss takes it: a constant unless λ descends on the loss."""
        return self.tensor if self.learning.uses_loss else self.tensor.detach()

    def is_in(self, optimizer: Any) -> bool:
        """Whether λ is in a parameter group of `optimizer`, by identity."""
        groups = getattr(optimizer, "param_groups", ())  # an engine's placeholder has none
        return any(p is self.tensor for group in groups for p in group["params"])

    def group(self, learning_rate: float, defaults: dict[str, Any]) -> dict[str, Any]:
        """
        λ's own parameter group, without weight decay.

        Args:
            learning_rate (`float`): `lambda_learning_rate`.
            defaults (`dict`): the optimizer's own options.
        """
        options: dict[str, Any] = {"eps": ADAM_EPS}
        if not self.learning.has_momentum:
            options |= {"betas": (0.0, 0.0), "momentum": 0.0, "nesterov": False}
        options = {name: value for name, value in options.items() if defaults.get(name)}
        rate = self.learning.learning_rate(learning_rate)
        return {"params": [self.tensor], "name": GROUP_NAME, "lr": rate, "weight_decay": 0.0, **options}

    def average_gradient(self, accelerator: Accelerator) -> None:
        """
        Average dL/dλ over the processes: one collective of one scalar, once per optimizer step, outside backward.

        Losses are scaled for DDP's averaging, so that λ's gradient is averaged too. A process without a gradient joins
        with zero. It precedes any unscaling of fp16 gradients, so that a non-finite value reaches every process alike.
        """
        if self.learning.uses_loss:
            grad = torch.zeros_like(self.tensor) if self.tensor.grad is None else self.tensor.grad
            reduced: Any = accelerator.reduce(grad, reduction="mean")
            self.tensor.grad = reduced

    def clip_gradient(self) -> None:
        """Clip the averaged gradient, or drop it when it is not finite: the optimizer then leaves λ alone."""
        if not self.learning.uses_loss:  # made from what every process has alike: there is nothing to average
            self.tensor.grad = self.learning.gradient(self.tensor)
        grad: Any = self.tensor.grad
        norm = grad.norm().item()
        self.grads.append(grad.item() if grad.numel() == 1 else norm)
        if not math.isfinite(norm):
            self.tensor.grad = None
            self.skipped += 1
        elif norm > MAX_GRAD_NORM:
            grad.mul_(MAX_GRAD_NORM / norm).clamp_(-MAX_GRAD_NORM, MAX_GRAD_NORM)

    @torch.no_grad()
    def finish_step(self) -> None:
        """Clear the gradient, which `Trainer` does for the model only, and project λ into its bounds."""
        self.tensor.grad = None
        if self.bounds is not None:
            self.tensor.clamp_(*self.bounds)

    @torch.no_grad()
    def load(self, values: Sequence[float], skipped: int) -> None:
        """Set λ in place and inside its bounds, so that optimizer state that refers to it stays attached."""
        self.tensor.copy_(torch.tensor(values, dtype=torch.float32))
        if self.bounds is not None:
            self.tensor.clamp_(*self.bounds)
        self.skipped = skipped
