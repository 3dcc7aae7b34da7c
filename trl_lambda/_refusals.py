"""What a trainer refuses before any model is loaded: set-ups that its weights could not be honoured in."""

import inspect

from torch import nn
from trl import GRPOTrainer

from ._trl_contract import liger_bypasses_loss, patched_by_unsloth

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


def refuse_unsupported(trainer_class: type, args: object, config_class: type) -> None:
    """
    Refuse what would bypass the weights.

    Args:
        trainer_class (`type`): The trainer being built.
        args (`object`): What was passed as its configuration.
        config_class (`type`): The configuration class it needs.

    Raises:
        `ValueError`: naming the option, its value and what to use instead.
    """
    if not isinstance(args, config_class):
        name = config_class.__name__
        raise ValueError(
            f"args must be a {name} for {trainer_class.__name__}, got {type(args).__name__}: replace it by "
            f"trl_lambda.{name}, which takes the same arguments."
        )
    args.validate()
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
