"""Single optimizer steps of a trainer on buffered completions, timed by phase, and pairs of two trainers."""

import contextlib
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from recipes.studies.cost.measure.clock import in_turn, now, seconds_of

PHASES = ("loss forward", "backward", "optimizer")
LOSS = "loss and backward"  # the first two together
# The CPU's own time is not disturbed by what else the machine does.
WHOLE, CPU_TIME, REST = "whole step", "whole step, CPU time", "rest of the step"

# By arm, the seconds of baseline and arm in each pair, by phase.
Pairs = dict[str, list[tuple[dict[str, float], dict[str, float]]]]


class Stepper:
    """
    Steps a trainer that has been through `train()` once, always on the generation batch it holds.

    A step is what `Trainer` does for one: the micro-batches' `training_step`, the check for NaN, the clip, the
    callbacks, optimizer and schedule, and the log when one is due. Generation is left out, which every other cost
    would vanish beside.

    Args:
        trainer: A `GRPOTrainer` or a subclass of it.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.seconds: dict[str, float] = defaultdict(float)
        self.by_phase = True
        self._loss = torch.zeros((), device=trainer.accelerator.device)
        buffered = itertools.cycle(list(trainer._buffered_inputs))
        trainer._prepare_inputs = lambda batch: next(buffered)
        trainer.compute_loss = self._timed("loss forward", trainer.compute_loss)
        trainer.accelerator.backward = self._timed("backward", trainer.accelerator.backward)

    def run(self, steps: int) -> None:
        """Step, and add the time to `seconds`; a device is waited for at both ends."""
        start, cpu_start = self._now(), time.process_time()
        for _ in range(steps):
            self.step()
        self.seconds[WHOLE] += self._now() - start
        self.seconds[CPU_TIME] += time.process_time() - cpu_start

    def step(self) -> None:
        """One optimizer step."""
        trainer, handler = self.trainer, self.trainer.callback_handler
        args, state, model = trainer.args, trainer.state, trainer.model_wrapped
        trainer.control = handler.on_step_begin(args, state, trainer.control)
        for micro_batch in range(args.gradient_accumulation_steps):
            last = micro_batch == args.gradient_accumulation_steps - 1
            trainer.accelerator.gradient_state._set_sync_gradients(last)
            with contextlib.nullcontext() if last else trainer.accelerator.no_sync(model):
                loss = trainer.training_step(model, None, None)
            if not torch.isnan(loss) | torch.isinf(loss):
                self._loss += loss
        trainer.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        trainer.control = handler.on_pre_optimizer_step(args, state, trainer.control)
        with self._phase("optimizer"):
            trainer.optimizer.step()
        trainer.control = handler.on_optimizer_step(args, state, trainer.control)
        trainer.lr_scheduler.step()
        model.zero_grad()
        state.global_step += 1
        trainer.control = handler.on_step_end(args, state, trainer.control)
        if trainer.control.should_log:
            trainer.control.should_log = False
            if hasattr(trainer, "reduce_metrics"):  # as LambdaGRPOTrainer does before TRL's log
                trainer.reduce_metrics("train")
            trainer.log({"loss": self._loss.item()})
            self._loss.zero_()

    def taken(self) -> dict[str, float]:
        """Seconds by phase since the last call, what no phase accounts for among them."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        if self.by_phase:
            seconds[LOSS] = seconds["loss forward"] + seconds["backward"]
            seconds[REST] = seconds[WHOLE] - sum(seconds[phase] for phase in PHASES)
        return seconds

    def _timed(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._phase(phase):
                return method(*args, **kwargs)

        return timed

    @contextlib.contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        if not self.by_phase:
            yield
            return
        start = self._now()
        yield
        self.seconds[phase] += self._now() - start

    def _now(self) -> float:
        return now(self.trainer.accelerator.device.type)


@contextlib.contextmanager
def stepping(trainer: Any) -> Iterator[Stepper]:
    """A `Stepper` for the block, which leaves the trainer's own methods as they were."""
    kept = trainer._prepare_inputs, trainer.compute_loss, trainer.accelerator.backward
    try:
        yield Stepper(trainer)
    finally:
        trainer._prepare_inputs, trainer.compute_loss, trainer.accelerator.backward = kept


@contextlib.contextmanager
def scoring_aside(trainer: Any) -> Iterator[None]:
    """Score rows in the block: the package's trainer goes on with the generation batch that it holds."""
    scoring = vars(trainer).get("_scoring")  # TRL's trainer has none
    kept = {} if scoring is None else dict(scoring.batches)
    yield
    if scoring is not None:
        scoring.batches = kept


def time_pairs(base: Stepper, arms: dict[str, Stepper], *, pairs: int, steps: int, by_phase: bool = True) -> Pairs:
    """
    Time each arm beside the baseline, in pairs whose order alternates and whose arms rotate, so that drift is shared.

    Args:
        base (`Stepper`): the baseline.
        arms (`dict[str, Stepper]`): the others.
        pairs (`int`): of each arm.
        steps (`int`): optimizer steps of each side of a pair.
        by_phase (`bool`): Wait for the device around each phase and take the steps in turns, A B A B. `False` takes
            each side's steps in one go and waits at their end only, as a run does: a device then has work queued.

    Returns:
        `dict[str, list]`: by arm, the seconds of baseline and arm in each pair.
    """
    *_, taken = itertools.islice(rounds(base, arms, steps=steps, by_phase=by_phase), pairs)
    return taken


def rounds(base: Stepper, arms: dict[str, Stepper], *, steps: int, by_phase: bool = True) -> Iterator[Pairs]:
    """`time_pairs` without an end: all pairs so far, after each round of one pair for every arm."""
    taken: Pairs = {name: [] for name in arms}
    names = list(arms)
    for stepper in (base, *arms.values()):
        stepper.by_phase = by_phase
        stepper.run(1)
        stepper.taken()
    for number in itertools.count():
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            sides = in_turn(number, base, arms[name])
            for _ in range(steps if by_phase else 1):
                for side in sides:
                    side.run(1 if by_phase else steps)
            taken[name].append((base.taken(), arms[name].taken()))
        yield taken


def time_scoring(base: Any, other: Any, pairs: int) -> list[tuple[float, float]]:
    """
    Seconds of `_generate_and_score_completions` with prepared completions, in pairs: what a generation batch costs
    beside the sampling.

    Args:
        base, other: the two trainers.
        pairs (`int`): how many pairs.
    """

    def run(trainer: Any) -> float:
        rows = trainer.args.generation_batch_size // trainer.accelerator.num_processes
        batch = [{"prompt": trainer.train_dataset[i // trainer.num_generations]["prompt"]} for i in range(rows)]
        device = trainer.accelerator.device.type
        with scoring_aside(trainer):
            return seconds_of(lambda: trainer._generate_and_score_completions(batch), 1, device)[0]

    for trainer in (base, other):
        run(trainer)
    taken = []
    for number in range(pairs):
        seconds = {id(trainer): run(trainer) for trainer in in_turn(number, base, other)}
        taken.append((seconds[id(base)], seconds[id(other)]))
    return taken
