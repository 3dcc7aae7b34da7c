"""
What was tried for a λ that follows the regression, on the tuning seeds 0 to 11 and the validation split.

    python -m recipes.studies.arena.preference_tuning --seeds 4
    python -m recipes.studies.arena.preference_tuning --show

Rows go to `results/preference_tuning.csv`. A run that is there already is not made again. Eight variants of the rows
changed a constant or a removed option of the package and cannot run again: see `preference_tuning.md`.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers

from recipes.studies.shared.arms import Arm
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.run import LAMBDA_EVERY, RunSpec, run

RESULTS = Path(__file__).parent / "results" / "preference_tuning.csv"
KEY = ("task", "arm", "seed", "max_steps", "steps_per_generation")
LEARNING_RATE = 3e-4
TASKS = ("running_sum", "slippery_chain", "idle_filler")
_POSITIVE = {"length_weight": "power", "lambda_side": "positive"}
_POSITIVE3 = {**_POSITIVE, "lambda_features": ["length", "mean_logp", "min_logp"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "dapo": {"length_weight": "dapo"},
    "positive_weight_3": {"length_weight": "dapo", "positive_weight": 3.0},
    "positive3": _POSITIVE3,
    "positive3, κ = 1": {**_POSITIVE3, "lambda_gain": 1.0},
    "positive3, κ = 4": {**_POSITIVE3, "lambda_gain": 4.0},
    "positive3, λ's rate 0.3": {**_POSITIVE3, "lambda_learning_rate": 0.3},
    "positive3, λ's rate 1": {**_POSITIVE3, "lambda_learning_rate": 1.0},
    "positive3, mean held": {"length_weight": "recipes.studies.arena.held_power.held_positive3"},
    "positive3 × TR": {**_POSITIVE3, "token_weight": "tr_grpo"},
    "positive3 × AR": {**_POSITIVE3, "token_weight": "ar", "token_weight_kwargs": {"alpha": 0.6}},
    "positive3 × positive_weight_3": {**_POSITIVE3, "positive_weight": 3.0},
    "length and min_logp": {**_POSITIVE3, "lambda_features": ["length", "min_logp"]},
    "length and mean_logp": {**_POSITIVE3, "lambda_features": ["length", "mean_logp"]},
    "positive": _POSITIVE,
    "signed": {**_POSITIVE, "lambda_side": "signed"},
}


class TuningSpec(RunSpec):
    """A run of the tuning; `arm` is a variant's name."""

    @property
    def definition(self) -> Arm:
        return Arm(self.arm, VARIANTS[self.arm])


def tune(tasks: tuple[str, ...], variants: tuple[str, ...], seeds: range, max_steps: int, results: Path) -> None:
    """Make the runs that are not there yet, seed by seed, so that a cut-off tuning has whole pairs."""
    ledger = Ledger(results, KEY)
    done = ledger.done()
    for seed in seeds:
        for variant in variants:
            for task in tasks:
                spec = TuningSpec("preference", task, variant, seed, LEARNING_RATE, max_steps, split="validation")
                if ledger.key_of(vars(spec)) not in done:
                    row = run(spec)
                    ledger.append(row | {"constants": "{}"})
                    print(f"{task} {variant} {seed}: {row['auc']:.4f} in {row['seconds']} s", flush=True)


def show(results: Path) -> list[str]:
    """Lines of a table, by task and variant: points against `dapo`, paired, ± standard error; λ of length."""
    rows = Ledger(results, KEY).rows()
    by = {(r["task"], r["arm"], r["seed"]): r for r in rows}
    lines = [
        "| task | variant | seeds | points of mean reward | of sampled accuracy | λ at 100 | its spread | half way |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(r["task"] for r in rows):
        for arm in dict.fromkeys(r["arm"] for r in rows if r["task"] == task):
            seeds = [r["seed"] for r in rows if r["task"] == task and r["arm"] == arm]
            pairs = [(by[task, arm, s], by[task, "dapo", s]) for s in seeds if (task, "dapo", s) in by]
            cells = []
            for column in ("auc", "accuracy_sampled"):
                gaps = [100 * (float(a[column]) - float(b[column])) for a, b in pairs]
                error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
                cells.append(f"{statistics.fmean(gaps):+.1f} ± {error:.1f}" if gaps else "-")
            paths = [by[task, arm, s]["lambda_curve"].split() for s in seeds if by[task, arm, s]["lambda_curve"]]
            cells += _path_cells([[float(value) for value in path] for path in paths])
            lines.append(f"| {task} | {arm} | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def _path_cells(paths: list[list[float]]) -> list[str]:
    """
    λ of length at the end, its standard deviation over seeds in the second half (mean over its points), and the
    optimizer step at which its mean has gone half of its way to its farthest point.
    """
    if len(paths) < 2:
        return ["-", "-", "-"]
    points = list(zip(*paths, strict=True))
    mean = [statistics.fmean(values) for values in points]
    spread = statistics.fmean(statistics.stdev(values) for values in points[len(points) // 2 :])
    farthest = max(map(abs, mean))
    half = next(i for i, value in enumerate(mean) if abs(value) >= farthest / 2) * LAMBDA_EVERY
    return [f"{mean[-1]:+.2f}", f"{spread:.2f}", str(half)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--variants", nargs="+", default=tuple(VARIANTS), choices=tuple(VARIANTS))
    parser.add_argument("--seeds", type=int, default=4, help="seeds 0 to N - 1, at most 12")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    seeds = range(args.first_seed, args.seeds)
    if not seeds or seeds[-1] > 11 or seeds[0] < 0:
        parser.error("--seeds must be 1 to 12: the study has others")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if not args.show:
        tune(tuple(args.tasks), tuple(args.variants), seeds, args.max_steps, args.results)
    print("\n".join(show(args.results)))


if __name__ == "__main__":
    main()
