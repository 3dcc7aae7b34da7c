"""
The arena with longer answers: 19 million parameters for a GPU, 1.1 million (the size called 0.8M) for two cores.

    python -m recipes.studies.arena.large base tune choose main                       # a GPU
    python -m recipes.studies.arena.large base main --size 0.8M --seeds 6             # two cores, about an hour

`base` makes the base models, the other parts are those of `recipes.studies.arena.study`; rows go to
`results_large/` and `results_0.8M/`. The small size has no `tune`: all its arms have one learning rate.
"""

import argparse
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recipes.playground.make_base_model import SEED, BaseModel, make
from recipes.playground.tasks import LONG_TASKS
from recipes.studies.arena.planned import FIRST_SEED
from recipes.studies.arena.study import TEST_SEEDS, Plan, do_parts
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.run import RunSpec
from recipes.studies.shared.workers import KEY, execute

RESULTS = Path(__file__).parent / "results_large"
MODELS = Path("runs") / "arena_large"
LEARNING_RATES = (1e-5, 3e-5, 1e-4)
ARMS = ("dapo", "positive_weight_3", "positive3", "grpo", "softmax", "tr")
MAX_COMPLETION_LENGTH = 160


@dataclass(frozen=True)
class Size:
    """
    How large a study is.

    Args:
        name (`str`): in the rows, and the folder of the base models.
        hidden_size, num_layers (`int`): of the model.
        arms (`tuple[str, ...]`): names in `ARMS`.
        pretraining (`dict`): what the base model's schedule changes.
        tasks (`tuple[str, ...]`): names in `LONG_TASKS`.
        learning_rate (`float`, *optional*): of all arms; None where each is tuned.
        device (`str`): `"cuda"` or `"cpu"`.
    """

    name: str
    hidden_size: int
    num_layers: int
    arms: tuple[str, ...] = ARMS
    pretraining: dict[str, Any] = field(default_factory=dict, hash=False)
    tasks: tuple[str, ...] = tuple(LONG_TASKS)
    learning_rate: float | None = None
    device: str = "cuda"


FULL = Size("19M", 384, 8, pretraining={"measure_every": 100})
SMALL = Size(
    "0.8M",
    128,
    4,
    ("dapo", "positive_weight_3", "positive3"),
    {"learning_rate": 2e-3, "problems": 256},
    tasks=("long_sum",),
    learning_rate=3e-4,
    device="cpu",
)
# Learns nothing: it only shows that every line runs.
TINY = Size(
    "tiny",
    16,
    1,
    ("grpo", "softmax"),
    {
        "steps": 4,
        "first_measure": 2,
        "measure_every": 2,
        "accuracy_range": (0.0, 1.0),
        "styles_by_equals_sign": False,
        "problems": 16,
    },
)
SIZES = {size.name: size for size in (FULL, SMALL, TINY)}


def base_model(task: str, size: Size = FULL) -> BaseModel:
    """How the base model of a long task is made; `runs/` holds it, as it is too large to be committed."""
    return BaseModel(
        task,
        MODELS / size.name / task,
        hidden_size=size.hidden_size,
        num_layers=size.num_layers,
        max_length=256,
        max_new_tokens=MAX_COMPLETION_LENGTH,
        **{"learning_rate": 1e-3, **size.pretraining},
    )


def make_base(spec: BaseModel, device: str) -> dict[str, Any]:
    """Make a base model and return what its `measured.json` holds."""
    return make(spec, SEED, spec.folder, device)


@dataclass(frozen=True)
class LargeSpec(RunSpec):
    """
    A run of the large arena.

    Args:
        device (`str`): `"cuda"` or `"cpu"`.
        size (`str`): a name in `SIZES`.
    """

    device: str = "cuda"
    size: str = FULL.name

    @property
    def base_model(self) -> Path:
        return base_model(self.task, SIZES[self.size]).folder

    @property
    def max_completion_length(self) -> int:
        return MAX_COMPLETION_LENGTH

    @property
    def use_cpu(self) -> bool:
        return self.device == "cpu"


def make_plan(tasks: tuple[str, ...], *, seeds: int, size: Size, device: str, steps: int = 100) -> Plan:
    """
    The plan of a study.

    Args:
        tasks (`tuple[str, ...]`): names in `LONG_TASKS`.
        seeds (`int`): test seeds, from `FIRST_SEED` on.
        size (`Size`): of the models; a tiny study also takes two steps only.
        device (`str`): `"cuda"` or `"cpu"`.
        steps (`int`): optimizer steps of a run.
    """
    spec = partial(LargeSpec, device=device, size=size.name)
    steps = 2 if size is TINY else steps
    return Plan(size.arms, tasks, tuple(range(FIRST_SEED, FIRST_SEED + seeds)), steps, tasks, LEARNING_RATES, spec, {})


def main() -> None:
    """Parse the command line and do its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("base", "tune", "choose", "main"), metavar="PART")
    parser.add_argument("--size", choices=SIZES, default=FULL.name, help="of the models (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the size's")
    parser.add_argument("--seeds", type=int, default=len(TEST_SEEDS), help="test seeds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes that share the device (default: 4, on a CPU its cores)")
    parser.add_argument(
        "--results", type=Path, help="folder of the CSV files (default: results_large or results_SIZE)"
    )
    args = parser.parse_args()
    size = SIZES[args.size]
    device = args.device or size.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is there; --device cpu would take days, --size 0.8M about an hour")
    if size.learning_rate is not None and {"tune", "choose"} & set(args.parts):
        parser.error(f"--size {size.name} has one learning rate for all arms: leave tune and choose out")
    results = args.results or (RESULTS if size is FULL else RESULTS.with_name(f"results_{size.name}"))
    workers = args.workers or (4 if device == "cuda" else os.cpu_count() or 1)
    plan = make_plan(size.tasks, seeds=args.seeds, size=size, device=device, steps=args.steps)
    for task in size.tasks if "base" in args.parts else ():
        make_base(base_model(task, size), device)
    parts = [part for part in args.parts if part != "base"]
    if size.learning_rate is None:
        do_parts(parts, plan, results, workers)
    elif parts:
        specs = plan.main(dict.fromkeys(size.arms, size.learning_rate))
        execute(specs, Ledger(results / "runs.csv", KEY), workers)


if __name__ == "__main__":
    main()
