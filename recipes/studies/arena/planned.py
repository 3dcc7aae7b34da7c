"""
The runs of the arena's second round, as `recipes/studies/arena/PLAN.md` lists them:

    python -m recipes.studies.arena.planned [PART ...]

Without a part it does all of them, in the order of their importance, so that a study that is cut short has answered
the first questions. Rows go to `results/planned.csv`, those of the learning rates to `results/planned_rates.csv`. What
is there is not run again. `--reproduce N` runs N rows again, chosen at random, and says which differ. `--smoke` does
everything with two seeds and a few steps, in a folder of its own.
"""

import argparse
import itertools
import json
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev

from recipes.studies.arena.study import RESULTS
from recipes.studies.shared.arms import find_arm
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.run import RunSpec
from recipes.studies.shared.workers import KEY, execute

SMOKE_RESULTS = Path("runs") / "planned_smoke"
FIRST_SEED = 400
LEARNING_RATE = 3e-4
LEARNING_RATES = (1.5e-4, 3e-4, 4.5e-4, 6e-4)
TUNING_SEEDS = tuple(range(200, 204))
LENGTH_MATTERS = ("running_sum", "slippery_chain")
LENGTH_IDLE = ("idle_filler", "knights_and_knaves", "checked_sum")
CORE = ("dapo", "positive_weight_3", "positive3")
# What a row must have alike when it is run again: all that the run computed.
COMPUTED = ("auc", "accuracy_sampled", "accuracy_greedy", "entropy", "reward_curve", "length_curve", "lambda_curve")


@dataclass(frozen=True)
class Part:
    """
    Some runs that answer one question.

    Args:
        study (`str`): the column `study` of their rows; runs of one study, task and arm have the same settings.
        tasks, arms (`tuple[str, ...]`): names.
        seeds (`int`): how many, from `first_seed` on.
        max_steps (`int`): optimizer steps.
        steps_per_generation (`int`): optimizer steps that share a generation batch.
        first_seed (`int`): of the test seeds.
    """

    study: str
    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: int
    max_steps: int = 100
    steps_per_generation: int = 4
    first_seed: int = FIRST_SEED

    def specs(self) -> list[RunSpec]:
        """Seed by seed, so that a part that is cut short has whole pairs."""
        return [
            RunSpec(self.study, task, arm, seed, LEARNING_RATE, self.max_steps, self.steps_per_generation)
            for seed in range(self.first_seed, self.first_seed + self.seeds)
            for task, arm in itertools.product(self.tasks, self.arms)
        ]


PARTS: dict[str, Part] = {
    "start": Part("planned", LENGTH_MATTERS, CORE, 24),
    "elsewhere": Part("planned", LENGTH_IDLE, CORE, 24),
    "one_step": Part("planned_one_step", LENGTH_MATTERS, (*CORE, "positive"), 24, 50, 1),
    "long": Part("planned_long", LENGTH_MATTERS, CORE, 16, 300),
    "controls": Part(
        "planned", LENGTH_MATTERS, ("positive3_held", "positive3_x3", "positive_weight_1.8", "positive"), 24
    ),
    "with_v": Part("planned", LENGTH_MATTERS, ("tr", "ar_0.6", "positive3_tr", "positive3_ar"), 24),
    "published": Part("planned", LENGTH_MATTERS, ("grpo", "softmax", "balanced"), 24),
    # Added after the answers, as PLAN.md says: what H2 and H3 ask, of the arm that came out highest.
    "elsewhere_x3": Part("planned", LENGTH_IDLE, ("positive3_x3",), 24),
    "long_x3": Part("planned_long", LENGTH_MATTERS, ("positive3_x3",), 16, 300),
}
RATES = "rates"


def rate_specs(seeds: Sequence[int] = TUNING_SEEDS, max_steps: int = 100) -> list[RunSpec]:
    """`dapo` and the main arm over one grid of learning rates, on tuning seeds and validation problems."""
    return [
        RunSpec("planned_rates", task, arm, seed, rate, max_steps, split="validation")
        for seed in seeds
        for task, rate, arm in itertools.product(LENGTH_MATTERS, LEARNING_RATES, ("dapo", "positive3"))
    ]


def do_parts(names: Sequence[str], results: Path, workers: int, *, smoke: bool = False) -> None:
    """Do some parts, in their order."""
    for name in names:
        if name == RATES:
            specs = rate_specs(TUNING_SEEDS[:1], 8) if smoke else rate_specs()
            execute(specs, Ledger(results / "planned_rates.csv", KEY), workers)
        else:
            part = PARTS[name]
            small = replace(part, seeds=2, first_seed=0, max_steps=8, tasks=part.tasks[:2])
            execute((small if smoke else part).specs(), Ledger(results / "planned.csv", KEY), workers)


def reproduce(count: int, results: Path, workers: int, seed: int = 0) -> list[str]:
    """
    Run some rows of `planned.csv` again.

    On the processor that a row names every digit must agree. Another one rounds otherwise and so samples other
    completions: its run is another draw, and its mean reward must lie within 4 standard deviations of the arm's seeds.

    Args:
        count (`int`): how many, chosen at random.
        results (`Path`): folder of the rows.
        workers (`int`): processes.
        seed (`int`): of the choice.

    Returns:
        `list[str]`: one line per row with its verdict.

    Raises:
        ValueError: an arm's options are no longer those of its rows.
    """
    rows = Ledger(results / "planned.csv", KEY).rows()
    chosen = random.Random(seed).sample(rows, min(count, len(rows)))
    for row in chosen:
        if json.dumps(find_arm(row["arm"]).key) != row["options"]:
            raise ValueError(f"arm {row['arm']!r} has other options now than in its rows: {row['options']}")
    specs = [
        RunSpec(
            row["study"], row["task"], row["arm"], int(row["seed"]), float(row["learning_rate"]),
            int(row["max_steps"]), int(row["steps_per_generation"]), row["split"],
        )
        for row in chosen
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        again = Ledger(Path(folder) / "again.csv", KEY)
        execute(specs, again, workers)
        found = {again.key_of(row): row for row in again.rows()}
    cell = ("study", "task", "arm")
    lines = []
    for row in chosen:
        seeds = [float(other["auc"]) for other in rows if all(other[name] == row[name] for name in cell)]
        verdict = compare_rows(row, found[again.key_of(row)], stdev(seeds) if len(seeds) > 1 else 0.0)
        lines.append(f"{row['study']} {row['task']} {row['arm']} {row['seed']}: {verdict}")
    return lines


def compare_rows(row: Mapping[str, str], new: Mapping[str, str], spread: float) -> str:
    """The verdict on a row that was run again; `spread` is the standard deviation of `auc` over the arm's seeds."""
    different = [name for name in COMPUTED if new[name] != row[name]]
    if not different:
        return "the same, bit for bit"
    gap = float(new["auc"]) - float(row["auc"])
    shown = f"differs in {', '.join(different)}, mean reward by {gap:+.4f} (sd over seeds {spread:.4f})"
    if new["hardware"] == row["hardware"]:
        return shown
    return f"{'within' if abs(gap) <= 4 * spread else 'BEYOND'} the spread of another processor: {shown}"


def main() -> None:
    """Parse the command line and do its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*PARTS, RATES)
    parser.add_argument(
        "parts", nargs="*", default=names, metavar="PART", help=f"of {', '.join(names)} (default: all)"
    )
    parser.add_argument("--smoke", action="store_true", help="all of it in small, in runs/planned_smoke")
    parser.add_argument("--reproduce", type=int, metavar="N", help="run N rows again and compare")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--results", type=Path, help=f"folder of the CSV files (default: {RESULTS})")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(names):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; accepted: {', '.join(names)}")
    results = args.results or (SMOKE_RESULTS if args.smoke else RESULTS)
    if args.reproduce:
        print("\n".join(reproduce(args.reproduce, results, args.workers)))
    else:
        do_parts(args.parts, results, args.workers, smoke=args.smoke)


if __name__ == "__main__":
    main()
