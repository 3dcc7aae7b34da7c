"""
What λ-GRPO and TR-GRPO cost beside `GRPOTrainer(loss_type="dapo")`: time by phase, memory, traffic, in one run.

    python -m recipes.studies.cost.overhead  # the tiny model on a CPU
    python -m recipes.studies.cost.overhead --logging-steps 10  # with GRPOConfig's own logging
    python -m recipes.studies.cost.overhead --shape "hidden 24" --rows 48 --completion 96 --pairs 60 --threads 1
    python -m recipes.studies.cost.overhead --shape qwen2.5-1.5b --device cuda  # bf16, 8 x 1024 tokens, one GPU
    python -m recipes.studies.cost.overhead --shape qwen2.5-1.5b --device cuda --lora
    python -m recipes.studies.cost.overhead --shape qwen2.5-7b --device cuda --share-model

All trainers live in one process, hold the same weights and the same prepared completions, and step in turns with the
baseline; the ratios are of neighbouring steps. `GRPOTrainer again` is the baseline a second time: its distance from 1
is the machine's scatter. Nothing is sampled: generation would only hide the rest.
"""

import argparse
import dataclasses
import gc
import tempfile
from typing import Any

import torch

from recipes.studies.cost.measure.memory import memory_rows
from recipes.studies.cost.measure.rows import append, bench_parser, row
from recipes.studies.cost.measure.stepping import (
    CPU_TIME,
    LOSS,
    PHASES,
    REST,
    WHOLE,
    Pairs,
    Stepper,
    time_pairs,
    time_scoring,
)
from recipes.studies.cost.measure.traffic import traffic_rows
from recipes.studies.cost.measure.trainers import ARMS, BASELINE, build_trainer, measured_arms
from recipes.studies.cost.measure.workload import MODELS, Workload

BENCH = "overhead"
# What a tiny model on a CPU trains (the demo's batch), and what the shapes of real ones do.
_TINY = Workload()
_REAL = Workload(rows=8, completion=1024, dtype="bfloat16", checkpointing=True)
_SMOKE = Workload(rows=4, group=4, completion=8)
_CUDA_STEPS = 4


def make_trainers(workload: Workload, arms: list[str], folder: str, share_model: bool) -> dict[str, Any]:
    """All trainers in one process; with `share_model`, on one set of weights and optimizer moments."""
    trainers = {}
    for arm in arms:
        first = next(iter(trainers.values()), None)
        model = first.model if share_model and first is not None else None
        trainer = build_trainer(arm, workload, folder, model=model)
        if first is not None:
            _check_same_inputs(first, trainer)
            if share_model:
                _share_moments(first, trainer)
        trainers[arm] = trainer
    return trainers


def _check_same_inputs(first: Any, second: Any) -> None:
    pairs = zip(first._buffered_inputs, second._buffered_inputs, strict=True)
    if not all(torch.equal(a["completion_ids"], b["completion_ids"]) for a, b in pairs):
        raise RuntimeError("The trainers hold different completions: what they cost cannot be compared.")


def _share_moments(first: Any, second: Any) -> None:
    """Let the second optimizer update the first's moments, so that only one set is held."""
    theirs, ours = first.optimizer.optimizer.state, second.optimizer.optimizer.state
    for parameter in theirs:
        ours[parameter] = theirs[parameter]


def time_rows(trainers: dict[str, Any], workload: Workload, pairs: int) -> list[dict[str, Any]]:
    """Ratios of each arm's phases and whole step to the baseline's, and the baseline's own milliseconds."""
    steppers = {arm: Stepper(trainer) for arm, trainer in trainers.items()}
    base, setting, steps = steppers.pop(BASELINE), workload.describe(), workload.logging_steps
    gc.collect()
    gc.freeze()  # what is alive now stays alive: no arm should pay for looking through it
    taken = time_pairs(base, steppers, pairs=pairs, steps=steps)
    rows = compared(BENCH, taken, setting, (*PHASES, LOSS), steps)
    rest = {arm: [(b[REST] - a[REST]) / steps * 1e3 for a, b in of_arm] for arm, of_arm in taken.items()}
    rows += [row(BENCH, arm, setting, f"{REST}, difference", values, "ms") for arm, values in rest.items()]
    if workload.device == "cuda":
        steps = max(_CUDA_STEPS, steps)
        taken = time_pairs(base, steppers, pairs=pairs, steps=steps, by_phase=False)
    rows += compared(BENCH, taken, setting, (WHOLE, CPU_TIME), steps)
    more = {arm: [(b[WHOLE] - a[WHOLE]) / steps * 1e3 for a, b in of_arm] for arm, of_arm in taken.items()}
    return rows + [row(BENCH, arm, setting, f"{WHOLE}, difference", values, "ms") for arm, values in more.items()]


def compared(
    bench: str,
    taken: Pairs,
    setting: str,
    phases: tuple[str, ...],
    steps: int,
) -> list[dict[str, Any]]:
    """The baseline's milliseconds of each phase and every arm's ratio to them, pair by pair."""
    rows = []
    for phase in phases:
        base = [a[phase] / steps * 1e3 for of_arm in taken.values() for a, _ in of_arm]
        rows.append(row(bench, BASELINE, setting, phase, base, "ms"))
        for arm, of_arm in taken.items():
            rows.append(row(bench, arm, setting, phase, [b[phase] / a[phase] for a, b in of_arm], "ratio"))
    return rows


def scoring_rows(trainers: dict[str, Any], workload: Workload, pairs: int) -> list[dict[str, Any]]:
    """What a generation batch costs beside the sampling: tokens, rewards, advantages and, here, the lengths."""
    rows, setting = [], workload.describe()
    for arm in trainers:
        if arm != BASELINE:
            taken = time_scoring(trainers[BASELINE], trainers[arm], pairs)
            rows.append(row(BENCH, arm, setting, "scoring", [b / a for a, b in taken], "ratio"))
            rows.append(row(BENCH, arm, setting, "scoring, difference", [(b - a) * 1e3 for a, b in taken], "ms"))
    return rows


def workload_from(args: argparse.Namespace) -> Workload:
    """The shape's usual workload with what the command line changes."""
    usual = _SMOKE if args.smoke else _TINY if args.shape in ("tiny", "hidden 24") else _REAL
    changed = {name: getattr(args, name) for name in ("rows", "accumulation", "completion", "dtype", "optim")}
    changed |= {"shape": args.shape, "device": args.device, "logging_steps": args.logging_steps, "lora": args.lora}
    return dataclasses.replace(usual, **{name: value for name, value in changed.items() if value is not None})


def parse() -> argparse.Namespace:
    """The command line."""
    parser = bench_parser(__doc__)
    parser.add_argument("--shape", choices=MODELS, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, help="completions of a micro-batch")
    parser.add_argument("--accumulation", type=int, help="micro-batches of an optimizer step")
    parser.add_argument("--completion", type=int, help="tokens of the longest completion")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--optim", help="TrainingArguments.optim")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--share-model", action="store_true", help="one set of weights and moments for all arms")
    parser.add_argument("--logging-steps", type=int, default=1, help="a pair has that many steps of each side")
    parser.add_argument("--arms", nargs="+", help=f"of {list(ARMS)} (default: all)")
    parser.add_argument("--pairs", type=int, default=30)
    args = parser.parse_args()
    if args.share_model and args.lora:
        parser.error("--share-model cannot be had with --lora: each trainer puts adapters of its own into the model.")
    if unknown := set(args.arms or ()) - set(ARMS):
        parser.error(f"--arms {sorted(unknown)} is unknown; accepted: {list(ARMS)}.")
    return args


def main() -> None:
    """Measure and append the rows."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    workload = workload_from(args)
    arms = [BASELINE, *(arm for arm in args.arms or measured_arms(token_metrics=False) if arm != BASELINE)]
    pairs = 2 if args.smoke else args.pairs
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(workload, arms, folder, args.share_model)
        append(args.out, scoring_rows(trainers, workload, pairs), args.device)
        append(args.out, memory_rows(BENCH, trainers, workload), args.device)
        append(args.out, traffic_rows(BENCH, trainers, workload), args.device)
        append(args.out, time_rows(trainers, workload, pairs), args.device)


if __name__ == "__main__":
    main()
