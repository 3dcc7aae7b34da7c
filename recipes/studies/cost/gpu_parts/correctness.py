"""
Part a: the device computes what a CPU does, the loss waits for nothing, and λ lives with scalers, engines, compilers.

Every figure is a deviation with its bound in the metric's name; one beyond its bound fails the step.
"""

import dataclasses
import importlib.util
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from recipes.studies.cost.gpu_parts import probe
from recipes.studies.cost.gpu_parts.schedule import Context, Part, Rows
from recipes.studies.cost.gpu_parts.syncs import errors_in_ours
from recipes.studies.cost.measure.counters import counting
from recipes.studies.cost.measure.rows import row
from recipes.studies.cost.measure.trainers import BASELINE, build_trainer, measured_arms
from recipes.studies.cost.measure.workload import Workload

BENCH = "gpu a: correctness"
MINUTES = 4
SMALL = Workload(rows=16, group=8, completion=32)
TINY = Workload(rows=4, group=4, completion=8)
# fp32: other kernels, sums in another order. bf16: 8 bits of mantissa, and log-probabilities that differ by them.
BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}
COMPILED = 1e-4


class OutOfBounds(Exception):
    """A deviation is larger than its bound."""


def workload_for(context: Context, dtype: str = "float32") -> Workload:
    """The workload of this part on the device."""
    return dataclasses.replace(TINY if context.tiny else SMALL, device=context.device, dtype=dtype)


def deviation(mine: torch.Tensor, true: torch.Tensor) -> float:
    """Norm of the difference over that of what is true, NaN where either is."""
    scale = true.norm().item()
    return (mine - true).norm().item() / scale if scale else mine.norm().item()


@dataclass(frozen=True)
class Deviation:
    """A relative deviation and what it may be at most."""

    arm: str
    setting: str
    metric: str
    value: float
    bound: float

    def row(self) -> dict[str, Any]:
        return row(BENCH, self.arm, self.setting, f"{self.metric}, bound {self.bound:g}", self.value, "relative")


def check(deviations: list[Deviation]) -> None:
    """
    The last thing that a step does, when its rows are written.

    Raises:
        OutOfBounds: if a deviation is not within its bound, which NaN is not.
    """
    beyond = [f"{d.arm}, {d.setting}, {d.metric}: {d.value:.3g}" for d in deviations if not d.value <= d.bound]
    if beyond:
        raise OutOfBounds("; ".join(beyond))


def compared(arm: str, setting: str, mine: dict[str, Any], true: dict[str, Any], bound: float) -> list[Deviation]:
    """What one training did against another."""
    found = [
        Deviation(arm, setting, metric, deviation(mine[name], true[name]), bound)
        for metric, name in (("loss", "loss"), ("gradient", "gradient"), ("dL/dλ", "lambda_gradient"))
        if name in mine and true[name].numel()
    ]
    if true["lambdas"]:
        lambdas = [torch.tensor(side["lambdas"], dtype=torch.float64) for side in (mine, true)]
        found.append(Deviation(arm, setting, "λ over steps", deviation(*lambdas), bound))
    weights = [torch.cat([side["weights"][k].flatten() for k in sorted(true["weights"])]) for side in (mine, true)]
    found.append(Deviation(arm, setting, "weights at the end", deviation(*weights), bound))
    return found


def against_the_cpu(context: Context) -> Iterator[Rows]:
    """Three steps of every arm in fp32 and bf16, on the device and on a CPU, each side in one process."""
    cells = [(dtype, arm) for dtype in BOUNDS for arm in measured_arms()]
    sides = []
    for device in (context.device, "cpu"):
        jobs = []
        for dtype, arm in cells:
            workload = dataclasses.replace(workload_for(context, dtype), device=device)
            jobs.append({"arm": arm, "workload": dataclasses.asdict(workload)})
        sides.append(probe.launch(jobs, context.folder / f"on {device}", device))
    deviations: list[Deviation] = []
    for (dtype, arm), mine, true in zip(cells, *sides, strict=True):
        found = compared(arm, f"{dtype}, against a CPU", mine, true, BOUNDS[dtype])
        deviations += found
        yield [one.row() for one in found]
    check(deviations)


def no_waiting(context: Context) -> Iterator[Rows]:
    """CUDA's sync debug mode as an error in the package's methods, and as many device reads as TRL's own loss has."""
    reads: dict[str, int] = {}
    entered: dict[str, int] = {}
    workload = workload_for(context)
    for arm in measured_arms():
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(arm, workload, folder)
        inputs = trainer._buffered_inputs[0]
        with errors_in_ours(trainer) as seen:
            trainer.compute_loss(trainer.model_wrapped, inputs).backward()
        entered[arm] = sum(seen.values())
        with counting(context.device) as counts:
            trainer.compute_loss(trainer.model_wrapped, inputs)
        checks = counts.argument_checks if context.device == "cpu" else 0
        reads[arm] = counts.reads.total() - checks
        yield [
            row(BENCH, arm, "loss", "methods of ours entered, waiting an error", entered[arm], "count"),
            row(BENCH, arm, "loss", "device reads", reads[arm], "count"),
        ]
    more = {arm: n for arm, n in reads.items() if n != reads[BASELINE]}
    unwatched = [arm for arm, n in entered.items() if (n == 0) != (arm in (BASELINE, "GRPOTrainer again"))]
    if more or unwatched:
        raise OutOfBounds(f"device reads other than {BASELINE}'s: {more}; not watched: {unwatched}")


class Overflow(TrainerCallback):
    """Makes the loss scale so large that the gradients of one step are not finite; records λ and the weights."""

    def __init__(self, trainer: Any, at: int) -> None:
        self.trainer, self.at = trainer, at
        self.seen: list[tuple[float, torch.Tensor]] = []

    def _record_state(self) -> None:
        weights = torch.cat([p.detach().flatten() for p in self.trainer.model.parameters()])
        self.seen.append((self.trainer.lambda_value, weights))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.seen:
            self._record_state()
        scaler = self.trainer.accelerator.scaler
        # fp16 overflows at 65504; the CPU's gradients are fp32.
        large = 2.0**100 if self.trainer.accelerator.device.type == "cuda" else math.inf
        scaler.load_state_dict(scaler.state_dict() | {"scale": large if state.global_step == self.at else 256.0})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._record_state()


def half_precision(context: Context) -> Iterator[Rows]:
    """fp16 with a gradient scaler: a step that overflows moves neither weights nor λ, the next one moves both."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": 3, "fp16": context.device == "cuda", "learning_rate": 1e-3}
        trainer = build_trainer("lambda_grpo", workload_for(context), folder, settings=settings, train=False)
        if context.device == "cpu":
            scale_on_cpu(trainer)
        callback = Overflow(trainer, at=1)
        trainer.add_callback(callback)
        trainer.train()
    before, first, skipped, last = callback.seen
    facts = {
        "the first step moves λ": first[0] != before[0],
        "the first step moves the weights": not torch.equal(first[1], before[1]),
        "the overflow leaves λ": skipped[0] == first[0],
        "the overflow leaves the weights": torch.equal(skipped[1], first[1]),
        "the step after it moves λ": last[0] != skipped[0] and math.isfinite(last[0]),
        "the step after it moves the weights": not torch.equal(last[1], skipped[1]),
    }
    yield [
        row(BENCH, "lambda_grpo", "fp16, gradient scaler", fact, int(true), "holds") for fact, true in facts.items()
    ]
    if not all(facts.values()):
        raise OutOfBounds(", ".join(fact for fact, true in facts.items() if not true))


def scale_on_cpu(trainer: Any) -> None:
    """Give the trainer a gradient scaler where accelerate gives none, as it would on a GPU with fp16."""
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu")
    clip = accelerator.clip_grad_norm_

    def unscaled(*args: Any, **kwargs: Any) -> Any:
        accelerator.scaler.unscale_(trainer.optimizer.optimizer)
        return clip(*args, **kwargs)

    accelerator.clip_grad_norm_ = unscaled


def under_an_engine(engine: str, context: Context) -> Iterator[Rows]:
    """Three steps with λ learned under FSDP2 or ZeRO-3 on one process, against the plain ones on the same device."""
    if engine == "zero3" and importlib.util.find_spec("deepspeed") is None:
        yield [row(BENCH, "lambda_grpo", engine, "not run", "deepspeed is not installed", "")]
        return
    job = {
        "arm": "lambda_grpo",
        "workload": dataclasses.asdict(workload_for(context)),
        "settings": {"max_grad_norm": 0.5},
    }
    (mine,) = probe.launch([job], context.folder / engine, context.device, engine)
    (true,) = probe.launch([job], context.folder / "plain", context.device)
    mine["weights"] = {name.removeprefix("module."): value for name, value in mine["weights"].items()}
    yield [row(BENCH, "lambda_grpo", engine, "runs under", mine["wrapper"], "")]
    found = compared("lambda_grpo", f"{engine}, one process, against none", mine, true, BOUNDS["float32"])
    yield [one.row() for one in found]
    if mine["wrapper"] == true["wrapper"]:
        raise OutOfBounds(f"{engine} ran under {mine['wrapper']}, as no engine does")
    check(found)


def compiled(context: Context) -> Iterator[Rows]:
    """Three steps under `torch.compile`, against eager ones on the same device."""
    workload = dataclasses.asdict(workload_for(context))
    # Set aside, the compiler's back end is: a CPU may have no C++ compiler, and takes minutes with one.
    backend = "inductor" if context.device == "cuda" else "aot_eager"
    jobs = [{"arm": arm, "workload": workload} for arm in ("lambda_grpo", "unified")]
    compiling = [job | {"settings": {"torch_compile": True, "torch_compile_backend": backend}} for job in jobs]
    seen = probe.launch(jobs + compiling, context.folder / "compiled", context.device)
    deviations: list[Deviation] = []
    for job, true, mine in zip(jobs, seen[:2], seen[2:], strict=True):
        mine["weights"] = {name.removeprefix("_orig_mod."): value for name, value in mine["weights"].items()}
        setting = f"torch.compile, {backend}"
        yield [row(BENCH, job["arm"], setting, "runs under", mine["wrapper"], "")]
        if mine["wrapper"] == true["wrapper"]:
            raise OutOfBounds(f"nothing is compiled: the model is a {mine['wrapper']}")
        found = compared(job["arm"], setting, mine, true, COMPILED)
        deviations += found
        yield [one.row() for one in found]
    check(deviations)


PART = Part(
    BENCH,
    MINUTES,
    (
        ("device against CPU", against_the_cpu),
        ("no waiting in the loss", no_waiting),
        ("fp16 with a gradient scaler", half_precision),
        ("FSDP2", lambda context: under_an_engine("fsdp2", context)),
        ("ZeRO-3", lambda context: under_an_engine("zero3", context)),
        ("torch.compile", compiled),
    ),
)
