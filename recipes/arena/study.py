"""
The arena's runs: `python -m recipes.arena.study PART [PART ...]`, with the parts

- `tune`: every arm at every learning rate of the grid, on seeds and held-out problems of its own;
- `choose`: write `learning_rates.json`, each arm's rate with the highest mean reward over tasks and tuning seeds;
- `main`: every arm with its rate on every task and test seed, four optimizer steps per generation batch;
- `one_step`: a few arms with one optimizer step per generation batch.

Runs go to worker processes of one thread each and come back as rows of `runs.csv` or `tuning.csv`. What is there is
not run again, so a killed study goes on where it stopped; equal specs give equal rows on the same machine.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recipes.arena.arms import ARMS, LEARNED
from recipes.arena.ledger import Ledger
from recipes.arena.run import RunSpec, run

ARENA = Path(__file__).parent
KEY = ("study", "task", "arm", "seed", "max_steps", "steps_per_generation", "learning_rate")
LEARNING_RATES = (1.5e-4, 3e-4, 6e-4)
TUNING_SEEDS = (101,)
TUNING_TASKS = ("running_sum", "checked_sum", "slippery_chain")
TEST_SEEDS = tuple(range(12))
TASKS = ("running_sum", "slippery_chain", "checked_sum", "knights_and_knaves", "idle_filler")
# Length is idle there, so that the sign of λ is all there is to see.
IDLE_ARMS = ("dapo", "grpo", *LEARNED)
ONE_STEP_ARMS = ("dapo", "grpo", "softmax", "power", "tr")
MAX_RUNS_PER_PROCESS = 50  # a trainer leaves some memory behind


def tuning_specs(tasks: Iterable[str] = TUNING_TASKS, max_steps: int = 100) -> list[RunSpec]:
    """The tuning runs: the same grid and seeds for every arm."""
    return [
        RunSpec("tune", task, arm, seed, rate, max_steps, split="validation")
        for task, seed, rate, arm in itertools.product(tasks, TUNING_SEEDS, LEARNING_RATES, ARMS)
    ]


def main_specs(
    rates: dict[str, float], tasks: Iterable[str] = TASKS, seeds: Iterable[int] = TEST_SEEDS, max_steps: int = 100
) -> list[RunSpec]:
    """The comparison: task by task, seed by seed, so that a study that is cut short has whole seeds."""
    return [
        RunSpec("main", task, arm, seed, rates[arm], max_steps)
        for task, seed in itertools.product(tasks, seeds)
        for arm in (IDLE_ARMS if task == "idle_filler" else ARMS)
    ]


def one_step_specs(
    rates: dict[str, float], tasks: Iterable[str] = TASKS[:1], seeds: Iterable[int] = TEST_SEEDS, max_steps: int = 50
) -> list[RunSpec]:
    """One optimizer step per generation batch, so no ratio ever differs from 1; half as many, twice the batches."""
    return [
        RunSpec("one_step", task, arm, seed, rates[arm], max_steps, steps_per_generation=1)
        for task, seed, arm in itertools.product(tasks, seeds, ONE_STEP_ARMS)
    ]


def execute(specs: list[RunSpec], ledger: Ledger, workers: int) -> int:
    """
    Run the specs that have no row yet, and append their rows as they come.

    Args:
        specs (`list[RunSpec]`): in the order in which they are started.
        ledger (`Ledger`): where the rows go.
        workers (`int`): processes, one thread each.

    Returns:
        `int`: how many were run.
    """
    done = ledger.done()
    todo = [spec for spec in specs if ledger.key_of(vars(spec)) not in done]
    # Read by torch when a worker starts.
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), max_tasks_per_child=MAX_RUNS_PER_PROCESS, initializer=_calm
    )
    progress = tqdm(total=len(specs), initial=len(specs) - len(todo), desc="arena", unit="run", smoothing=0.05)
    with pool, progress:
        for future in as_completed(pool.submit(run, spec) for spec in todo):
            row = future.result()
            ledger.append(row)
            progress.set_postfix_str(f"{row['task']} {row['arm']} reward {row['auc']:.3f}")
            progress.update()
    return len(todo)


def _calm() -> None:
    """One thread, and no line of its own from every trainer that is built."""
    import warnings

    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def choose_rates(rows: list[dict[str, str]]) -> dict[str, float]:
    """
    Choose each arm's learning rate: the highest training reward, averaged over tuning tasks and seeds.

    Args:
        rows (`list[dict[str, str]]`): rows of `tuning.csv`.

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
    for arm in ARMS:
        means = {}
        for rate in LEARNING_RATES:
            cell = cells[arm, rate]
            if not whole or set(cell) != whole:
                raise ValueError(f"tuning of {arm!r} at {rate:g} has {len(cell)} of {len(whole)} runs: run `tune`.")
            means[rate] = statistics.fmean(cell.values())
        chosen[arm] = max(means, key=means.get)
    return chosen


def parts(args: argparse.Namespace) -> None:
    """Do the parts named on the command line, in their order."""
    tuning, runs = Ledger(args.results / "tuning.csv", KEY), Ledger(args.results / "runs.csv", KEY)
    rates_file = args.results / "learning_rates.json"
    limits: dict[str, Any] = {"max_steps": args.max_steps} if args.max_steps else {}
    if args.tasks:
        limits["tasks"] = args.tasks
    for part in args.parts:
        if part == "tune":
            execute(tuning_specs(**limits), tuning, args.workers)
        elif part == "choose":
            rates_file.write_text(json.dumps(choose_rates(tuning.rows()), indent=2) + "\n", encoding="utf-8")
        else:
            rates = json.loads(rates_file.read_text(encoding="utf-8"))
            make = main_specs if part == "main" else one_step_specs
            specs = make(rates, seeds=range(args.seeds), **limits)
            execute([spec for spec in specs if not args.arms or spec.arm in args.arms], runs, args.workers)


def main() -> None:
    """Parse the command line and do its parts."""
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("tune", "choose", "main", "one_step"), metavar="PART")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help="only these tasks")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help="only these arms of main and one_step")
    parser.add_argument("--seeds", type=int, default=len(TEST_SEEDS), help="test seeds (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, help="optimizer steps of a run, for a quick look")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=ARENA / "results", help="folder of the CSV files (default: %(default)s)"
    )
    parts(parser.parse_args())


if __name__ == "__main__":
    main()
