"""
The generation side at two processes: the one gather of a generation batch, and what it is part of, timed in pairs.

    python -m recipes.studies.cost.two_processes                    # two processes on a CPU, gloo
    python -m recipes.studies.cost.two_processes --device cuda      # two GPUs, NCCL

Both processes build `GRPOTrainer` and the λ trainer on prepared completions. Timed are the gather of B lengths and the
reduction of one number by themselves, the scoring of a generation batch and an optimizer step; counted are the
calls that reach torch.distributed, of which one collective of the accelerator may make several.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recipes.studies.cost.measure.clock import seconds_of
from recipes.studies.cost.measure.rows import ROOT, append, bench_parser, row
from recipes.studies.cost.measure.stepping import WHOLE, Stepper, time_pairs, time_scoring
from recipes.studies.cost.measure.traffic import count_parts
from recipes.studies.cost.measure.trainers import BASELINE, build_trainer
from recipes.studies.cost.measure.workload import Workload

BENCH, ARM, PROCESSES = "generation", "lambda_grpo", 2
BATCHES = (64, 1024, 16384)


def timed(function: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Seconds of each call, after a few that warm up; the processes begin together."""
    for _ in range(3):
        function()
    return seconds_of(function, repeats, device, before=torch.distributed.barrier)


def measure_here(workload: Workload, pairs: int) -> list[dict[str, Any]]:
    """All rows, in each of the processes."""
    setting = f"{PROCESSES} processes, {workload.describe()}"
    with tempfile.TemporaryDirectory() as folder:
        base, ours = (build_trainer(arm, workload, folder, processes=PROCESSES) for arm in (BASELINE, ARM))
        accelerator, rows = ours.accelerator, []
        for batch in BATCHES:
            lengths = torch.ones(batch // PROCESSES, dtype=torch.int32, device=accelerator.device)
            taken = timed(lambda x=lengths: accelerator.gather(x), 10 * pairs, workload.device)
            rows.append(row(BENCH, ARM, f"{PROCESSES} processes", f"gather of {batch} lengths", taken, "s"))
        one = torch.ones(1, device=accelerator.device)
        taken = timed(lambda: accelerator.reduce(one, reduction="mean"), 10 * pairs, workload.device)
        rows.append(row(BENCH, ARM, f"{PROCESSES} processes", "reduction of one number", taken, "s"))

        scored = time_scoring(base, ours, pairs)
        rows.append(row(BENCH, BASELINE, setting, "scoring", [a * 1e3 for a, _ in scored], "ms"))
        rows.append(row(BENCH, ARM, setting, "scoring, difference", [(b - a) * 1e3 for a, b in scored], "ms"))
        parts = {BASELINE: count_parts(base), ARM: count_parts(ours)}
        for arm, counted in parts.items():
            for part, counts in counted.items():
                # Objects are gathered as bytes, which are as many as the texts happen to have.
                rows.append(
                    row(BENCH, arm, setting, f"{part}: calls of torch.distributed", len(counts.calls), "count")
                )
        stepped = time_pairs(Stepper(base), {ARM: Stepper(ours)}, pairs=pairs, steps=1)[ARM]
        rows.append(row(BENCH, ARM, setting, WHOLE, [b[WHOLE] / a[WHOLE] for a, b in stepped], "ratio"))
    return rows


def launch(workload: Workload, pairs: int, threads: int | None) -> list[dict[str, Any]]:
    """Run the processes and return the rows of the first."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
        command += ["-m", "recipes.studies.cost.two_processes", "--child", str(result), "--pairs", str(pairs)]
        command += ["--workload", json.dumps(dataclasses.asdict(workload))]
        command += ["--threads", str(threads)] if threads else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
        # A gloo process can finish its work and still abort on its way out: the result is what counts.
        if not result.exists():
            raise RuntimeError(f"no result of {PROCESSES} processes:\n{done.stderr[-4000:]}")
        return json.loads(result.read_text(encoding="utf-8"))


def main() -> None:
    """Measure and append the rows."""
    parser = bench_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workload", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.child:
        rows = measure_here(Workload(**json.loads(args.workload)), args.pairs)
        if torch.distributed.get_rank() == 0:
            args.child.with_suffix(".tmp").write_text(json.dumps(rows), encoding="utf-8")
            args.child.with_suffix(".tmp").rename(args.child)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        return
    workload = Workload(rows=4, group=4, completion=8) if args.smoke else Workload(rows=32)
    workload = dataclasses.replace(workload, device=args.device)
    append(args.out, launch(workload, 2 if args.smoke else args.pairs, args.threads), args.device)


if __name__ == "__main__":
    main()
