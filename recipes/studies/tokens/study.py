"""
The same accuracy for fewer tokens? `python -m recipes.studies.tokens.study PART [PART ...]`, with the parts

- `settle`: `length_target` and TRL's dapo on the two tasks with a promise to keep (see README.md), every test seed;
- `step`: step responses on tuning seeds: batches of 64 and 32 completions, 1, 2 and 4 optimizer steps per batch;
- `own`: a target that is the length `dapo` ends with, and `dapo`, on tuning seeds: λ should have nothing to do;
- `ladder`: every way of saving tokens at every setting, on four tasks, every test seed, `settle`'s runs among them;
- `identify`: how fast the length moves under a fixed λ, which the controller's gains were set by, on one tuning seed;
- `remedy`: what might hold the target on `checked_sum` in every seed: side "signed", or λ in [-6, 6], on tuning seeds;
- `tune`: every setting of the rivals in `TRIED`, on tuning seeds, for `SETTINGS` to hold two of them;
- `tune_set_points`: the rivals with a set point of their own on `checked_sum`, every setting, on tuning seeds;
- `set_points`: those that README.md's rule keeps, every test seed.

Rows go to `results/budget.csv`, one per run. What is there is not run again. `--show` prints the tables, `--report`
writes them into `README.md`, with the pictures. `--smoke` does it in small, in `runs/budget_smoke`. A run takes 10 to
25 seconds of one core.
"""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.studies.shared.arms import Arm
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.run import RunSpec
from recipes.studies.shared.workers import KEY, execute
from recipes.studies.tokens import report

PAGE = Path(__file__).parent / "README.md"
RESULTS = Path(__file__).parent / "results"
SMOKE_FOLDER = Path("runs") / "budget_smoke"
TUNING_SEEDS = (200, 201, 202, 203)
TEST_SEEDS = tuple(range(500, 512))
LEARNING_RATE, MAX_STEPS = 3e-4, 200
PARTS = ("settle", "step", "own", "ladder", "identify", "remedy", "tune", "tune_set_points", "set_points")
TASKS = ("checked_sum", "idle_filler", "running_sum", "slippery_chain")
PROMISED = {"checked_sum": 22, "idle_filler": 8}
REMEDIES = {"signed": {"lambda_side": "signed"}, "wide": {"lambda_bounds": (-6.0, 6.0)}}  # words after a target
OWN = {"idle_filler": 14, "checked_sum": 36}  # about what dapo ends with
# The settings of each rival that are tried on tuning seeds, by task: α, λ, (L_max, cache), a number of tokens.
TRIED: dict[str, dict[str, tuple[Any, ...]]] = {
    "lead": dict.fromkeys(TASKS, (0.05, 0.1, 0.2, 0.4)),
    "fixed": dict.fromkeys(TASKS, (-0.5, -1.0, -2.0)),
    "overlong": {
        "checked_sum": ((48, 24), (40, 20), (32, 16)),
        "idle_filler": ((24, 16), (16, 12), (12, 8)),
        "running_sum": ((24, 12), (18, 9), (14, 7)),
        "slippery_chain": ((12, 6), (10, 5), (8, 4)),
    },
    "cut": {
        "checked_sum": (40, 30, 24),
        "idle_filler": (16, 10, 8),
        "running_sum": (20, 15, 12),
        "slippery_chain": (10, 8, 6),
    },
}
# Rivals with a set point: LACONIC with its budget and η, and the distance to the target as a reward.
TRIED_SET_POINTS = ("laconic 22 0.002", "laconic 22 0.02", "laconic 22 0.2", "distance 22")
SET_POINTS = ("laconic 22 0.002", "distance 22")  # those that README.md's rule keeps
# The settings of each way of saving tokens, by task. A rival's come from `tune` by the rule in README.md; those of
# `length_target`, numbers of tokens, lie between what dapo and what its rivals end with there.
SETTINGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "target": {
        "checked_sum": (28, 22, 20),
        "idle_filler": (11, 8, 6),
        "running_sum": (19, 16, 13),
        "slippery_chain": (5, 4.5, 4),
    },
    "target signed": {"checked_sum": (22,)},
    "lead": {
        "checked_sum": (0.4, 0.2),
        "idle_filler": (0.05, 0.1),
        "running_sum": (0.05, 0.4),
        "slippery_chain": (0.2, 0.4),
    },
    "fixed": {
        "checked_sum": (-0.5, -1.0),
        "idle_filler": (-0.5, -2.0),
        "running_sum": (-1.0, -2.0),
        "slippery_chain": (-0.5, -2.0),
    },
    "overlong": {
        "checked_sum": ((48, 24), (40, 20)),
        "idle_filler": ((24, 16), (16, 12)),
        "running_sum": ((24, 12), (18, 9)),
        "slippery_chain": ((10, 5), (8, 4)),
    },
    "cut": {
        "checked_sum": (30, 24),
        "idle_filler": (16, 10),
        "running_sum": (20, 12),
        "slippery_chain": (8, 6),
    },
}
WAYS = {
    "dapo": "TRL's dapo",
    "target": "length_target",
    "lead": "length reward for right answers",
    "overlong": "soft overlong punishment",
    "fixed": "λ fixed, positive",
    "cut": "max_completion_length cut",
    "target signed": "length_target, side signed",
}


def method(name: str) -> Arm:
    """
    The arm that a method's name stands for: a way of saving tokens and its setting, as in "target 22".

    Args:
        name (`str`): "dapo", or "target TOKENS" with or without one of `REMEDIES`, "lead ALPHA",
            "fixed LAMBDA", "overlong L_MAX CACHE", "cut TOKENS", "laconic BUDGET ETA", "distance TOKENS".

    Raises:
        ValueError: no way is called so.
    """
    way, *values = name.split()
    remedies = [REMEDIES[value] for value in values if value in REMEDIES]
    numbers = [float(value) for value in values if value not in REMEDIES]
    dapo: dict[str, Any] = {"loss_type": "dapo"}
    if way == "dapo":
        return Arm(WAYS[way], dapo, trl=True)
    if way == "target":
        return Arm(WAYS[way], {"length_weight": "power", "length_target": numbers[0], **dict(*remedies)})
    if way == "fixed":
        fixed = {"lambda_side": "positive", "lambda_init": numbers[0], "lambda_learnable": False}
        return Arm(WAYS[way], {"length_weight": "power", **fixed})
    if way == "lead":
        rewards = {"recipes.playground.rewards.short_right_answers": {"alpha": numbers[0]}}
        return Arm(WAYS[way], dapo, trl=True, rewards=rewards)
    if way == "overlong":
        limits = {"max_completion_len": int(numbers[0]), "soft_punish_cache": int(numbers[1])}
        return Arm(WAYS[way], dapo, trl=True, rewards={"trl.rewards.get_soft_overlong_punishment": limits})
    if way == "cut":
        return Arm(WAYS[way], {**dapo, "max_completion_length": int(numbers[0])}, trl=True)
    if way == "laconic":
        rewards = {"recipes.studies.shared.length_rewards.laconic": {"budget": numbers[0], "eta": numbers[1]}}
        return Arm("LACONIC", dapo, trl=True, rewards=rewards)
    if way == "distance":
        rewards = {"recipes.studies.shared.length_rewards.distance": {"target": numbers[0]}}
        return Arm("distance to the target as a reward", dapo, trl=True, rewards=rewards)
    raise ValueError(f"{name!r} is no method; accepted: {', '.join(WAYS)}, each but the first with its setting.")


def names_of(way: str, task: str, settings_of: dict[str, dict[str, tuple[Any, ...]]] = SETTINGS) -> list[str]:
    """The methods of one way of saving tokens on a task."""
    if way == "dapo":
        return [way]
    first, *word = way.split()
    settings = settings_of[way].get(task, ())
    return [" ".join([first, *map(str, s if isinstance(s, tuple) else (s,)), *word]) for s in settings]


@dataclass(frozen=True)
class BudgetSpec(RunSpec):
    """
    A run of this study; `arm` is a method's name.

    Args:
        batch (`int`): completions of a generation batch.
    """

    batch: int = 64

    @property
    def definition(self) -> Arm:
        return method(self.arm)

    @property
    def completions(self) -> int:
        return self.batch

    @property
    def max_completion_length(self) -> int:
        return self.definition.options.get("max_completion_length", super().max_completion_length)


@dataclass(frozen=True)
class Plan:
    """
    What is run.

    Args:
        tasks (`tuple[str, ...]`): of the ladder.
        seeds, tuning_seeds (`tuple[int, ...]`): of `settle` and `ladder`; of `step` and `tune`.
        max_steps (`int`): optimizer steps of a run.
        ways (`tuple[str, ...]`): of the ladder.
        remedy_seeds (`tuple[int, ...]`): of `remedy`, tuning seeds too.
    """

    tasks: tuple[str, ...] = TASKS
    seeds: tuple[int, ...] = TEST_SEEDS
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    max_steps: int = MAX_STEPS
    ways: tuple[str, ...] = tuple(WAYS)
    remedy_seeds: tuple[int, ...] = tuple(range(200, 208))

    def _spec(self, study: str, task: str, name: str, seed: int, **more: Any) -> BudgetSpec:
        return BudgetSpec(study, task, name, seed, LEARNING_RATE, self.max_steps, **more)

    def settle(self) -> list[BudgetSpec]:
        """Seed by seed, so that a study that is cut short has whole seeds."""
        return [
            self._spec("budget", task, name, seed)
            for seed, task in itertools.product(self.seeds, PROMISED)
            if task in self.tasks
            for name in ("dapo", f"target {PROMISED[task]}")
        ]

    def step(self) -> list[BudgetSpec]:
        """The same target, cut into batches and optimizer steps in four ways."""
        cuts = ({"steps_per_generation": n} for n in (4, 2, 1))
        return [
            self._spec("step", task, f"target {PROMISED[task]}", seed, split="validation", **cut)
            for cut in (*cuts, {"batch": 32})
            for task, seed in itertools.product(PROMISED, self.tuning_seeds[:2])
            if task in self.tasks
        ]

    def own(self) -> list[BudgetSpec]:
        """The length that the task ends with by itself as a target."""
        return [
            self._spec("own", task, name, seed, split="validation")
            for task, seed in itertools.product(OWN, self.tuning_seeds)
            if task in self.tasks
            for name in ("dapo", f"target {OWN[task]}")
        ]

    def ladder(self) -> list[BudgetSpec]:
        """Seed by seed."""
        return [
            self._spec("budget", task, name, seed)
            for seed, task in itertools.product(self.seeds, self.tasks)
            for way in self.ways
            for name in names_of(way, task)
        ]

    def identify(self) -> list[BudgetSpec]:
        """λ held at four values and at 0."""
        return [
            BudgetSpec("identify", task, name, self.tuning_seeds[0], LEARNING_RATE, 120, split="validation")
            for task in PROMISED
            if task in self.tasks
            for name in ("dapo", *(f"fixed {value}" for value in (-3, -2, -1, 1)))
        ]

    def remedy(self) -> list[BudgetSpec]:
        """The promised target as it is and with each remedy, and dapo."""
        return [
            self._spec("remedy", task, name, seed, split="validation")
            for task in PROMISED
            if task in self.tasks
            for seed in self.remedy_seeds
            for name in ("dapo", *(f"target {PROMISED[task]}{word}" for word in ("", *(f" {r}" for r in REMEDIES))))
        ]

    def tune(self) -> list[BudgetSpec]:
        """dapo, and every setting of its rivals in `TRIED`, on the tuning seeds."""
        return [
            self._spec("tune", task, name, seed, split="validation")
            for seed, task in itertools.product(self.tuning_seeds[:3], self.tasks)
            for way in ("dapo", *TRIED)
            for name in names_of(way, task, TRIED)
        ]

    def tune_set_points(self) -> list[BudgetSpec]:
        """Every rival with a set point of its own, and what it is compared with, on the tuning seeds."""
        return [
            self._spec("tune_set_points", "checked_sum", name, seed, split="validation")
            for seed in self.tuning_seeds
            for name in ("target 22", *TRIED_SET_POINTS)
        ]

    def set_points(self) -> list[BudgetSpec]:
        """Those that the rule keeps; `dapo` and "target 22" have run in `settle`."""
        return [self._spec("set_points", "checked_sum", name, seed) for seed in self.seeds for name in SET_POINTS]


SMOKE = Plan(TASKS[1:2], TUNING_SEEDS[:2], TUNING_SEEDS[:2], 8, remedy_seeds=TUNING_SEEDS[:1])


def main() -> None:
    """Parse the command line and do its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--smoke", action="store_true", help=f"a small version of it, in {SMOKE_FOLDER}")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="print the tables")
    parser.add_argument("--report", action="store_true", help="write tables and pictures")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    folder = SMOKE_FOLDER if args.smoke else RESULTS
    ledger, plan = Ledger(folder / "budget.csv", (*KEY, "batch", "split")), SMOKE if args.smoke else Plan()
    for part in args.parts:
        execute(getattr(plan, part)(), ledger, args.workers)
    if args.show or args.report:
        if args.show:
            print(report.tables(ledger.rows(), WAYS, PROMISED))
        if args.report:
            page = folder / PAGE.name if args.smoke else PAGE
            if args.smoke:
                page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
            report.write(ledger.rows(), WAYS, PROMISED, folder, page)


if __name__ == "__main__":
    main()
