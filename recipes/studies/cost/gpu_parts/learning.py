"""
Part d: the base model and the main arms of `arena.large` on one task, seed by seed, as far as the time goes.

The learning rate is the middle one of the grid for every arm: tuning is hours. Rows of the runs go to the large
arena's own folder, or beside the CSV file that `--out` names, and a later call goes on there; here stand their means.
"""

import json
from collections.abc import Iterator

from recipes.studies.arena import large
from recipes.studies.arena.study import do_parts
from recipes.studies.cost.gpu_parts.schedule import Context, Part, Rows
from recipes.studies.cost.measure.rows import RESULTS, row
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.workers import KEY

BENCH = "gpu d: learning"
MINUTES = 7
TASK = "long_sum"
BENCH_FOLDER = RESULTS.parent


def base(context: Context) -> Iterator[Rows]:
    """Make the base model, unless it is there."""
    spec = large.base_model(TASK, large.TINY if context.tiny else large.FULL)
    if context.tiny or not (spec.folder / "measured.json").exists():
        measured = large.make_base(spec, context.device)
        accuracy = measured["tasks"][TASK]["accuracy_sampled"]
        yield [
            row(BENCH, "base", TASK, "sampled accuracy", float(accuracy), "share"),
            row(BENCH, "base", TASK, "time", float(measured["seconds"]), "s"),
        ]


def arms(context: Context) -> Iterator[Rows]:
    """The main arms, seed by seed, with one learning rate for all."""
    size = large.TINY if context.tiny else large.FULL
    plan = large.make_plan(
        (TASK,), seeds=1 if context.tiny else len(large.TEST_SEEDS), size=size, device=context.device
    )
    results = large.RESULTS if context.results == BENCH_FOLDER else context.results / large.RESULTS.name
    rates = dict.fromkeys(plan.arms, plan.learning_rates[len(plan.learning_rates) // 2])
    results.mkdir(parents=True, exist_ok=True)
    if not (results / "learning_rates.json").exists():
        (results / "learning_rates.json").write_text(json.dumps(rates, indent=2) + "\n", encoding="utf-8")
    do_parts(["main"], plan, results, 1 if context.tiny else 4, context.time_is_up)
    rows = Ledger(results / "runs.csv", KEY).rows()
    for arm in plan.arms:
        rewards = [float(one["auc"]) for one in rows if one["arm"] == arm]
        if rewards:
            yield [row(BENCH, arm, f"{TASK}, {plan.max_steps} steps", "mean training reward", rewards, "share")]


PART = Part(BENCH, MINUTES, (("base model", base), ("main arms", arms)))
