"""What a trainer refuses before any model is loaded: set-ups that its weights could not be honoured in."""

import inspect
from typing import Any

from trl import GRPOTrainer

from ..weights import LengthWeight, TokenWeight
from .contract import liger_bypasses_loss, patched_by_unsloth

# What a `_compute_loss` of another class may declare its reduction to be, and how f then enters.
LOSS_REDUCTIONS = ("token_mean", "sequence_mean", "sequence")


def refuse_unsupported(trainer_class: type, args: Any, config_class: type) -> None:
    """
    Refuse what would bypass the weights of the trainer being built: a `ValueError` names the option, its value and
    what to use instead.
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


def refuse_other_losses(trainer_class: type, f: LengthWeight | None, v: TokenWeight | None) -> None:
    """
    Refuse a loss that is not TRL's own while weights are on, unless its class says what its reduction is, and a
    `compute_loss` that leaves the weights out.

    f restates a reduction, and which one it restates has to be known: on a mean of sequence means the weights of a
    token mean would be another loss, in silence. A `_compute_loss` that calls `super()._compute_loss` is TRL's. The
    `ValueError` names the class and what it can declare.
    """
    declared = trainer_class.loss_reduction
    if declared is not None and declared not in LOSS_REDUCTIONS:
        raise ValueError(
            f"{trainer_class.__name__}.loss_reduction={declared!r} is unknown; accepted: {', '.join(LOSS_REDUCTIONS)}."
        )
    for cls in trainer_class.__mro__[: trainer_class.__mro__.index(GRPOTrainer)]:
        ours = cls.__module__.startswith("trl_lambda.")
        if "compute_loss" in vars(cls) and not ours and not _names(vars(cls)["compute_loss"], "compute_loss"):
            raise ValueError(
                f"{cls.__name__} replaces compute_loss, where the weights enter, without calling "
                f"super().compute_loss: aggregation={f and f.name!r} and "
                f"token_regulation={v and v.name!r} would have no effect. Call it, or turn both off (None)."
            )
        loss = vars(cls).get("_compute_loss")
        if loss is None or _names(loss, "_compute_loss"):
            continue
        if declared is None:
            raise ValueError(
                f"{cls.__name__} replaces GRPOTrainer's _compute_loss, and how its loss is reduced is not known: "
                f"aggregation={f and f.name!r} and token_regulation={v and v.name!r} could train "
                "something else. Either turn both off (None), or call super()._compute_loss in it, or declare the "
                f"reduction as a class attribute of {trainer_class.__name__}: loss_reduction = 'token_mean' (a sum "
                "over tokens divided by the batch's token count), 'sequence_mean' (a mean of each sequence's token "
                "mean) or 'sequence' (a mean of one term per sequence)."
            )
        if declared == "sequence" and v is not None:
            raise ValueError(
                f"token_regulation={v.name!r} weights tokens, and {cls.__name__} declares "
                "loss_reduction='sequence': its loss has one term per sequence. Use token_regulation=None."
            )


def _names(function: Any, method: str) -> bool:
    """Whether a function names `method`, as a call of super's does; read off the compiled code."""
    codes = [getattr(inspect.unwrap(function), "__code__", None)]
    while codes:
        code = codes.pop()
        if code is None:
            continue
        if method in code.co_names or method in code.co_freevars:
            return True
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    return False
