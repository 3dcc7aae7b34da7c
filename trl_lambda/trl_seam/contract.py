"""What this package relies on inside TRL, the versions it was checked on, and the check itself.

The loss is TRL's own. The weights go into ``inputs["advantages"]`` (and, inside the clip, into
``inputs["old_per_token_logps"]``) between the moment `_compute_loss` has the current log-probabilities and the moment
it reads those entries. TRL does not document that order. The contract's test reads it off TRL's source for every
tested version; at run time the names are checked here, and the guard (`WeightedInputs`) sees whether the weights were
read.
"""

import functools
import inspect
import warnings

import trl
from packaging.version import Version
from trl import GRPOTrainer

OLDEST_TESTED, NEWEST_TESTED = "1.10.0", "1.16.0"
TESTED_VERSIONS = ("1.10.0", "1.13.0", "1.14.2", "1.16.0")

# Method -> the parameters that are passed or read by name.
METHODS = {
    "_generate_and_score_completions": ("inputs",),
    "_prepare_inputs": ("generation_batch",),
    "_get_per_token_logps_and_entropies": ("model",),
    "_compute_loss": ("model", "inputs"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "create_optimizer": (),
    "evaluation_loop": (),
    "_maybe_log_save_evaluate": (),
    "_save": ("output_dir", "state_dict"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_best_model": (),
    "_push_from_checkpoint": ("checkpoint_folder",),
}
# Attributes that the trainer reads: TRL sets them in `__init__`.
ATTRIBUTES = ("_metrics", "_logs", "_buffered_inputs", "num_generations", "num_generations_eval", "loss_type")
LOGPS_METHOD = "_get_per_token_logps_and_entropies"
# Entries of `inputs` that `_compute_loss` must read after it has called LOGPS_METHOD.
READ_AFTER_LOGPS = ("advantages", "old_per_token_logps")
# Entries of the scored batch that the trainer reads.
SCORED_KEYS = ("completion_mask", "advantages", "tool_mask", "num_items_in_batch")


@functools.cache
def contract_violations(trainer_class: type = GRPOTrainer) -> tuple[str, ...]:
    """What this package relies on and the installed TRL's trainer has not: a line for each method or parameter."""
    violations = []
    for name, parameters in METHODS.items():
        method = getattr(trainer_class, name, None)
        if method is None:
            violations.append(f"{name} is gone")
            continue
        missing = set(parameters) - set(inspect.signature(method).parameters)
        if missing:
            violations.append(f"{name} no longer takes {', '.join(sorted(missing))}")
    return tuple(violations)


def check_contract(trainer_class: type = GRPOTrainer, version: str = trl.__version__) -> None:
    """
    Raise a `RuntimeError` when the installed TRL has moved what the weights go through; warn when it is newer than
    what was tested.
    """
    tested = f"tested with TRL {OLDEST_TESTED} to {NEWEST_TESTED}"
    violations = contract_violations(trainer_class)
    if violations:
        raise RuntimeError(
            f"trl_lambda cannot weight the loss of TRL {version}: {'; '.join(violations)}. It is {tested}: install a "
            "TRL of that range, or a newer trl-lambda."
        )
    if Version(version) > Version(NEWEST_TESTED):
        warnings.warn(
            f"trl_lambda is {tested}; TRL {version} is newer. What it relies on is in place there, so training goes "
            "on, but its tests have not been run on that version.",
            UserWarning,
            stacklevel=3,
        )


def liger_bypasses_loss(trainer_class: type = GRPOTrainer) -> bool:
    """Whether `use_liger_kernel=True` makes this TRL compute another loss than `_compute_loss` (TRL < 1.14 does)."""
    return hasattr(trainer_class, "compute_liger_loss")


def patched_by_unsloth(trainer_class: type) -> bool:
    """Whether Unsloth has put its own class, or its own `compute_loss`, under `trainer_class`."""
    modules = [f"{cls.__module__}.{cls.__qualname__}" for cls in trainer_class.__mro__]
    modules += [getattr(trainer_class, name).__module__ for name in ("compute_loss", "_compute_loss")]
    return any("unsloth" in module.lower() for module in modules)
