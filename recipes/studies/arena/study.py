"""
The runs of the arena's first round: `python -m recipes.studies.arena.study PART [PART ...]`, with the parts

- `tune`: every arm at every learning rate of the grid, on seeds and held-out problems of its own;
- `choose`: write `learning_rates.json`, each arm's rate with the highest mean reward over tasks and tuning seeds;
- `main`: each task's arms (`TASK_ARMS`, else all) with their rates on every test seed, four optimizer steps per
  generation batch;
- `one_step`: a few arms with one optimizer step per generation batch.

`--smoke` does the same with few arms, tasks, seeds and steps, in a folder of its own. Runs go to worker processes of
one thread each and come back as rows of `runs.csv` or `tuning.csv`. What is there is not run again, so a killed study
goes on where it stopped; equal specs give equal rows on the same machine.
"""

import argparse
import itertools
import json
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from recipes.studies.shared.arms import FIRST_ROUND, LEARNED
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.run import RunSpec
from recipes.studies.shared.workers import KEY, execute, never

RESULTS = Path(__file__).parent / "results"
SMOKE_RESULTS = Path("runs") / "arena_smoke"
LEARNING_RATES = (1.5e-4, 3e-4, 6e-4)
TUNING_SEEDS = (101,)
TUNING_TASKS = ("running_sum", "slippery_chain")
TEST_SEEDS = tuple(range(12))
TASKS = ("running_sum", "slippery_chain", "checked_sum", "knights_and_knaves", "idle_filler", "lookup_agent")
# Where not all arms are run. Length is idle in `idle_filler`, so that the path of λ is all there is to see.
TASK_ARMS = {
    "checked_sum": ("grpo", "dapo", "softmax", "power", "power_-1.75", "tr"),
    "knights_and_knaves": ("grpo", "dapo", "softmax", "tr", "softmax_tr"),
    "idle_filler": ("grpo", "dapo", *LEARNED),
    "lookup_agent": ("grpo", "dapo", "softmax", "tr"),
}
ONE_STEP_ARMS = ("grpo", "dapo", "tr")


@dataclass(frozen=True)
class Plan:
    """
    What is run.

    Args:
        arms, tasks (`tuple[str, ...]`): names in `FIRST_ROUND` and `TASKS`.
        seeds (`tuple[int, ...]`): test seeds.
        max_steps (`int`): optimizer steps of a run.
        tuning_tasks (`tuple[str, ...]`): tasks that learning rates are chosen on, one rate per arm for all tasks.
        learning_rates (`tuple[float, ...]`): the grid.
        spec (`Callable[..., RunSpec]`): makes the specs.
        task_arms (`dict`): the arms of a task that has not all of them.
    """

    arms: tuple[str, ...] = FIRST_ROUND
    tasks: tuple[str, ...] = TASKS
    seeds: tuple[int, ...] = TEST_SEEDS
    max_steps: int = 100
    tuning_tasks: tuple[str, ...] = TUNING_TASKS
    learning_rates: tuple[float, ...] = LEARNING_RATES
    spec: Callable[..., RunSpec] = RunSpec
    task_arms: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: TASK_ARMS)

    def tune(self) -> list[RunSpec]:
        """The tuning runs: the same grid and seeds for every arm."""
        return [
            self.spec("tune", task, arm, seed, rate, self.max_steps, split="validation")
            for task, seed in itertools.product(self.tuning_tasks, TUNING_SEEDS)
            for rate, arm in itertools.product(self.learning_rates, self.arms)
        ]

    def main(self, rates: dict[str, float]) -> list[RunSpec]:
        """The comparison: task by task, seed by seed, so that a study that is cut short has whole seeds."""
        return [
            self.spec("main", task, arm, seed, rates[arm], self.max_steps)
            for task, seed, arm in itertools.product(self.tasks, self.seeds, self.arms)
            if arm in self.task_arms.get(task, self.arms)
        ]

    def one_step(self, rates: dict[str, float]) -> list[RunSpec]:
        """One optimizer step per generation batch, so that no ratio ever differs from 1; twice as many batches."""
        return [
            self.spec("one_step", task, arm, seed, rates[arm], self.max_steps // 2, steps_per_generation=1)
            for task, seed, arm in itertools.product(self.tasks[:1], self.seeds, self.arms)
            if arm in ONE_STEP_ARMS
        ]


SMOKE = Plan(("grpo", "dapo", "softmax", "power", "tr"), TASKS[:2], (0, 1), 20, TASKS[:1])


def choose_rates(rows: list[dict[str, str]], plan: Plan) -> dict[str, float]:
    """
    Choose each arm's learning rate: the highest training reward, averaged over tuning tasks and seeds.

    Args:
        rows (`list[dict[str, str]]`): rows of `tuning.csv`.
        plan (`Plan`): the arms to choose for, and the grid.

    Returns:
        `dict[str, float]`: learning rate by arm.

    Raises:
        ValueError: if a cell of the grid is missing, so that arms would not have had the same budget.
    """
    cells: dict[tuple[str, float], dict[tuple[str, str], float]] = defaultdict(dict)
    for row in rows:
        cells[row["arm"], float(row["learning_rate"])][row["task"], row["seed"]] = float(row["auc"])
    whole = set.union(*(set(cell) for cell in cells.values())) if cells else set()
    chosen = {}
    for arm in plan.arms:
        means = {}
        for rate in plan.learning_rates:
            cell = cells[arm, rate]
            if not whole or set(cell) != whole:
                raise ValueError(f"tuning of {arm!r} at {rate:g} has {len(cell)} of {len(whole)} runs: run `tune`.")
            means[rate] = statistics.fmean(cell.values())
        chosen[arm] = max(means, key=lambda rate: means[rate])
    return chosen


def do_parts(
    parts: list[str], plan: Plan, results: Path, workers: int, time_is_up: Callable[[], bool] = never
) -> None:
    """Do some parts of a plan, in their order; see `execute`."""
    tuning, runs = Ledger(results / "tuning.csv", KEY), Ledger(results / "runs.csv", KEY)
    rates_file = results / "learning_rates.json"
    for part in parts:
        if part == "tune":
            execute(plan.tune(), tuning, workers, time_is_up)
        elif part == "choose":
            rates = choose_rates(tuning.rows(), plan)
            rates_file.write_text(json.dumps(rates, indent=2) + "\n", encoding="utf-8")
        else:
            rates = json.loads(rates_file.read_text(encoding="utf-8"))
            execute(getattr(plan, part)(rates), runs, workers, time_is_up)


def main() -> None:
    """Parse the command line and do its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("tune", "choose", "main", "one_step"), metavar="PART")
    parser.add_argument("--smoke", action="store_true", help="a small version of everything, in runs/arena_smoke")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help="only these tasks")
    parser.add_argument("--arms", nargs="+", choices=FIRST_ROUND, metavar="ARM", help="only these arms")
    parser.add_argument("--seeds", type=int, help="this many test seeds, from 0 on")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--results", type=Path, help=f"folder of the CSV files (default: {RESULTS})")
    args = parser.parse_args()
    plan = SMOKE if args.smoke else Plan()
    changes = {
        "tasks": args.tasks and tuple(args.tasks),
        "tuning_tasks": args.tasks and tuple(args.tasks),
        "arms": args.arms and tuple(args.arms),
        "seeds": args.seeds and tuple(range(args.seeds)),
    }
    plan = replace(plan, **{name: value for name, value in changes.items() if value})
    do_parts(args.parts, plan, args.results or (SMOKE_RESULTS if args.smoke else RESULTS), args.workers)


if __name__ == "__main__":
    main()
