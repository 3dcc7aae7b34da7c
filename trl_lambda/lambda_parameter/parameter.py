"""λ itself, its optimizer parameter group, and its step in the one optimizer that holds it.

λ is not a parameter of the model. There it would enter the saved weights, the weight sync with vLLM and the joint
gradient clip, and PEFT would drop it. Outside the model this room reduces, clips, clears and saves it.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers.training_args import OptimizerNames

from .learning import Learning

Folder = str | os.PathLike[str]

# `eps` of λ's group in Adam-like optimizers. Far above the gradient, it makes the step proportional to the gradient
# (momentum SGD, the paper's setting). With Adam's own 1e-8 λ walks by its learning rate whatever the gradient.
ADAM_EPS = 1.0
# Bound of |dL/dλ|, apart from the model's clip: one odd batch moves λ by no more than its learning rate.
MAX_GRAD_NORM = 1.0
OPTIMIZER_FILE = "lambda_optimizer.pt"  # the state of λ's own optimizer, where it has one
# Optimizers that λ stays out of, by a part of their name: they update parameters outside a plain `step()` over groups
# of tensors, or (AdEMAMix) by several times what the gradient says.
_OWNING_OPTIMIZERS = ("ademamix", "galore", "lomo", "apollo", "layerwise", "schedule_free")


class LambdaParameter:
    """
    The length preference λ of arXiv 2510.06870: one scalar for the whole run, or one per feature.

    A step is `average_gradient` after the last backward pass, `clip_gradient`, the optimizer, `finish_step`.

    Args:
        init (`float`): λ at step 0, of the first feature; 0 for the others.
        learning ([`Learning`]): where λ's gradient comes from.
        bounds (`Sequence[float]`, *optional*): λ is projected into them after each step.
        device (`torch.device`): where the losses are computed.
        features (`Sequence[str]`): what λ weighs, one λ each.
    """

    def __init__(
        self,
        init: float,
        learning: Learning,
        *,
        bounds: Sequence[float] | None,
        device: torch.device,
        features: Sequence[str] = ("length",),
    ) -> None:
        # One element rather than 0-d (FSDP refuses 0-d parameters), float32 whatever the model's dtype.
        values = torch.tensor([init, *[0.0] * (len(features) - 1)], dtype=torch.float32, device=device)
        self.tensor = torch.nn.Parameter(values, requires_grad=learning.is_learnable)
        self.features = tuple(features)
        self.learning = learning
        self.bounds = bounds or (-math.inf, math.inf)
        # The gradient of each step before the clip, or its norm for several λ, since the last log.
        self.grads: list[float] = []
        self.skipped = 0  # steps without a finite gradient

    @property
    def values(self) -> list[float]:
        """λ of every feature."""
        return self.tensor.tolist()

    @property
    def for_loss(self) -> torch.Tensor:
        """λ as the loss takes it: a constant unless λ descends on the loss."""
        return self.tensor if self.learning.uses_loss else self.tensor.detach()

    def is_in(self, optimizer: Any) -> bool:
        """Whether λ is in a parameter group of `optimizer`, by identity."""
        # An engine's placeholder has no groups.
        return any(p is self.tensor for group in getattr(optimizer, "param_groups", ()) for p in group["params"])

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
        return {
            "params": [self.tensor],
            "name": "lambda",
            "lr": self.learning.learning_rate(learning_rate),
            "weight_decay": 0.0,
            **options,
        }

    def average_gradient(self, accelerator: Accelerator) -> None:
        """
        Average dL/dλ over the processes: one collective of one scalar, once per optimizer step, outside backward.

        Losses are scaled for DDP's averaging, so that λ's gradient is averaged too. A process without a gradient joins
        with zero. It precedes any unscaling of fp16 gradients, so that a non-finite value reaches every process alike.
        """
        if self.learning.uses_loss:
            grad = torch.zeros_like(self.tensor) if self.tensor.grad is None else self.tensor.grad
            self.tensor.grad = accelerator.reduce(grad, reduction="mean")  # type: ignore[assignment]

    def clip_gradient(self) -> None:
        """Take the gradient from `learning` where autograd made none. Clip it, or drop it when it is not finite."""
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
        self.tensor.clamp_(*self.bounds)

    @torch.no_grad()
    def load(self, values: Sequence[float], skipped: int) -> None:
        """Set λ in place and inside its bounds, so that optimizer state that refers to it stays attached."""
        self.tensor.copy_(torch.tensor(values, dtype=torch.float32)).clamp_(*self.bounds)
        self.skipped = skipped


class LambdaStep:
    """
    Puts a learnable λ into exactly one optimizer that steps: the trainer's own, or an AdamW of its own where an engine
    or the user owns the trainer's, or where the trainer's steps regardless of the gradient's size.

    Where λ steps, three things hold, or an error says which does not: the gradient was clear when the first
    micro-batch began, it was averaged over the processes, and one optimizer that steps holds λ. That the generation
    batch was observed is seen to at the loss.

    Args:
        parameter ([`LambdaParameter`]): λ.
        learning_rate (`float`): `lambda_learning_rate`.
        optim (`str`): TRL's option of that name.
        betas (`tuple[float, float]`): of λ's own AdamW.
        accelerator (`Accelerator`): averages over processes.
        is_sharded (`bool`): whether an engine shards or builds the trainer's optimizer.
    """

    def __init__(
        self,
        parameter: LambdaParameter,
        *,
        learning_rate: float,
        optim: Any,
        betas: tuple[float, float],
        accelerator: Accelerator,
        is_sharded: bool,
    ) -> None:
        self._parameter = parameter
        self._learning_rate = learning_rate
        self._accelerator = accelerator
        self._options = {
            "eps": 1e-8,
            "betas": betas,
            "fused": OptimizerNames(optim) == OptimizerNames.ADAMW_TORCH_FUSED,
        }
        self._has_no_place = is_sharded or any(name in OptimizerNames(optim).value for name in _OWNING_OPTIMIZERS)
        self._own: torch.optim.Optimizer | None = None
        self._is_new_window = True
        self._is_averaged = False

    def join(self, optimizer: Any) -> None:
        """Append λ's group to the optimizer that the trainer has just built, if that can take one."""
        if self._has_no_place or self._parameter.is_in(optimizer):
            return
        if isinstance(optimizer, torch.optim.SGD) or isinstance(optimizer.defaults.get("eps"), float):
            optimizer.add_param_group(self._parameter.group(self._learning_rate, optimizer.defaults))
            # Hooks of the optimizer rather than of the trainer: scripts remove callbacks.
            optimizer.register_step_pre_hook(lambda *_: self._before_step())
            optimizer.register_step_post_hook(lambda *_: self._after_step())

    def ensure_optimizer(self, optimizer: Any, scheduler: Any) -> str:
        """
        Give λ an optimizer of its own where the trainer's does not hold it, and say which holds it.

        Raises:
            `ValueError`: nothing tells λ's learning rate or, in fp16, its gradient's scale.
            `RuntimeError`: two optimizers hold λ.
        """
        while hasattr(optimizer, "optimizer"):  # inside the wrappers of accelerate or an engine
            optimizer = optimizer.optimizer
        while not isinstance(scheduler, LambdaLR | ReduceLROnPlateau) and hasattr(scheduler, "scheduler"):
            scheduler = scheduler.scheduler
        is_in_trainers = self._parameter.is_in(optimizer)
        if is_in_trainers and self._own is not None:
            raise RuntimeError("λ is in two optimizers: the trainer's was replaced. Build a new trainer instead.")
        if not is_in_trainers and self._own is None:
            if self._accelerator.mixed_precision == "fp16":
                raise ValueError("fp16=True leaves λ's gradient scaled in an optimizer of its own: use bf16=True.")
            self._own = torch.optim.AdamW([self._parameter.group(self._learning_rate, self._options)], **self._options)
        if isinstance(scheduler, LambdaLR):
            factor = float(scheduler.lr_lambdas[0](scheduler.last_epoch))
            # In the trainer's optimizer too: a resumed run's would have the rate that was saved.
            for group in (self._own or optimizer).param_groups:
                if group.get("name") == "lambda":
                    group["lr"] = factor * self._parameter.learning.learning_rate(self._learning_rate)
        elif not (is_in_trainers and isinstance(scheduler, ReduceLROnPlateau)):
            raise ValueError(
                f"λ's learning rate cannot follow {type(scheduler).__name__}. Use an lr_scheduler_type that makes a "
                "LambdaLR, or lambda_learnable=False."
            )
        return f"the trainer's {type(optimizer).__name__}" if is_in_trainers else "an AdamW of its own"

    def begin_training(self) -> None:
        """Forget an accumulation window that an exception cut short, with its gradient."""
        self._is_new_window, self._is_averaged = True, False

    def before_micro_batch(self, optimizer: Any, scheduler: Any) -> None:
        """Begin an accumulation window with a clear gradient. An engine may advance its schedule inside backward."""
        if not self._is_new_window:
            return
        if self._is_averaged:
            if not self._accelerator.optimizer_step_was_skipped:
                raise RuntimeError("λ was not stepped: its optimizer is not the one that the trainer steps.")
            self._parameter.skipped += 1  # by fp16's gradient scaler, before any hook
        self._is_new_window = self._is_averaged = False
        self._parameter.tensor.grad = None
        self.ensure_optimizer(optimizer, scheduler)

    def after_micro_batch(self) -> None:
        """Average λ's gradient after the last micro-batch of a window, and step λ's own optimizer if it has one."""
        if not self._accelerator.sync_gradients:
            return
        self._parameter.average_gradient(self._accelerator)
        self._is_new_window = self._is_averaged = True
        if self._own is not None:
            self._before_step()
            self._own.step()
            self._after_step()

    def _before_step(self) -> None:
        if not self._is_averaged:
            raise RuntimeError(
                "λ's gradient was not averaged over the processes: a subclass overrides training_step without calling "
                "super().training_step. Call it, or set lambda_learnable=False."
            )
        self._parameter.clip_gradient()

    def _after_step(self) -> None:
        self._is_averaged = False
        self._parameter.finish_step()

    def save_own_optimizer(self, folder: Folder) -> None:
        """Save the state of λ's own optimizer, if it has one. Call it on one process."""
        if self._own is not None:
            torch.save(self._own.state_dict(), Path(folder) / OPTIMIZER_FILE)

    def load_own_optimizer(self, folder: Folder) -> None:
        """Load the state of λ's own optimizer, if it has one."""
        if self._own is not None:
            state = torch.load(Path(folder) / OPTIMIZER_FILE, self._parameter.tensor.device, weights_only=True)
            self._own.load_state_dict(state)
