"""
Part b: what a step costs beside `GRPOTrainer`, at the shape of Qwen2.5-1.5B with random weights.

bf16, gradient checkpointing, eight completions of up to 1024 tokens; all weights, then LoRA. All trainers are in one
process, on one set of weights and optimizer moments where all weights are trained, and step in turns.
"""

import gc
import math
import tempfile
import time
from collections.abc import Iterator

from recipes.studies.cost.gpu_parts.schedule import Context, Part, Rows
from recipes.studies.cost.measure.memory import memory_rows
from recipes.studies.cost.measure.stepping import CPU_TIME, WHOLE, Stepper, rounds
from recipes.studies.cost.measure.traffic import traffic_rows
from recipes.studies.cost.measure.trainers import BASELINE, measured_arms
from recipes.studies.cost.measure.workload import Workload
from recipes.studies.cost.overhead import compared, make_trainers

BENCH = "gpu b: cost"
MINUTES = 8
STEPS = 2  # of each side of a pair
FIRST_ROWS, MOST_ROUNDS = 3, 48  # rounds of pairs


def workload_for(context: Context, lora: bool) -> Workload:
    """The workload of this part on the device."""
    if context.tiny:
        return Workload(rows=4, group=4, completion=8, lora=lora, device=context.device)
    return Workload(
        "qwen2.5-1.5b",
        rows=8,
        completion=1024,
        dtype="bfloat16",
        checkpointing=True,
        lora=lora,
        device=context.device,
        logging_steps=10,  # GRPOConfig's own
    )


def cost(lora: bool, context: Context) -> Iterator[Rows]:
    """Memory and traffic, then rounds of pairs until half of the part's time is left, or none."""
    workload = workload_for(context, lora)
    ends = context.ends if lora else (time.monotonic() + context.ends) / 2
    with tempfile.TemporaryDirectory() as folder:
        trainers = make_trainers(workload, measured_arms(), folder, share_model=not lora)
        yield memory_rows(BENCH, trainers, workload)
        yield traffic_rows(BENCH, trainers, workload)
        gc.collect()
        steppers = {arm: Stepper(trainer) for arm, trainer in trainers.items()}
        base, setting = steppers.pop(BASELINE), workload.describe()
        most = 2 if context.tiny else MOST_ROUNDS
        for number, taken in enumerate(rounds(base, steppers, steps=STEPS, by_phase=False), start=1):
            last = number >= most or time.monotonic() >= ends
            # Medians over all pairs so far, each time that these are twice as many: of equal rows the last counts.
            if last or math.log2(number / FIRST_ROWS).is_integer():
                yield compared(BENCH, taken, setting, (WHOLE, CPU_TIME), STEPS)
            if last:
                break


PART = Part(
    BENCH,
    MINUTES,
    (("all weights", lambda context: cost(False, context)), ("LoRA", lambda context: cost(True, context))),
)
