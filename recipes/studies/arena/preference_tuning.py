"""
What was tried for λ's rule "regression", on the tuning seeds 0 to 11 and the validation split.

    python -m recipes.arena.comparison.preference_tuning --seeds 4

Each variant is an arm and constants of `trl_lambda`, by module and name. Rows go to
`recipes/arena/results/preference_tuning.csv`; a run that is there already is not made again. The figures are read with
`--show`.
"""

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from recipes.arena.comparison.arms import ARMS, Arm
from recipes.arena.comparison.ledger import Ledger
from recipes.arena.comparison.run import LAMBDA_EVERY, RunSpec, run
from trl_lambda.preference import making, rules
from trl_lambda.weights import length_weight

RESULTS = Path(__file__).parent.parent / "results" / "preference_tuning.csv"
KEY = ("task", "arm", "seed", "max_steps", "steps_per_generation")
LEARNING_RATE = 3e-4
_THREE = ["length", "mean_logp", "min_logp"]
_POSITIVE3 = {"aggregation": "power", "lambda_side": "positive", "lambda_features": _THREE}

_TR = {"token_regulation": "sigmoid"}
_AR = {"token_regulation": "linear", "regulation_alpha": 0.6}

# name -> (options, constants of `rules` and `length_weight`)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "dapo": ({"aggregation": "dapo"}, {}),
    "positive_weight_3": ({"aggregation": "dapo", "positive_weight": 3.0}, {}),
    "positive3": (_POSITIVE3, {}),
    "positive3, κ = 1": ({**_POSITIVE3, "lambda_gain": 1.0}, {}),
    "positive3, κ = 4": ({**_POSITIVE3, "lambda_gain": 4.0}, {}),
    "positive3, λ's rate 0.3": ({**_POSITIVE3, "lambda_learning_rate": 0.3}, {}),
    "positive3, ridge 0.01": (_POSITIVE3, {"_RIDGE": 0.01}),
    "positive3, decay 0.8": (_POSITIVE3, {"_DECAY": 0.8}),
    "positive3, decay 0.95": (_POSITIVE3, {"_DECAY": 0.95}),
    "positive3, clamp 1": (_POSITIVE3, {"PREFERENCE_BOUND": 1.0}),
    "positive3, clamp 4": (_POSITIVE3, {"PREFERENCE_BOUND": 4.0}),
    "positive3, κ fading": (_POSITIVE3, {"fading": 1.0}),
    "positive3, mean held": ({}, {}),
    "positive3, λ's rate 1": ({**_POSITIVE3, "lambda_learning_rate": 1.0}, {}),
    "positive3, clip 4": ({**_POSITIVE3, "lambda_max_grad_norm": 4.0}, {}),
    "positive3, λ = κw at once": (_POSITIVE3, {"at_once": 1.0}),
    "positive3 × TR": ({**_POSITIVE3, **_TR}, {}),
    "positive3 × AR": ({**_POSITIVE3, **_AR}, {}),
    "positive3 × positive_weight_3": ({**_POSITIVE3, "positive_weight": 3.0}, {}),
    "length and min_logp": ({**_POSITIVE3, "lambda_features": ["length", "min_logp"]}, {}),
    "length and mean_logp": ({**_POSITIVE3, "lambda_features": ["length", "mean_logp"]}, {}),
    "positive": ({"aggregation": "power", "lambda_side": "positive"}, {}),
    "signed": ({"aggregation": "power", "lambda_side": "signed"}, {}),
}
TASKS = ("running_sum", "slippery_chain", "idle_filler")


HELD = "positive3, mean held"


class Fading(rules.Regression):
    """κ falls on a straight line to 0 over the generation batches of a run of 100 optimizer steps."""

    batches = 25

    def observe(self, batch: Any, mean_reward: float) -> None:
        self._initial = getattr(self, "_initial", self._gain)
        self._gain = max(self._gain - self._initial / self.batches, 0.0)
        super().observe(batch, mean_reward)


class AtOnce(rules.Regression):
    """λ is where it is drawn to from the next optimizer step on, past its optimizer."""

    def gradient(self, lam: Any) -> Any:
        with torch.no_grad():
            lam -= super().gradient(lam)
        return torch.zeros_like(lam)


_RULES: dict[str, type[rules.Regression]] = {"fading": Fading, "at_once": AtOnce}


@contextmanager
def constants(values: dict[str, float]) -> Iterator[None]:
    """The package with other constants, or with another rule."""
    changes: list[tuple[Any, str, Any]] = []
    for name, value in values.items():
        if name in _RULES:
            changes.append((making, "Regression", _RULES[name]))
        else:
            changes.append((rules if hasattr(rules, name) else length_weight, name, value))
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def tune(tasks: tuple[str, ...], variants: tuple[str, ...], seeds: range, max_steps: int, results: Path) -> None:
    """Make the runs that are not there yet, seed by seed, so that a cut-off tuning has whole pairs."""
    ledger = Ledger(results, KEY)
    done = ledger.done()
    for seed in seeds:
        for variant in variants:
            for task in tasks:
                spec = RunSpec("preference", task, variant, seed, LEARNING_RATE, max_steps, split="validation")
                if tuple(str(getattr(spec, name)) for name in KEY) in done:
                    continue
                options, changed = VARIANTS[variant]
                own = "recipes.arena.comparison.held_power.held_positive3" if variant == HELD else None
                ARMS[variant] = Arm(variant, options, length_weight=own)
                with constants(changed):
                    row = run(spec)
                ledger.append(row | {"constants": str(changed)})
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
