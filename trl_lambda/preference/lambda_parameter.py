"""λ itself: its value and bounds, its optimizer parameter group, its step, and its state on disk.

λ is not a parameter of the model. There it would enter the saved weights, the weight sync with vLLM and the joint
gradient clip, and PEFT would drop it. Outside the model nobody else reduces, clips, clears or saves it: that is done
here.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .rules import Rule

GROUP_NAME = "lambda"


class LambdaParameter:
    """
    The learnable length preference λ of arXiv 2510.06870: one scalar for the whole run, or one per feature.

    Its parameter group sits in the trainer's optimizer (`add_group`) or, where an engine or the user owns that one, in
    a companion optimizer that holds nothing else (`make_companion`). Either way a step is, in this order:
    `reduce_gradient` after the last backward pass, `prepare_step`, the optimizer, `finish_step`.

    Args:
        init (`float`): λ at step 0, of the first feature; 0 for the others.
        learnable (`bool`): `False` keeps λ at `init`: no gradient, no parameter group.
        bounds (`tuple[float, float]`, *optional*): λ is projected into them after each step.
        max_grad_norm (`float`): bound of |dL/dλ|, apart from the model's clip; 0 turns it off.
        device (`torch.device`): where the losses are computed.
        features (`Sequence[str]`): what λ weighs, one λ each.
        rule ([`Rule`], *optional*): what λ's gradient comes from, if not from the loss.
    """

    def __init__(
        self,
        init: float,
        *,
        learnable: bool,
        bounds: tuple[float, float] | None,
        max_grad_norm: float,
        device: torch.device,
        features: Sequence[str] = ("length",),
        rule: Rule | None = None,
    ) -> None:
        # One element rather than 0-d, float32 whatever the model's dtype.
        values = torch.tensor([init, *[0.0] * (len(features) - 1)], dtype=torch.float32, device=device)
        self.tensor = torch.nn.Parameter(values, requires_grad=learnable)
        self.features = tuple(features)
        self.rule = rule
        self.bounds = bounds
        self.max_grad_norm = max_grad_norm
        self.companion: torch.optim.Optimizer | None = None
        self.learning_rate = 0.0
        self.model_learning_rate = 0.0
        self.last_grad = 0.0
        self.skipped = 0
        self._is_reduced = False
        self._scale_probe: Tensor | None = None
        self._micro_batches = 0

    @property
    def learnable(self) -> bool:
        return self.tensor.requires_grad

    @property
    def value(self) -> float:
        """λ now; of the first feature, where there are several."""
        return self.tensor[0].item()

    @property
    def values(self) -> list[float]:
        """λ of every feature."""
        return self.tensor.tolist()

    def metrics(self) -> dict[str, float]:
        """λ of every feature, and what its rule has to tell. For a log only: it waits for the model's optimizer."""
        names = ("lambda/value" if name == "length" else f"lambda/{name}" for name in self.features)
        return dict(zip(names, self.values, strict=True)) | ({} if self.rule is None else self.rule.metrics())

    @property
    def for_loss(self) -> Tensor:
        """λ as the loss takes it: a constant where its gradient comes from a rule."""
        return self.tensor if self.rule is None else self.tensor.detach()

    def _group_of(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        groups = getattr(optimizer, "param_groups", ())  # an engine's placeholder has none
        return next((group for group in groups if any(p is self.tensor for p in group["params"])), None)

    def in_optimizer(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether λ is in a parameter group of `optimizer`, by identity."""
        return self._group_of(optimizer) is not None

    def add_group(self, optimizer: torch.optim.Optimizer, *, learning_rate: float, adam_eps: float | None) -> None:
        """
        Append λ's own parameter group, without weight decay. Call it before the learning rate scheduler is built.

        Args:
            optimizer (`torch.optim.Optimizer`): The trainer's optimizer.
            learning_rate (`float`): base learning rate of λ.
            adam_eps (`float`, *optional*): `eps` of the group; `None` leaves the optimizer's own.
        """
        group = self._group(learning_rate) | self._without_momentum(optimizer)
        optimizer.add_param_group(group if adam_eps is None else group | {"eps": adam_eps})

    def make_companion(
        self, optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any], *, learning_rate: float
    ) -> torch.optim.Optimizer:
        """
        Put λ's group into an optimizer of its own.

        Args:
            optimizer_class (`type`): A torch optimizer class.
            options (`dict`): Its other arguments, as for the model.
            learning_rate (`float`): base learning rate of λ; each step multiplies it by the model's schedule.

        Returns:
            `torch.optim.Optimizer`: the companion.
        """
        self.companion = optimizer_class([self._group(learning_rate)], **options)
        self.companion.param_groups[0].update(self._without_momentum(self.companion))
        return self.companion

    def set_eps(self, adam_eps: float | None) -> None:
        """Set `eps` of the companion's group; `None` leaves the optimizer's own."""
        if adam_eps is not None and self.companion is not None:
            self.companion.param_groups[0]["eps"] = adam_eps

    def _group(self, learning_rate: float) -> dict[str, Any]:
        self.learning_rate = learning_rate if self.rule is None else self.rule.learning_rate(learning_rate)
        return {"params": [self.tensor], "lr": self.learning_rate, "weight_decay": 0.0, "name": GROUP_NAME}

    def _without_momentum(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Options of λ's group that leave out the momentum `optimizer` has, where the rule wants none."""
        if self.rule is None or self.rule.momentum:
            return {}
        zeros = {"betas": lambda betas: (0.0,) * len(betas), "momentum": lambda _: 0.0, "nesterov": lambda _: False}
        return {name: zero(optimizer.defaults[name]) for name, zero in zeros.items() if optimizer.defaults.get(name)}

    def group_in(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """λ's parameter group: the companion's, else the one in `optimizer`, else `None`."""
        return self._group_of(optimizer if self.companion is None else self.companion)

    def follow_schedule(self, scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
        """
        Set λ's learning rate for this step: its base rate times the factor of the model's schedule.

        A schedule sets every group's rate in its own way (OneCycleLR gives all groups one peak, ReduceLROnPlateau one
        floor); set here, λ's is the same multiple of `lambda_learning_rate` under all of them, in either home.
        """
        group = self.group_in(optimizer)
        if group is not None:
            group["lr"] = self.learning_rate * schedule_factor(scheduler, self.model_learning_rate)

    def probe_scale(self, loss: Tensor) -> Tensor:
        """
        Let backward measure the factor that fp16 loss scaling puts on a loss: nobody unscales the companion's λ.

        To the loss an exact 0 is added, whose gradient in the probe is the scale, summed over micro-batches as dL/dλ.
        """
        if self._scale_probe is None:
            self._scale_probe = torch.zeros((), device=loss.device, requires_grad=True)
        if not torch.is_grad_enabled():  # evaluation has no backward pass
            return loss
        self._micro_batches += 1
        return loss + (self._scale_probe - self._scale_probe.detach())

    def reduce_gradient(self, accelerator: Accelerator) -> None:
        """
        Average dL/dλ over the processes: one collective of one scalar, once per optimizer step, outside backward.

        Losses are scaled for DDP's averaging, so that λ's gradient is averaged too. A process without a gradient
        joins with zero. It comes before any unscaling of fp16 gradients, so that a non-finite value reaches every
        process alike.
        """
        self._is_reduced = True
        if self.rule is not None:  # made of what every process has alike
            return
        grad = self.tensor.grad if self.tensor.grad is not None else torch.zeros_like(self.tensor)
        if self._scale_probe is not None and self._scale_probe.grad is not None:
            grad = grad / (self._scale_probe.grad / self._micro_batches)
            self._scale_probe.grad = None
        self._micro_batches = 0
        reduced: Any = accelerator.reduce(grad, reduction="mean")
        self.tensor.grad = reduced

    def prepare_step(self) -> None:
        """
        Clip the reduced gradient, or drop it when it is not finite: the optimizer then leaves λ alone.

        Raises:
            `RuntimeError`: nobody has reduced the gradient: a subclass replaced `training_step`.
        """
        if self._is_reduced and self.rule is not None:
            self.tensor.grad = self.rule.gradient(self.tensor)
        grad = self.tensor.grad
        if grad is None or not self._is_reduced:
            raise RuntimeError(
                "λ's gradient was not averaged over the processes: a subclass overrides training_step without calling "
                "super().training_step, which does it. Call it, or set lambda_learnable=False."
            )
        self._is_reduced = False
        self.last_grad = grad.item() if grad.numel() == 1 else grad.norm().item()
        if not math.isfinite(self.last_grad):
            self.tensor.grad = None
            self.skipped += 1
        elif self.max_grad_norm > 0:
            if grad.numel() == 1:
                grad.clamp_(-self.max_grad_norm, self.max_grad_norm)
            elif self.last_grad > self.max_grad_norm:
                grad.mul_(self.max_grad_norm / self.last_grad)

    def step_companion(self) -> None:
        """Step the companion, if there is one."""
        if self.companion is not None:
            self.companion.step()

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


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate or an engine."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def unwrap_scheduler(scheduler: Any) -> Any:
    """The torch scheduler inside the wrappers of accelerate or an engine."""
    while not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler) and hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    return scheduler


def has_scalar_eps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer` is Adam-like: it divides by a root of squared gradients plus a scalar `eps`."""
    return isinstance(optimizer.defaults.get("eps"), float)


def base_learning_rate(optimizer: Any, default: float) -> float:
    """
    The learning rate that schedules start from: the first group's initial one, or `default` for an engine's
    placeholder of an optimizer that it builds itself.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return default
    group = optimizer.param_groups[0]
    return float(group.get("initial_lr", group["lr"]))


def schedule_factor(scheduler: Any, base: float) -> float:
    """
    What a learning rate scheduler, maybe wrapped, multiplies the model's learning rate by at this step.

    Exact for a `LambdaLR`, which most of transformers' schedules are. Else the first group's learning rate over the
    schedule's peak, at most 1: `max_lr` where the schedule has one (OneCycleLR, CyclicLR), else `base`, the first
    group's rate before any schedule. 1 where the peak is 0.
    """
    scheduler = unwrap_scheduler(scheduler)
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return float(scheduler.lr_lambdas[0](scheduler.last_epoch))
    group = scheduler.optimizer.param_groups[0]
    peak = group.get("max_lr")  # OneCycleLR keeps it in the group, CyclicLR in the scheduler
    if peak is None:
        peak = getattr(scheduler, "max_lrs", [base])[0]
    return min(1.0, float(group["lr"]) / float(peak)) if peak else 1.0
