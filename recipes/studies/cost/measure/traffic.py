"""Transfers between host and device and collectives of a loss, an optimizer step, a log and a generation batch."""

from typing import Any

from recipes.studies.cost.measure.counters import Counts, counting
from recipes.studies.cost.measure.rows import row
from recipes.studies.cost.measure.stepping import scoring_aside, stepping
from recipes.studies.cost.measure.trainers import BASELINE
from recipes.studies.cost.measure.workload import Workload


def count_parts(trainer: Any) -> dict[str, Counts]:
    """
    Count in each part of a trainer's work.

    Returns:
        `dict[str, Counts]`: `"loss"`: one `compute_loss`; `"step"`: one optimizer step without a log, its losses
        among it; `"step with log"`; `"generation"`: scoring of one generation batch of prepared completions.
    """
    counts: dict[str, Counts] = {}
    device = trainer.accelerator.device.type
    batch = [{"prompt": p} for p in trainer.train_dataset["prompt"] for _ in range(trainer.num_generations)]
    rows = trainer.args.generation_batch_size // trainer.accelerator.num_processes
    with scoring_aside(trainer), counting(device) as counts["generation"]:
        trainer._generate_and_score_completions(batch[:rows])
    with counting(device) as counts["loss"]:
        trainer.compute_loss(trainer.model_wrapped, trainer._buffered_inputs[0])
    every = trainer.args.logging_steps
    with stepping(trainer) as stepper:
        for part, logging_steps in (("step", 10**9), ("step with log", 1)):
            trainer.args.logging_steps = trainer.state.logging_steps = logging_steps
            with counting(device) as counts[part]:
                stepper.step()
    trainer.args.logging_steps = trainer.state.logging_steps = every
    return counts


def traffic_rows(bench: str, trainers: dict[str, Any], workload: Workload) -> list[dict[str, Any]]:
    """Rows of the counts, those of the package beside TRL's."""
    rows, setting = [], workload.describe()
    base = count_parts(trainers[BASELINE])
    for arm, trainer in trainers.items():
        mine = base if arm == BASELINE else count_parts(trainer)
        for part, counts in mine.items():
            checks = counts.argument_checks if workload.device == "cpu" else 0
            values = {
                "device reads": counts.reads.total() - checks,
                "host writes": counts.writes.total(),
                "collectives": len(counts.collectives),
                "elements of the collectives": sum(n for _, n in counts.collectives),
            }
            if checks:
                values["argument checks that only a CPU makes"] = checks
            rows += [row(bench, arm, setting, f"{part}: {name}", value, "count") for name, value in values.items()]
    return rows
