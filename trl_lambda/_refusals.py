"""What a trainer refuses before any model is loaded: set-ups that its weights could not be honoured in."""

import inspect

from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers.training_args import OptimizerNames
from trl import GRPOTrainer

from ._trl_contract import liger_bypasses_loss, patched_by_unsloth
from .lambda_grpo_config import LambdaGRPOConfig

# What TRL passes to every reward function beside the dataset's columns.
_REWARD_ARGUMENTS = {
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
}
# Optimizers that update parameters outside a plain `step()` over groups of tensors, by a part of their name.
_OWNING_OPTIMIZERS = ("galore", "lomo", "apollo", "layerwise", "schedule_free")


def refuse_unsupported(trainer_class: type, args: object, config_class: type, optimizers: tuple) -> None:
    """
    Refuse what would bypass the weights, or has no place for λ's parameter group.

    Args:
        trainer_class (`type`): The trainer being built.
        args (`object`): What was passed as its configuration.
        config_class (`type`): The configuration class it needs.
        optimizers (`tuple`): As passed to the trainer, (optimizer, scheduler).

    Raises:
        `ValueError`: naming the option, its value and what to use instead.
    """
    if not isinstance(args, config_class):
        name = config_class.__name__
        raise ValueError(
            f"args must be a {name} for {trainer_class.__name__}, got {type(args).__name__}: replace it by "
            f"trl_lambda.{name}, which takes the same arguments."
        )
    if patched_by_unsloth(trainer_class):
        raise ValueError(
            "Unsloth has replaced GRPOTrainer's loss, and its kernels give λ and the token weights no effect. Import "
            "trl_lambda in a process that does not import unsloth."
        )
    if args.use_liger_kernel and liger_bypasses_loss(GRPOTrainer):
        raise ValueError(
            "use_liger_kernel=True makes this TRL compute its loss in a fused kernel that the weights do not reach. "
            "Use use_liger_kernel=False, or TRL >= 1.14."
        )
    if args.has_lambda and args.lambda_learnable:
        _refuse_optimizer(args, optimizers)


def _refuse_optimizer(args: LambdaGRPOConfig, optimizers: tuple) -> None:
    """A learnable λ needs an optimizer that takes another parameter group."""
    instead = "Use lambda_learnable=False, or"
    if optimizers[0] is not None:
        raise ValueError(
            "optimizers=(optimizer, ...) was passed: λ's parameter group can only join an optimizer that the trainer "
            f"builds. {instead} choose the optimizer by args.optim."
        )
    optim = OptimizerNames(args.optim).value
    if any(name in optim for name in _OWNING_OPTIMIZERS):
        raise ValueError(
            f"optim={optim!r} has no place for λ's parameter group. {instead} another optim, such as "
            "'adamw_torch'."
        )
    refuse_engine(
        deepspeed=args.deepspeed_plugin is not None,
        fsdp=bool(args.fsdp_plugin_args) or parse_flag_from_env("ACCELERATE_USE_FSDP"),
    )


def refuse_engine(*, deepspeed: bool, fsdp: bool) -> None:
    """
    A learnable λ cannot join an optimizer that an engine owns or shards.

    Raises:
        `ValueError`: either engine is on.
    """
    if deepspeed or fsdp:
        raise ValueError(
            f"{'DeepSpeed' if deepspeed else 'FSDP'} owns the optimizer, which has no place for λ's parameter group. "
            "Use lambda_learnable=False, or a single process or DDP."
        )


def check_columns(reward_funcs, dataset) -> None:
    """Raise a `ValueError` when the dataset lacks `prompt` or a column that a reward function cannot do without."""
    columns = getattr(dataset, "column_names", None)
    if columns is None:  # no dataset, or a stream that does not say
        return
    if "prompt" not in columns:
        raise ValueError(f"train_dataset has no 'prompt' column; its columns are {sorted(columns)}.")
    for function in reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]:
        if not callable(function) or isinstance(function, nn.Module):
            continue
        for parameter in inspect.signature(function).parameters.values():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if not named or parameter.default is not parameter.empty or parameter.name in _REWARD_ARGUMENTS:
                continue
            if parameter.name not in columns:
                name = getattr(function, "__name__", type(function).__name__)
                raise ValueError(
                    f"train_dataset has no {parameter.name!r} column, which the reward function {name} requires; its "
                    f"columns are {sorted(columns)}."
                )
