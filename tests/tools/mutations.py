"""
Break the package on purpose, one line at a time, and see which test goes red.

    python tests/tools/mutations.py                 # prints the table, exits with 1 if a mutant survives
    python tests/tools/mutations.py --write         # also writes it to tests/MUTATIONS.md
    python tests/tools/mutations.py --write --only custom.py "the wrong sign"    # of files or names with these texts

Each mutant is a copy of the repository with one text replaced; the tests named beside it run there until the first
failure.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "tests" / "MUTATIONS.md"


@dataclass
class Mutant:
    """`old` becomes `new` in `trl_lambda/file`; one of `tests`, files or single tests of them, must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "lengths are not gathered over ranks",
        "trl_seam/generation_batch.py",
        "self._accelerator.gather(local)",
        "local",
        ("test_matrix.py::test_every_cut_gives_the_same_step",),
    ),
    Mutant(
        "every rank takes the first rank's rows",
        "trl_seam/generation_batch.py",
        "start = self._accelerator.process_index * rows",
        "start = 0",
        ("test_matrix.py::test_every_cut_gives_the_same_step",),
    ),
    Mutant(
        "dL/dλ is not reduced",
        "preference/lambda_parameter.py",
        'accelerator.reduce(grad, reduction="mean")',
        "grad",
        ("test_matrix.py::test_every_cut_gives_the_same_step",),
    ),
    Mutant(
        "dL/dλ is summed over ranks instead of averaged",
        "preference/lambda_parameter.py",
        'reduction="mean"',
        'reduction="sum"',
        ("test_matrix.py::test_every_cut_gives_the_same_step",),
    ),
    Mutant(
        "λ's gradient is not cleared",
        "preference/lambda_parameter.py",
        "        self.tensor.grad = None\n        if self.bounds",
        "        if self.bounds",
        ("test_trainer.py::test_gradient_is_cleared_between_steps",),
    ),
    Mutant(
        "λ is not restored on resume",
        "preference/checkpoint.py",
        'state.finish()\n        parameter.load(content["lambdas"] or [content["lambda"]], content["skipped"])',
        "state.finish()",
        ("test_trainer.py::test_lambda_and_its_optimizer_state_are_restored",),
    ),
    Mutant(
        "another f is resumed from",
        "preference/checkpoint.py",
        "if was != name or",
        "if",
        ("test_custom_weights.py::test_resuming_with_another_raises",),
    ),
    Mutant(
        "another v is resumed from",
        "preference/checkpoint.py",
        'if content.get("token_weight") != self._identity["token_weight"]:',
        "if False:",
        ("test_custom_weights.py::test_resuming_with_another_raises",),
    ),
    Mutant(
        "the companion's state is not restored on resume",
        "preference/optimizer_state.py",
        "companion.load_state_dict(found)",
        "pass",
        ("test_trainer.py::test_a_companion_is_restored_too",),
    ),
    Mutant(
        "λ's state is lost on its way into the main optimizer",
        "preference/optimizer_state.py",
        "slots[number] = slot",
        "pass",
        ("test_resume_pairs.py::test_learned_goes_on_in_either_home_to_the_last_bit",),
    ),
    Mutant(
        "a torn checkpoint is resumed from",
        "preference/whole_checkpoint.py",
        'return "missing"',
        "return None",
        ("test_resume.py::test_a_torn_first_checkpoint_has_none_before_it",),
    ),
    Mutant(
        "λ's files are written in place",
        "preference/files.py",
        'temporary = path.with_suffix(".json.tmp")',
        "temporary = path",
        ("test_resume.py::test_a_file_is_written_whole_or_not_at_all",),
    ),
    Mutant(
        "λ has the wrong sign",
        "weights/length_weight.py",
        "torch.expm1(lam * (log_h - log_top))",
        "torch.expm1(-lam * (log_h - log_top))",
        ("test_weights.py",),
    ),
    Mutant(
        "the softmax is of log g",
        "weights/length_weight.py",
        "(g_top * torch.expm1(lam * (log_h - log_top))).exp()",
        "(lam * (log_h - log_top)).exp()",
        ("test_weights.py",),
    ),
    Mutant(
        "rows without tokens count in μ and σ",
        "weights/length_weight.py",
        "count = has_tokens.sum(dim=1, keepdim=True).clamp(min=1)",
        "count = torch.full_like(has_tokens.sum(dim=1, keepdim=True), lengths.size(1))",
        ("test_weights.py",),
    ),
    Mutant(
        "a user's function sees rows without tokens as 0",
        "weights/weighing.py",
        'given["lengths"] = _fill_empty_rows(rows, has_tokens)',
        "pass",
        ("test_custom_weights.py::test_rows_without_tokens_are_shown_as_the_mean_and_dropped",),
    ),
    Mutant(
        "a user's function is called once for all prompts",
        "weights/weighing.py",
        'if scope == "prompt" and member.has_scope and "dim" not in names:',
        "if False:",
        ("test_custom_weights.py::test_a_users_power_is_the_packages_for_ten_steps",),
    ),
    Mutant(
        "what a user's function returns is not looked at",
        "weights/custom.py",
        "values[~(values.isfinite() & (values > 0))]",
        "values[:0]",
        ("test_custom_weights.py::test_what_a_length_weight_returns_is_checked",),
    ),
    Mutant(
        "a λ that autograd cannot reach stays in silence",
        "weights/custom.py",
        "if lam is not None and lam.requires_grad",
        "if False and lam.requires_grad",
        ("test_custom_weights.py::test_a_lambda_that_is_fixed_or_only_read_needs_no_gradient",),
    ),
    Mutant(
        "gradient flows through v",
        "weights/weighing.py",
        "logps = logps.detach().to(",
        "logps = logps.to(",
        ("test_weights.py",),
    ),
    Mutant(
        "tool tokens count as the policy's own",
        "trl_seam/generation_batch.py",
        "return mask if tool_mask is None else mask * tool_mask",
        "return mask",
        ("test_loss.py::test_tool_tokens_take_no_part",),
    ),
    Mutant(
        "v enters the ratio upside down",
        "trl_seam/weighted_inputs.py",
        "old - weights.log()",
        "old + weights.log()",
        ("test_loss.py::test_inside_the_clip",),
    ),
    Mutant(
        "sapo is left with a mean of sequence means",
        "trl_seam/response_weights.py",
        "sequence_mean_weights(f, batch.lengths)",
        "f",
        ("test_loss.py::test_every_surrogate_with_f_and_v",),
    ),
    Mutant(
        "the buffered micro-batch itself is weighted",
        "lambda_grpo_trainer.py",
        "        weighted.check_consumed(type(self))\n",
        "        weighted.check_consumed(type(self))\n"
        '        inputs["advantages"] = dict.__getitem__(weighted, "advantages")\n',
        ("test_loss.py::test_every_surrogate_with_f_and_v",),
    ),
    Mutant(
        "nobody checks that the weights were read",
        "lambda_grpo_trainer.py",
        "        weighted.check_consumed(type(self))\n",
        "",
        ("test_loss.py::test_a_loss_that_does_not_read_the_weights_raises",),
    ),
    Mutant(
        "a gradient that is not finite is used",
        "preference/lambda_parameter.py",
        "if not math.isfinite(self.last_grad):",
        "if False:",
        ("test_trainer.py::test_a_gradient_that_is_not_finite_is_skipped_and_counted",),
    ),
    Mutant(
        "λ is not projected into its bounds",
        "preference/lambda_parameter.py",
        "self.tensor.grad = None\n        if self.bounds is not None:",
        "self.tensor.grad = None\n        if False:",
        ("test_trainer.py::test_projected_to_its_bounds_after_each_step",),
    ),
    Mutant(
        "λ's group has the model's eps",
        "preference/lambda_parameter.py",
        'group if adam_eps is None else group | {"eps": adam_eps}',
        "group",
        ("test_trainer.py::test_groups_partition_all_trainable_parameters",),
    ),
    Mutant(
        "λ ignores the schedule",
        "preference/lambda_parameter.py",
        "self.learning_rate * schedule_factor(scheduler, self.model_learning_rate)",
        "self.learning_rate",
        ("test_trainer.py::test_lambda_follows_the_schedule_of_the_model",),
    ),
    Mutant(
        "evaluation counts in the fp16 loss scale",
        "preference/lambda_parameter.py",
        "if not torch.is_grad_enabled():",
        "if False:",
        ("test_faults.py::test_the_companion_takes_fp16_loss_scaling_out",),
    ),
    Mutant(
        "every call for log-probabilities weights the tokens",
        "lambda_grpo_trainer.py",
        "if self._loss_inputs is not None and (torch.is_grad_enabled() or not self.model.training):",
        "if self._loss_inputs is not None:",
        ("test_loss.py::test_tokens_are_weighted_once",),
    ),
    Mutant(
        "fields assigned after the configuration was built are not checked",
        "lambda_grpo_trainer.py",
        "args.validate(own_f, own_v)\n",
        "own_f or args.make_length_weight(), own_v or args.make_token_weight()\n",
        ("test_refusals.py::test_a_field_assigned_after_the_config_was_built",),
    ),
    Mutant(
        "fp16 loss scaling stays in the companion's gradient",
        "preference/lambda_parameter.py",
        "grad = grad / (self._scale_probe.grad / self._micro_batches)",
        "pass",
        ("test_faults.py::test_the_companion_takes_fp16_loss_scaling_out",),
    ),
    Mutant(
        "the mass of the loss leaves v out",
        "metrics/loss_metrics.py",
        "mass = mass * weights",
        "pass",
        ("test_trainer.py",),
    ),
    Mutant(
        "v is divided out of the clipped ratio",
        "metrics/loss_metrics.py",
        "log_ratio = log_ratio + weights.log()",
        "log_ratio = log_ratio - weights.log()",
        ("test_diagnostics.py::test_inside_the_clip_the_weight_is_in_the_ratio",),
    ),
    Mutant(
        "A1: no companion beside an optimizer of the user's",
        "preference/step.py",
        "if not parameter.in_optimizer(optimizer) and parameter.companion is None:",
        "if False:",
        ("test_other_trainers.py::test_lambda_is_trained_beside_an_optimizer_of_the_users",),
    ),
    Mutant(
        "A2: weights go into any loss",
        "trl_seam/refusals.py",
        'if loss is None or _names(loss, "_compute_loss"):',
        "if True:",
        ("test_other_trainers.py::test_gmpo_is_refused_while_weights_are_on",),
    ),
    Mutant(
        "A3: an epoch's end cuts the metrics",
        "lambda_grpo_trainer.py",
        "if due or self.control.should_training_stop:",
        "if True:",
        ("test_other_trainers.py::test_an_epoch_that_ends_within_a_logging_interval_changes_no_metric",),
    ),
    Mutant(
        "A4: lengths do not follow a subclass's mask",
        "lambda_grpo_trainer.py",
        "self._scoring.take(self._mode, self._buffered_inputs if self.model.training else [inputs])",
        "pass",
        ("test_other_trainers.py::test_lengths_follow_a_mask_that_a_subclass_changes",),
    ),
    Mutant(
        "A5: a schedule with a peak takes λ above its own rate",
        "preference/lambda_parameter.py",
        'peak = group.get("max_lr")',
        "peak = base",
        ("test_other_trainers.py::test_a_schedule_with_a_peak_takes_lambda_no_higher_than_its_own_rate",),
    ),
    Mutant(
        "A6: held-out data sets are read as one",
        "report/history.py",
        "for name in _data_sets(entry):",
        'for name in [""]:',
        ("test_report.py::test_held_out_data_sets_are_drawn_apart",),
    ),
    Mutant(
        "A7: a log ordered by a later callback has no metrics",
        "lambda_grpo_trainer.py",
        "if due or self.control.should_training_stop:",
        "if self.control.should_training_stop:",
        ("test_other_trainers.py::test_a_log_ordered_by_a_later_callback_has_the_metrics",),
    ),
    Mutant(
        "the target's controller is an integral one alone",
        "preference/target.py",
        "self.K_P * self._error + self._integral + move",
        "self._integral + move",
        ("test_target.py::test_the_controller_equals_plain_loops",),
    ),
    Mutant(
        "the integral winds up at a bound",
        "preference/target.py",
        "if (wanted - self._goal) * -self._sign * move <= 0:",
        "if True:",
        ("test_target.py::test_no_windup_at_a_bound",),
    ),
    Mutant(
        "the integral counts generation batches, not optimizer steps",
        "preference/target.py",
        "self.K_I * min(self._steps, 4.0)",
        "self.K_I * 4",
        ("test_target.py::test_the_controller_equals_plain_loops",),
    ),
    Mutant(
        "the integral goes back no faster than it came",
        "preference/target.py",
        "move *= self.UNWIND",
        "move *= 1",
        ("test_target.py::test_the_controller_equals_plain_loops",),
    ),
    Mutant(
        "the length is not smoothed",
        "preference/target.py",
        "SMOOTHING = 0.5",
        "SMOOTHING = 0.0",
        ("test_target.py::test_the_controller_equals_plain_loops",),
    ),
    Mutant(
        'side "negative" is steered as "positive"',
        "preference/target.py",
        '-1.0 if side == "negative" else 1.0',
        "1.0",
        ("test_target.py::test_the_controller_equals_plain_loops",),
    ),
    Mutant(
        "λ follows faster the more optimizer steps a generation batch has",
        "preference/target.py",
        " / max(self._steps, 1.0))",
        ")",
        ("test_target.py::test_lambda_follows_within_a_generation_batch",),
    ),
    Mutant(
        "λ's group keeps its momentum under a controller",
        "preference/target.py",
        "momentum = False",
        "momentum = True",
        ("test_target.py::test_momentum_is_left_out",),
    ),
    Mutant(
        "a companion keeps its momentum under a controller",
        "preference/lambda_parameter.py",
        "self.companion.param_groups[0].update(self._without_momentum(self.companion))",
        "pass",
        ("test_target.py::test_resumed_in_either_home_to_the_last_bit",),
    ),
    Mutant(
        "rows without tokens count in the mean length",
        "preference/target.py",
        "rows = float((lengths > 0).sum())",
        "rows = float(lengths.numel())",
        ("test_target.py::test_the_controller_equals_plain_loops",),
    ),
    Mutant(
        "the integral is not saved",
        "preference/target.py",
        '"_integral", ',
        "",
        ("test_target.py::test_its_state_goes_through_json",),
    ),
    Mutant(
        "λ at a bound is told of while the length is on its way",
        "preference/target.py",
        "far < 0.9 * self._stuck_at",
        "far < 0",
        ("test_target.py::test_it_says_once_that_the_target_is_out_of_reach",),
    ),
    Mutant(
        "noise of the reward is told of as a fall",
        "preference/target.py",
        "max(self.FALL * abs(self._best), 4 * error)",
        "0.02",
        ("test_target.py::test_it_says_once_that_the_reward_has_fallen",),
    ),
    Mutant(
        "a target that is changed on the way is not heard",
        "preference/target.py",
        "return self._asked * self._start / self.START if",
        "return 0.5 * self._start / self.START if",
        ("test_target.py::test_a_target_that_is_changed_on_the_way_is_the_target",),
    ),
    Mutant(
        "masked answers count for nothing in the length",
        "preference/step.py",
        "length if self._args.mask_truncated_completions else None",
        "None",
        ("test_target.py::test_masked_answers_have_been_sampled_all_the_same",),
    ),
    Mutant(
        "the regression pushes the wrong answers' side the wrong way",
        "preference/rules.py",
        'self._gain = -gain if side == "negative" else gain',
        "self._gain = gain",
        ("test_sides.py::test_on_every_side_the_rule_pushes_where_the_slope_points",),
    ),
    Mutant(
        "groups of equal rewards are a signal",
        "preference/rules.py",
        "signal = advantages_differ(advantages, has_tokens) & has_tokens",
        "signal = has_tokens",
        ("test_sides.py::test_groups_of_equal_rewards_are_no_signal",),
    ),
)


def mutated(mutant: Mutant, package: Path) -> str:
    """The mutant's file with its text replaced; a `SystemExit` where it is not there once."""
    text = (package / mutant.file).read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: the text to replace is {text.count(mutant.old)} times in {mutant.file}")
    return text.replace(mutant.old, mutant.new)


def run(mutant: Mutant) -> str | None:
    """The first test that fails on the mutant, without its parameters, or `None`."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "notebooks", "__pycache__", "*.egg-info")
        )
        (copy / "trl_lambda" / mutant.file).write_text(mutated(mutant, ROOT / "trl_lambda"), encoding="utf-8")
        tests = [f"tests/{name}" for name in mutant.tests]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
            cwd=copy, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(copy)},
        )  # fmt: skip
        failed = re.search(r"^(?:FAILED|ERROR) tests/([^\s\[]+)", done.stdout, re.MULTILINE)
        return failed[1] if failed else None


def table(caught: dict[str, str]) -> str:
    """The page from mutant -> the test that caught it, in the order of MUTANTS."""
    rows = [f"| {m.name} | `{m.file}` | {caught[m.name]} |" for m in MUTANTS if m.name in caught]
    head = "# Which test catches which mutation\n\nWritten by `make mutations`, which breaks one line at a time.\n\n"
    return head + "\n".join(["| mutation | file | caught by |", "|---|---|---|", *rows]) + "\n"


def last_results() -> dict[str, str]:
    """Mutant -> the test that caught it, as the page has it for mutants of the same file."""
    rows = re.findall(r"^\| (.+) \| `(.+)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    found = {(name, file): caught for name, file, caught in rows}
    return {m.name: found[m.name, m.file] for m in MUTANTS if (m.name, m.file) in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write tests/MUTATIONS.md")
    parser.add_argument("--only", nargs="+", help="mutants with one of these texts in their name or file")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.only or any(text in m.name or text in m.file for text in args.only)]
    for mutant in MUTANTS:
        mutated(mutant, ROOT / "trl_lambda")
    caught = last_results() if args.only else {}
    survivors = 0
    for number, mutant in enumerate(chosen, 1):
        test = run(mutant)
        survivors += test is None
        caught[mutant.name] = f"`{test}`" if test else "**nothing**"
        print(f"{number}/{len(chosen)} {mutant.name}: {test or 'SURVIVES'}", flush=True)
        if args.write:
            PAGE.write_text(table(caught), encoding="utf-8")
    print(f"mutations: {len(chosen) - survivors} of {len(chosen)} caught")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
