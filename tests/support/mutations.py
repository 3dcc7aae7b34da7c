"""
Break the seam and λ on purpose, one line at a time, and see whether the test file that should notice does.

    python tests/support/mutations.py [TEXT]    # all, or those with TEXT; all write tests/MUTATIONS.md

Each mutant is a copy of the repository with one text replaced. Its test file runs there until the first failure.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "tests" / "MUTATIONS.md"
TRAINER, SCORING = "lambda_grpo_trainer.py", "trl_seam/scoring.py"
PARAMETER, FILE = "lambda_parameter/parameter.py", "lambda_parameter/lambda_file.py"
SUBCLASSES, TOOLS = "trl_seam/test_subclasses.py", "trl_seam/test_tools_exact.py"
ARGUMENTS, LAMBDA_STEP, RESUME = "weights/test_arguments.py", "trainer/test_lambda_step.py", "trainer/test_resume.py"
# File of trl_lambda/, a text that is in it once, what stands there instead, and the test file that goes red.
MUTANTS = (
    (SCORING, "return mask if tool_mask is None else mask * tool_mask", "return mask", TOOLS),
    (SCORING, "start = self._accelerator.process_index * row_count", "start = 0", ARGUMENTS),
    (SCORING, " + self.calls * _CALL", "", SUBCLASSES),
    (SCORING, "if mask.size(0) != row_count:", "if False:", SUBCLASSES),
    (SCORING, "bool((numbers[1:] == numbers[:-1]).any())", "False", SUBCLASSES),
    (SCORING, "not bool((sizes == sizes[0]).all())", "False", SUBCLASSES),
    (SCORING, "gathered, group_size = gathered[order], _size", "gathered, group_size = gathered, _size", SUBCLASSES),
    (SCORING, 'micro_batches[0]["num_items_in_batch"].double()', "lengths.double().sum()", SUBCLASSES),
    ("trl_seam/weighted_inputs.py", '(reduction or own) == "token_mean"', 'own == "token_mean"', SUBCLASSES),
    ("trl_seam/weighted_inputs.py", 'self._pending.add("advantages")', "pass", SUBCLASSES),
    ("trl_seam/contract.py", "if others and declared is None:", "if False:", SUBCLASSES),
    (TRAINER, "= self.num_generations if", "= self.args.num_generations if", SUBCLASSES),
    (TRAINER, "weighted.check_consumed(type(self))", "pass", SUBCLASSES),
    (TRAINER, "self._lambda_step.begin_training()", "pass", LAMBDA_STEP),
    (TRAINER, "torch.is_grad_enabled() and not logps.requires_grad:", "False:", LAMBDA_STEP),
    (TRAINER, "self._lambda_file.load(str(self.state.best_model_checkpoint))", "pass", RESUME),
    (PARAMETER, "self._parameter.tensor.grad = None", "pass", LAMBDA_STEP),
    (PARAMETER, "optimizer.register_step_post_hook(lambda *_: self._after_step())", "pass", LAMBDA_STEP),
    (PARAMETER, 'isinstance(optimizer.defaults.get("eps"), float)', "True", LAMBDA_STEP),
    (PARAMETER, "factor * self._parameter", "self._parameter", LAMBDA_STEP),
    (PARAMETER, 'reduction="mean"', 'reduction="sum"', ARGUMENTS),
    (PARAMETER, "if not math.isfinite(norm):", "if False:", LAMBDA_STEP),
    (PARAMETER, '{"eps": ADAM_EPS}', "{}", LAMBDA_STEP),
    (FILE, "if saved != mine:", "if False:", RESUME),
    (FILE, 'if content["optimizer"] is None and', "if False and", RESUME),
)


def occurrences(mutant: tuple[str, str, str, str]) -> int:
    return (ROOT / "trl_lambda" / mutant[0]).read_text(encoding="utf-8").count(mutant[1])


def first_failure(mutant: tuple[str, str, str, str]) -> str | None:
    file, old, new, tests = mutant
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        left_out = shutil.ignore_patterns(".*", "runs", "notebooks", "results", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, copy, ignore=left_out)
        path = copy / "trl_lambda" / file
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{tests}"]
        environment = os.environ | {"PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment)
        failed = re.search(r"^(?:FAILED|ERROR) tests/\S+?::([^\s\[]+)", done.stdout, re.MULTILINE)
        return failed[1] if failed else None


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    if missing := [mutant for mutant in MUTANTS if occurrences(mutant) != 1]:
        raise SystemExit(f"not in their files once: {missing}")
    chosen = [mutant for mutant in MUTANTS if any(wanted in text for text in mutant)]
    rows = []
    for number, mutant in enumerate(chosen, 1):
        test = first_failure(mutant)
        file, old, new, tests = mutant
        rows.append(f"| `{file}` | `{old}` | `{new}` | {f'`{tests}::{test}`' if test else '**nothing**'} |")
        print(f"{number}/{len(chosen)} {rows[-1]}", flush=True)
    survivors = sum("**nothing**" in row for row in rows)
    if not wanted:
        head = "# Which test catches which mutation\n\nWritten by `make mutations`, which breaks one line at a time.\n"
        table = "\n".join([head, "| file | line | broken | caught by |", "|---|---|---|---|", *rows, ""])
        PAGE.write_text(table, encoding="utf-8")
    print(f"mutations: {len(chosen) - survivors} of {len(chosen)} caught")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
