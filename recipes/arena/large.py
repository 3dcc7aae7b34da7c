"""
The arena with a model of 19 million parameters and answers of up to 100 tokens and more, for a GPU:
`python -m recipes.arena.large base tune choose main`. `base` makes the base models, the other parts are those of
`recipes.arena.comparison.study`; rows go to `results_large/`.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from recipes.arena.comparison.run import RunSpec
from recipes.arena.comparison.study import TEST_SEEDS, Plan, do_parts
from recipes.playground.make_base_model import SEED, BaseModel, make
from recipes.playground.tasks import LONG_TASKS

RESULTS = Path(__file__).parent / "results_large"
MODELS = Path("runs") / "arena_large"
LEARNING_RATES = (1e-5, 3e-5, 1e-4)
ARMS = ("grpo", "dapo", "dr_grpo", "softmax", "power", "power_+1", "delta_l", "tr", "ar", "softmax_tr")
MAX_COMPLETION_LENGTH = 160


def base_model(task: str) -> BaseModel:
    """How the base model of a long task is made; `runs/` holds it, as it is too large to be committed."""
    return BaseModel(
        task,
        MODELS / task,
        hidden_size=384,
        num_layers=8,
        max_length=256,
        max_new_tokens=MAX_COMPLETION_LENGTH,
        learning_rate=1e-3,
    )


@dataclass(frozen=True)
class LargeSpec(RunSpec):
    """
    A run of the large arena.

    Args:
        device (`str`): `"cuda"` or `"cpu"`.
    """

    device: str = "cuda"

    @property
    def base_model(self) -> Path:
        return base_model(self.task).folder

    @property
    def max_completion_length(self) -> int:
        return MAX_COMPLETION_LENGTH

    @property
    def use_cpu(self) -> bool:
        return self.device == "cpu"


def main() -> None:
    """Parse the command line and do its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("base", "tune", "choose", "main"), metavar="PART")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seeds", type=int, default=len(TEST_SEEDS), help="test seeds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=4, help="processes that share the device (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files (default: %(default)s)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is there; --device cpu would take days")
    tasks = tuple(LONG_TASKS)
    plan = Plan(
        ARMS,
        tasks,
        tuple(range(args.seeds)),
        args.steps,
        tasks,
        LEARNING_RATES,
        partial(LargeSpec, device=args.device),
    )
    for task in tasks if "base" in args.parts else ():
        make(base_model(task), SEED, base_model(task).folder, args.device)
    do_parts([part for part in args.parts if part != "base"], plan, args.results, args.workers)


if __name__ == "__main__":
    main()
