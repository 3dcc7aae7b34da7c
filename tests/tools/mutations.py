"""
Break the package on purpose, one line at a time, and see which test goes red.

    python tests/tools/mutations.py                 # prints the table, exits with 1 if a mutant survives
    python tests/tools/mutations.py --write         # also writes it to tests/MUTATIONS.md

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


@dataclass
class Mutant:
    """`old` becomes `new` in `trl_lambda/file`; one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "lengths are not gathered over ranks",
        "lambda_grpo_trainer.py",
        "everywhere = self.accelerator.gather(torch.stack([lengths, bits], dim=1))",
        "everywhere = torch.stack([lengths, bits], dim=1)",
        ("test_matrix.py",),
    ),
    Mutant(
        "every rank takes the first rank's rows",
        "lambda_grpo_trainer.py",
        "start = self.accelerator.process_index * rows",
        "start = 0",
        ("test_matrix.py",),
    ),
    Mutant(
        "dL/dλ is not reduced",
        "lambda_parameter.py",
        'accelerator.reduce(grad, reduction="mean")',
        "grad",
        ("test_matrix.py",),
    ),
    Mutant(
        "dL/dλ is summed over ranks instead of averaged",
        "lambda_parameter.py",
        'reduction="mean"',
        'reduction="sum"',
        ("test_matrix.py",),
    ),
    Mutant(
        "λ's gradient is not cleared",
        "lambda_parameter.py",
        "        self.tensor.grad = None\n        if self.bounds",
        "        if self.bounds",
        ("test_trainer.py",),
    ),
    Mutant(
        "λ is not restored on resume",
        "_lambda_checkpoint.py",
        'checkpoint)\n        self._lambda.load(content["lambda"], content["skipped"])',
        "checkpoint)",
        ("test_trainer.py",),
    ),
    Mutant(
        "the companion's state is not restored on resume",
        "_lambda_checkpoint.py",
        "self._lambda.companion.load_state_dict(read_companion_state(checkpoint))",
        "read_companion_state(checkpoint)",
        ("test_trainer.py",),
    ),
    Mutant(
        "λ has the wrong sign",
        "weights.py",
        "torch.expm1(lam * (log_h - log_top))",
        "torch.expm1(-lam * (log_h - log_top))",
        ("test_weights.py",),
    ),
    Mutant(
        "the softmax is of log g",
        "weights.py",
        "(g_top * torch.expm1(lam * (log_h - log_top))).exp()",
        "(lam * (log_h - log_top)).exp()",
        ("test_weights.py",),
    ),
    Mutant(
        "rows without tokens count in μ and σ",
        "weights.py",
        "count = has_tokens.sum(dim=1, keepdim=True).clamp(min=1)",
        "count = torch.full_like(has_tokens.sum(dim=1, keepdim=True), rows.size(1))",
        ("test_weights.py",),
    ),
    Mutant(
        "gradient flows through v",
        "weights.py",
        "logps = logps.detach().to(",
        "logps = logps.to(",
        ("test_weights.py",),
    ),
    Mutant(
        "tool tokens count as the policy's own",
        "_weighted_inputs.py",
        "return mask if tool_mask is None else mask * tool_mask",
        "return mask",
        ("test_loss.py",),
    ),
    Mutant(
        "v enters the ratio upside down",
        "_weighted_inputs.py",
        "old - weights.log()",
        "old + weights.log()",
        ("test_loss.py",),
    ),
    Mutant(
        "sapo is left with a mean of sequence means",
        "lambda_grpo_trainer.py",
        "weights = sequence_mean_weights(weights, lengths)",
        "pass",
        ("test_loss.py",),
    ),
    Mutant(
        "the buffered micro-batch itself is weighted",
        "lambda_grpo_trainer.py",
        "        weighted.check_consumed()\n",
        '        weighted.check_consumed()\n        inputs["advantages"] = dict.__getitem__(weighted, "advantages")\n',
        ("test_loss.py",),
    ),
    Mutant(
        "nobody checks that the weights were read",
        "lambda_grpo_trainer.py",
        "        weighted.check_consumed()\n",
        "",
        ("test_loss.py",),
    ),
    Mutant(
        "a gradient that is not finite is used",
        "lambda_parameter.py",
        "if not math.isfinite(self.last_grad):",
        "if False:",
        ("test_trainer.py",),
    ),
    Mutant(
        "λ is not projected into its bounds",
        "lambda_parameter.py",
        "self.tensor.clamp_(*self.bounds)",
        "pass",
        ("test_trainer.py",),
    ),
    Mutant(
        "λ's group has the model's eps",
        "lambda_parameter.py",
        'group if adam_eps is None else group | {"eps": adam_eps}',
        "group",
        ("test_trainer.py",),
    ),
    Mutant(
        "the companion ignores the schedule",
        "lambda_parameter.py",
        "self._learning_rate * self.companion_factor",
        "self._learning_rate",
        ("test_trainer.py",),
    ),
    Mutant(
        "evaluation counts in the fp16 loss scale",
        "lambda_parameter.py",
        "if not torch.is_grad_enabled():",
        "if False:",
        ("test_faults.py",),
    ),
    Mutant(
        "every call for log-probabilities weights the tokens",
        "lambda_grpo_trainer.py",
        "if self._loss_inputs is not None and (torch.is_grad_enabled() or not self.model.training):",
        "if self._loss_inputs is not None:",
        ("test_loss.py",),
    ),
    Mutant(
        "fields assigned after the configuration was built are not checked",
        "_refusals.py",
        "    args.validate()\n",
        "",
        ("test_refusals.py",),
    ),
    Mutant(
        "fp16 loss scaling stays in the companion's gradient",
        "lambda_parameter.py",
        "grad = grad / (self._scale_probe.grad / self._micro_batches)",
        "pass",
        ("test_faults.py",),
    ),
)


def run(mutant: Mutant) -> str | None:
    """The first test that fails on the mutant, or `None`."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "notebooks", "__pycache__", "*.egg-info")
        )
        path = copy / "trl_lambda" / mutant.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            raise SystemExit(f"{mutant.name}: the text to replace is {text.count(mutant.old)} times in {mutant.file}")
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        tests = [f"tests/{name}" for name in mutant.tests]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
            cwd=copy, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(copy)},
        )  # fmt: skip
        failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
        return failed[1] if failed else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write tests/MUTATIONS.md")
    args = parser.parse_args()
    lines = ["| mutation | file | caught by |", "|---|---|---|"]
    survivors = 0
    for number, mutant in enumerate(MUTANTS, 1):
        caught = run(mutant)
        survivors += caught is None
        lines.append(f"| {mutant.name} | `{mutant.file}` | {f'`{caught}`' if caught else '**nothing**'} |")
        print(f"{number}/{len(MUTANTS)} {mutant.name}: {caught or 'SURVIVES'}", flush=True)
    if args.write:
        head = (
            "# Which test catches which mutation\n\nWritten by `make mutations`, which breaks one line at a time.\n\n"
        )
        (ROOT / "tests" / "MUTATIONS.md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"mutations: {len(MUTANTS) - survivors} of {len(MUTANTS)} caught")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
