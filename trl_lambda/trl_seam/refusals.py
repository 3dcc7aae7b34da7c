"""The set-ups that a trainer refuses before any model is loaded, because the weights could not be honoured."""

from typing import Any

from trl import GRPOTrainer

# The reductions that a `_compute_loss` of another class may declare; f then enters accordingly.
LOSS_REDUCTIONS = ("token_mean", "sequence_mean", "sequence")


def refuse_unsupported(trainer_class: type, args: Any, config_class: type) -> None:
    """Raise a `ValueError` for what would bypass the weights: another config, Unsloth, a fused loss kernel."""
    if not isinstance(args, config_class):
        name = config_class.__name__
        raise ValueError(
            f"args must be a {name} for {trainer_class.__name__}, got {type(args).__name__}: replace it by "
            f"trl_lambda.{name}, which takes the same arguments."
        )
    if any("unsloth" in f"{cls.__module__}.{cls.__qualname__}".lower() for cls in trainer_class.__mro__) or any(
        "unsloth" in getattr(trainer_class, name).__module__.lower() for name in ("compute_loss", "_compute_loss")
    ):
        raise ValueError(
            "Unsloth has replaced GRPOTrainer's loss, and its kernels give λ and the token weights no effect. Import "
            "trl_lambda in a process that does not import unsloth."
        )
    if args.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss"):
        raise ValueError(
            "use_liger_kernel=True makes this TRL compute its loss in a fused kernel that the weights do not reach. "
            "Use use_liger_kernel=False, or TRL >= 1.14."
        )


def refuse_other_losses(trainer_class: type, *, weights_tokens: bool) -> None:
    """
    Raise a `ValueError` for a `_compute_loss` other than TRL's whose class does not declare `loss_reduction`.

    f restates a reduction. On a mean of sequence means the weights of a token mean would be another loss.
    """
    declared = getattr(trainer_class, "loss_reduction", None)
    if declared is not None and declared not in LOSS_REDUCTIONS:
        raise ValueError(
            f"{trainer_class.__name__}.loss_reduction={declared!r} is unknown; accepted: {', '.join(LOSS_REDUCTIONS)}."
        )
    above = trainer_class.__mro__[: trainer_class.__mro__.index(GRPOTrainer)]
    others = [cls.__name__ for cls in above if "_compute_loss" in vars(cls)]
    if others and declared is None:
        raise ValueError(
            f"{others[0]} replaces GRPOTrainer's _compute_loss, and its reduction is not known. Declare it as a class "
            f"attribute of {trainer_class.__name__}: loss_reduction = 'token_mean' (a sum over tokens divided by the "
            "batch's token count), 'sequence_mean' (a mean of each sequence's token mean) or 'sequence' (a mean of "
            "one term per sequence). Or turn the weights off: length_weight=None, token_weight=None."
        )
    if declared == "sequence" and weights_tokens:
        raise ValueError(
            f"token_weight must be None: {trainer_class.__name__} declares loss_reduction='sequence', a loss with one "
            "term per sequence."
        )
