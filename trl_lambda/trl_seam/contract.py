"""The TRL internals this package depends on, the versions it was checked on, and the check that they exist.

The loss is TRL's own. The weights go into ``inputs["advantages"]`` (and, inside the clip, into
``inputs["old_per_token_logps"]``) between the moment `_compute_loss` has the current log-probabilities and the moment
it reads those entries. TRL does not document that order. A test reads it off TRL's source for every tested version. At
run time `check_contract` verifies the names, and `WeightedInputs` that the weights were read.
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
    "_calculate_rewards": (),
    "_prepare_inputs": ("generation_batch",),
    "_get_per_token_logps_and_entropies": ("model", "compute_entropy"),
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
# Attributes that the trainer reads: TRL sets them in `__init__`.
ATTRIBUTES = (
    *("_metrics", "_logs", "_buffered_inputs", "num_generations", "num_generations_eval", "num_iterations"),
    *("reward_weights", "loss_type", "importance_sampling_level", "epsilon_low", "epsilon_high"),
)
LOGPS_METHOD = "_get_per_token_logps_and_entropies"
# Entries of `inputs` that `_compute_loss` must read after it has called LOGPS_METHOD.
READ_AFTER_LOGPS = ("advantages", "old_per_token_logps")
# Entries of the scored batch that the trainer reads.
SCORED_KEYS = ("completion_mask", "advantages", "tool_mask", "num_items_in_batch")

# TRL's `loss_type` names a surrogate and a reduction at once. These have a reduction that a weight per response turns
# into any other one: a token mean, or (sapo) a mean of per-sequence means.
CONVERTIBLE_LOSS_TYPES = ("dapo", "cispo", "vespo", "sapo")
# Reductions that are a mean of per-sequence means.
SEQUENCE_MEAN_LOSS_TYPES = ("grpo", "sapo")
# Surrogates with the PPO clip, the only one that Eq. 9 of arXiv 2511.00066 puts the token weight into.
CLIPPED_LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo")
# Surrogates whose value is A·log π times a constant: only their gradient in the policy is meaningful.
SCORE_FUNCTION_LOSS_TYPES = ("cispo", "vespo")


@functools.cache
def contract_violations(trainer_class: type = GRPOTrainer) -> tuple[str, ...]:
    """The methods and parameters that the installed TRL's trainer lacks, a line each."""
    violations = []
    for name, parameters in METHODS.items():
        method = getattr(trainer_class, name, None)
        if method is None:
            violations.append(f"{name} is gone")
            continue
        taken = inspect.signature(method).parameters
        missing = set(parameters) - set(taken)
        if missing and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):  # as in TRL 1.14
            violations.append(f"{name} no longer takes {', '.join(sorted(missing))}")
    return tuple(violations)


def check_contract(trainer_class: type = GRPOTrainer, version: str = trl.__version__) -> None:
    """
    Raise a `RuntimeError` when the installed TRL has moved the internals this package uses. Warn when it is newer than
    the tested versions.
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
            f"trl_lambda is {tested}, and TRL {version} is newer. The internals it uses exist there, so training goes "
            "on, but its tests have not been run on that version.",
            UserWarning,
            stacklevel=3,
        )
