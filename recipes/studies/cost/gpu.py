"""
Everything that needs a GPU, in one command of about 45 minutes: `make gpu`, or

    python -m recipes.studies.cost.gpu  # all parts, rows to recipes/studies/cost/gpu.csv
    python -m recipes.studies.cost.gpu --parts correctness cost
    python -m recipes.studies.cost.gpu --tiny  # every line on a CPU, in minutes

Part a is correctness against a CPU (4 minutes), b cost beside `GRPOTrainer` at 1.5 billion parameters (8), c the LoRA
recipe end to end (5), d learning with the large arena (7), e SmolLM2-135M with LoRA (10), f the main arms of its study
with 1,024 tokens (10). Each row is on disk when it is measured, with hardware and versions. A part whose time is up
begins nothing new and says so in a row. A step that fails says how, the rest runs, and the exit status is 1.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from recipes.studies.cost.gpu_parts import correctness, cost, learning, recipe, smollm2
from recipes.studies.cost.gpu_parts.schedule import Context, Part, run_part
from recipes.studies.cost.measure.rows import ROOT
from recipes.studies.cost.table import GPU_RESULTS

TINY_RESULTS = ROOT / "runs" / "gpu_tiny.csv"
PARTS: dict[str, Part] = {
    "correctness": correctness.PART,
    "cost": cost.PART,
    "recipe": recipe.PART,
    "learning": learning.PART,
    "smollm2": smollm2.part(smollm2.SHORT),
    "smollm2_long": smollm2.part(smollm2.LONG),
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, help=f"CSV file to append to (default: {GPU_RESULTS.relative_to(ROOT)})")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, on a CPU")
    parser.add_argument("--minutes", type=float, help="time of each part, instead of its own")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no GPU is visible; --tiny runs every line on a CPU.")
    out = options.out or (TINY_RESULTS if options.tiny else GPU_RESULTS)
    out.parent.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts:
            part = PARTS[name] if options.minutes is None else replace(PARTS[name], minutes=options.minutes)
            context = Context("cpu" if options.tiny else "cuda", options.tiny, Path(folder), out.parent.resolve())
            failed += [f"{name}: {step}" for step in run_part(part, context, out)]
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
