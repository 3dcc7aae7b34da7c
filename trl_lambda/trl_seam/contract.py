"""The TRL internals this package depends on, the check that they exist, and the set-ups that bypass them.

The loss is TRL's own. The weights go into ``inputs["advantages"]`` (and, inside the clip, into
``inputs["old_per_token_logps"]``) between the moment `_compute_loss` has the current log-probabilities and the moment
it reads those entries. TRL does not document that order. A test reads it off TRL's source for every tested version. At
run time `check_contract` verifies the names, and `WeightedInputs` that the weights were read.
"""

import functools
import inspect
import warnings
from typing import Any

import trl
from packaging.version import Version
from trl import GRPOTrainer

TESTED_VERSIONS = ("1.10.0", "1.13.0", "1.14.2", "1.16.0")

# Method -> the parameters that are passed or read by name.
METHODS = {
    "_generate_and_score_completions": ("inputs",),
    "_calculate_rewards": (),
    "_prepare_inputs": ("generation_batch",),
    "_get_per_token_logps_and_entropies": ("model", "batch_size", "compute_entropy"),
    "_compute_loss": ("model", "inputs"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "create_optimizer": (),
    "evaluation_loop": (),
    "_maybe_log_save_evaluate": (),
    "_save": ("output_dir", "state_dict"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_load_from_checkpoint": ("resume_from_checkpoint",),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_best_model": (),
    "_push_from_checkpoint": ("checkpoint_folder",),
}

# TRL's `loss_type` names a surrogate and a reduction at once. These have a reduction that a weight per response turns
# into any other one: a token mean, or (sapo) a mean of per-sequence means.
CONVERTIBLE_LOSS_TYPES = ("dapo", "cispo", "vespo", "sapo")
# Reductions that are a mean of per-sequence means.
SEQUENCE_MEAN_LOSS_TYPES = ("grpo", "sapo")
# Surrogates with the PPO clip, the only one that Eq. 9 of arXiv 2511.00066 puts the token weight into.
CLIPPED_LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo")
# Surrogates whose value is A·log π times a constant: only their gradient in the policy is meaningful.
SCORE_FUNCTION_LOSS_TYPES = ("cispo", "vespo")
# The reductions that a `_compute_loss` of another class may declare. f is the factor of a token mean, f·|o|/μ that of
# the others.
LOSS_REDUCTIONS = ("token_mean", "sequence_mean", "sequence")


@functools.cache
def contract_violations(trainer_class: type = GRPOTrainer) -> tuple[str, ...]:
    """The methods and parameters that the installed TRL's trainer lacks, a line each."""
    violations = []
    for name, parameters in METHODS.items():
        if getattr(trainer_class, name, None) is None:
            violations.append(f"{name} is gone")
            continue
        taken = inspect.signature(getattr(trainer_class, name)).parameters
        missing = set(parameters) - set(taken)
        if missing and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):  # as in TRL 1.14
            violations.append(f"{name} no longer takes {', '.join(sorted(missing))}")
    return tuple(violations)


def check_contract(trainer_class: type = GRPOTrainer, version: str = trl.__version__) -> None:
    """
    Raise a `RuntimeError` when the installed TRL has moved the internals this package uses. Warn when it is newer than
    the tested versions.
    """
    tested = f"tested with TRL {TESTED_VERSIONS[0]} to {TESTED_VERSIONS[-1]}"
    if violations := contract_violations(trainer_class):
        raise RuntimeError(
            f"trl_lambda cannot weight the loss of TRL {version}: {'; '.join(violations)}. It is {tested}: install a "
            "TRL of that range, or a newer trl-lambda."
        )
    if Version(version) > Version(TESTED_VERSIONS[-1]):
        warnings.warn(
            f"trl_lambda is {tested}, and TRL {version} is newer. The internals it uses exist there, so training goes "
            "on, but its tests have not been run on that version.",
            UserWarning,
            stacklevel=3,
        )


def refuse_unsupported(trainer_class: type, args: Any, config_class: type) -> None:
    """Raise a `ValueError` for what would bypass this package: another config, Unsloth."""
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


def refuse_other_losses(trainer_class: type, args: Any, *, weights_tokens: bool) -> None:
    """
    Raise a `ValueError` for a fused loss kernel, and for a `_compute_loss` other than TRL's whose class does not
    declare `loss_reduction`.

    f restates a reduction. On a mean of sequence means the weights of a token mean would be another loss.
    """
    # The first is TRL's to 1.13. With the second, in 1.14, the loss may run inside a wrapper, which copies the inputs.
    if args.use_liger_kernel and any(hasattr(GRPOTrainer, name) for name in ("compute_liger_loss", "_chunked_logps")):
        raise ValueError(
            "use_liger_kernel=True makes this TRL compute its loss in a fused kernel or a wrapper, where the weights "
            "may not reach it. Use use_liger_kernel=False, or TRL >= 1.16."
        )
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
