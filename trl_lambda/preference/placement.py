"""When λ's parameter group needs an optimizer of its own, and which one."""

import warnings
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from ..lambda_grpo_config import LambdaGRPOConfig
from .lambda_parameter import has_scalar_eps

# Optimizers that update parameters outside a plain `step()` over groups of tensors, by a part of their name.
_OWNING_OPTIMIZERS = ("galore", "lomo", "apollo", "layerwise", "schedule_free")


def engine_owns_optimizer(trainer: Trainer) -> bool:
    """Whether an engine shards or builds the trainer's optimizer, or its kind has no place for another group."""
    engine = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return engine or _is_owning(trainer.args)


def companion_class(
    args: LambdaGRPOConfig, model: Any, *, user_built: bool
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """
    Choose the companion's class and arguments: those of `args.optim`, so that λ steps as it would in the trainer's own
    optimizer; AdamW where that cannot be said of a single tensor or where the user built the optimizer.

    Args:
        args (`LambdaGRPOConfig`): The run's configuration.
        model (`torch.nn.Module`): The model, for transformers' own choice.
        user_built (`bool`): Whether the trainer's optimizer is not the one that `Trainer` builds.

    Returns:
        `tuple`: optimizer class and its keyword arguments, without `params`.
    """
    if user_built or _is_owning(args):
        return torch.optim.AdamW, {"betas": (args.adam_beta1, args.adam_beta2)}
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    return optimizer_class, options


def lambda_eps(args: LambdaGRPOConfig, optimizer: torch.optim.Optimizer) -> float | None:
    """
    `eps` for λ's group in `optimizer`: `lambda_adam_eps`, or `None` where there is no scalar one.

    Raises:
        `ValueError`: `lambda_adam_eps` was set and `optimizer` has no scalar `eps`.
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


def _is_owning(args: TrainingArguments) -> bool:
    return any(name in OptimizerNames(args.optim).value for name in _OWNING_OPTIMIZERS)
