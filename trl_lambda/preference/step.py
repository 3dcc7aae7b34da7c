"""λ's part of a training step: which optimizer holds it, and what is done with it before and after that steps."""

import math
import warnings
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from ..lambda_grpo_config import LambdaGRPOConfig
from ..trl_seam.generation_batch import GenerationBatch
from ..weights import LengthWeight
from .lambda_parameter import LambdaParameter, base_learning_rate, has_scalar_eps, unwrap_optimizer
from .making import bounds_of, make_rule

# Optimizers that update parameters outside a plain `step()` over groups of tensors, by a part of their name.
_OWNING_OPTIMIZERS = ("galore", "lomo", "apollo", "layerwise", "schedule_free")


def make_lambda(
    args: LambdaGRPOConfig, f: LengthWeight | None, *, device: torch.device, num_iterations: int
) -> LambdaParameter | None:
    """λ as the configuration asks for it, with its rule; `None` where f has none."""
    if f is None or not f.has_lambda:
        return None
    return LambdaParameter(
        args.lambda_init,
        learnable=args.lambda_learnable,
        bounds=bounds_of(args),
        max_grad_norm=args.lambda_max_grad_norm,
        device=device,
        features=f.lambda_features,
        rule=make_rule(args, f, num_iterations=num_iterations),
    )


class LambdaStep(TrainerCallback):
    """
    Puts λ, if it learns, into exactly one optimizer, and steps it: the trainer's own, or a companion where an engine
    or the user owns that one.

    Args:
        parameter ([`LambdaParameter`], *optional*): λ, if f has one.
        args ([`LambdaGRPOConfig`]): The run's configuration.
        accelerator (`Accelerator`): reduces over processes, unscales fp16 gradients and knows of skipped steps.
        metrics (`Mapping[str, MutableMapping[str, list[float]]]`): TRL's; `lambda/grad` and `lambda/skipped`.
        is_sharded (`bool`): whether an engine shards or builds the trainer's optimizer.
    """

    def __init__(
        self,
        parameter: LambdaParameter | None,
        args: LambdaGRPOConfig,
        accelerator: Accelerator,
        metrics: Mapping[str, MutableMapping[str, list[float]]],
        *,
        is_sharded: bool,
    ) -> None:
        self._parameter = parameter if parameter is not None and parameter.learnable else None
        self._args = args
        self._accelerator = accelerator
        self._metrics = metrics["train"]
        optim = OptimizerNames(args.optim).value
        self._steps_elsewhere = any(name in optim for name in _OWNING_OPTIMIZERS)
        # Whether the trainer's optimizer has no place for another group.
        self.is_owned = is_sharded or self._steps_elsewhere
        self._is_trainers = False  # the optimizer, and not one that the user built
        self._seen: object = None

    def observe(self, batch: GenerationBatch) -> None:
        """Show λ's rule a generation batch of training that TRL has just scored, and what TRL has logged of it."""
        if self._parameter is None or self._parameter.rule is None:
            return
        names = ("reward", "completions/mean_length")
        reward, length = ((self._metrics.get(name) or [math.nan])[-1] for name in names)
        # Masked answers have no tokens in the batch, but were sampled.
        self._parameter.rule.observe(batch, reward, length if self._args.mask_truncated_completions else None)

    def join(self, optimizer: torch.optim.Optimizer, *, is_new: bool) -> None:
        """Append λ's group to the optimizer that the trainer has built, if that can take one."""
        self._is_trainers |= is_new
        parameter = self._parameter
        if parameter is None or not self._is_trainers or self.is_owned or parameter.in_optimizer(optimizer):
            return
        eps = lambda_eps(self._args, optimizer)
        parameter.add_group(optimizer, learning_rate=self._args.lambda_learning_rate, adam_eps=eps)

    def settle(self, wrapped: Any, model: Any) -> None:
        """
        Give λ a companion where the trainer's optimizer, as an engine or the user built it, does not hold it.

        Raises:
            `RuntimeError`: two optimizers would step λ.
        """
        parameter, args, optimizer = self._parameter, self._args, unwrap_optimizer(wrapped)
        if parameter is None:
            return
        if optimizer is not self._seen:  # before its first step: a plateau schedule keeps no initial rate
            self._seen = optimizer
            parameter.model_learning_rate = base_learning_rate(optimizer, args.learning_rate)
        if not parameter.in_optimizer(optimizer) and parameter.companion is None:
            optimizer_class, options = self._companion_class(model)
            companion = parameter.make_companion(optimizer_class, options, learning_rate=args.lambda_learning_rate)
            parameter.set_eps(lambda_eps(args, companion))
        if parameter.in_optimizer(optimizer) and parameter.companion is not None:
            raise RuntimeError(
                "λ is in the trainer's optimizer and has a companion of its own: two optimizers would step it. The "
                "optimizer was replaced between two calls of train(): build a new trainer instead."
            )

    def _companion_class(self, model: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """
        The companion's class and arguments: those of `args.optim`, so that λ steps as it would in the trainer's own
        optimizer; AdamW where that cannot be said of a single tensor or where the user built the optimizer.
        """
        if self._steps_elsewhere or not (self._is_trainers and self.is_owned):
            return torch.optim.AdamW, {"betas": (self._args.adam_beta1, self._args.adam_beta2)}
        return Trainer.get_optimizer_cls_and_kwargs(self._args, model)

    def before_loss(self, optimizer: Any, scheduler: Any, model: Any) -> None:
        """Set λ's learning rate. An engine may advance the schedule inside backward, so that it is done before."""
        self.settle(optimizer, model)
        if self._parameter is not None:
            self._parameter.follow_schedule(scheduler, unwrap_optimizer(optimizer))

    def after_loss(self, loss: Tensor) -> Tensor:
        """The loss, with a probe of fp16's loss scale where nobody takes that out of λ's gradient."""
        parameter = self._parameter
        if parameter is None or parameter.companion is None or self._accelerator.mixed_precision != "fp16":
            return loss
        return parameter.probe_scale(loss)

    def after_backward(self) -> None:
        """Average λ's gradient over the processes, after the last micro-batch of an optimizer step."""
        if self._parameter is not None and self._accelerator.sync_gradients:
            self._parameter.reduce_gradient(self._accelerator)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._parameter is not None:
            # Clipping the model's gradients unscales fp16 gradients, λ's with them; without a clip nobody has yet.
            if self._parameter.companion is None and (args.max_grad_norm is None or args.max_grad_norm <= 0):
                self._accelerator.unscale_gradients()
            self._parameter.prepare_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (parameter := self._parameter) is None:
            return
        if not self._accelerator.optimizer_step_was_skipped:
            parameter.step_companion()
        parameter.finish_step()
        self._metrics["lambda/grad"].append(parameter.last_grad if math.isfinite(parameter.last_grad) else math.nan)
        # A count: the last one is meant, not TRL's mean over the logging interval.
        self._metrics["lambda/skipped"] = [float(parameter.skipped)]


def lambda_eps(args: LambdaGRPOConfig, optimizer: torch.optim.Optimizer) -> float | None:
    """
    `lambda_adam_eps` for λ's group in `optimizer`; `None` where that has no scalar `eps`, or a `ValueError` where one
    was asked for.
    """
    if has_scalar_eps(optimizer):
        return args.lambda_adam_eps
    if args.lambda_adam_eps != args.__dataclass_fields__["lambda_adam_eps"].default:
        raise ValueError(
            f"lambda_adam_eps={args.lambda_adam_eps} has no effect: {type(optimizer).__name__} has no scalar eps. "
            "Leave it at its default."
        )
    if not isinstance(optimizer, torch.optim.SGD):
        warnings.warn(
            f"{type(optimizer).__name__} may normalise its steps and has no scalar eps to prevent it: λ can then move "
            f"by about lambda_learning_rate={args.lambda_learning_rate} in each step, whatever its gradient. Use an "
            "Adam-like optim or SGD, or a smaller lambda_learning_rate.",
            UserWarning,
            stacklevel=2,
        )
    return None
