"""λ's part of a training step: the one optimizer that holds it, and the invariant that is checked where it steps."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers.training_args import OptimizerNames

from .lambda_file import Folder
from .parameter import LambdaParameter

OPTIMIZER_FILE = "lambda_optimizer.pt"  # the state of λ's own optimizer, where it has one
# Optimizers that update parameters outside a plain `step()` over groups of tensors, by a part of their name.
_OWNING_OPTIMIZERS = ("galore", "lomo", "apollo", "layerwise", "schedule_free")


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
        self._options = {"betas": betas, "fused": OptimizerNames(optim) == OptimizerNames.ADAMW_TORCH_FUSED}
        self._has_no_place = is_sharded or any(name in OptimizerNames(optim).value for name in _OWNING_OPTIMIZERS)
        self._own: torch.optim.Optimizer | None = None
        self._is_new_window = True
        self._is_averaged = False
        self._schedule_factor = 1.0

    def join(self, optimizer: Any) -> None:
        """Append λ's group to the optimizer that the trainer has just built, if that can take one."""
        if self._has_no_place or self._parameter.is_in(optimizer):
            return
        if isinstance(optimizer, torch.optim.SGD) or isinstance(optimizer.defaults.get("eps"), float):
            optimizer.add_param_group(self._parameter.group(self._learning_rate, optimizer.defaults))
            # Hooks of the optimizer rather than of the trainer: scripts remove callbacks.
            optimizer.register_step_pre_hook(lambda *_: self._before_step())
            optimizer.register_step_post_hook(lambda *_: self._after_step())

    def settle(self, optimizer: Any, scheduler: Any) -> str:
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
            group = self._parameter.group(self._learning_rate, {"eps": 1e-8, **self._options})
            self._own = torch.optim.AdamW([group], **self._options)
        if isinstance(scheduler, LambdaLR):
            self._schedule_factor = float(scheduler.lr_lambdas[0](scheduler.last_epoch))
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
        if self._is_averaged and not self._accelerator.optimizer_step_was_skipped:
            raise RuntimeError("λ was not stepped: the optimizer that holds it is not the one that the trainer steps.")
        self._is_new_window = self._is_averaged = False
        self._parameter.tensor.grad = None
        self.settle(optimizer, scheduler)

    def after_micro_batch(self) -> None:
        """Average λ's gradient after the last micro-batch of a window, and step λ's own optimizer if it has one."""
        if not self._accelerator.sync_gradients:
            return
        self._parameter.average_gradient(self._accelerator)
        self._is_new_window = self._is_averaged = True
        if self._own is not None:
            rate = self._parameter.learning.learning_rate(self._learning_rate)
            self._own.param_groups[0]["lr"] = self._schedule_factor * rate
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
            device = self._parameter.tensor.device
            self._own.load_state_dict(torch.load(Path(folder) / OPTIMIZER_FILE, device, weights_only=True))
