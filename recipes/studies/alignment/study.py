"""
Which weights point where learning goes, and when? `python -m recipes.studies.alignment.study` writes
`results/alignment.csv`.

At the base model and along runs of `dapo`, batches of 64 completions are sampled from the model as it is, and the
gradient of every weight of `weights` is held against the policy gradient, as `policy_gradient` says. One row
per task, checkpoint, seed and weight:

- `cosine_*`: mean over batches; `ratio_*`: that divided by the one of λ = 0, with its standard error `*_se`; in
  Euclid's metric (`raw`) and in that of Adam's step (`adam`);
- `same_as`: a weight that this one is a constant multiple of at ρ = 1, and whose figures it shares;
- `lambda_gradient`, where λ is learned by descent: dL/dλ at its start, mean over batches; λ moves against its sign.
  `slope_*`: by how much the ratio grows per unit of λ there.

A λ that follows a regression has no such columns: `*_settled` are its weights where the rule has led it.

`--planned` does question H5 of `../PLAN.md`: five tasks, other seeds, a later checkpoint, few weights, and `r2`, the
part of the variance of the advantages that their critic explains; its rows go to `results/planned_alignment.csv`.

All of it is at ρ = 1, as in the first optimizer step on a generation batch. A killed study goes on where it stopped.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PrinterCallback, Qwen2ForCausalLM, TrainerCallback

from recipes.playground.make_base_model import BASE_MODELS
from recipes.playground.tasks import TASKS, environment_of
from recipes.studies.alignment.batches import sample_batches, token_logps
from recipes.studies.alignment.measure import measure
from recipes.studies.alignment.settled import critic_r2
from recipes.studies.alignment.summary import plot
from recipes.studies.alignment.weights import BASE, Weight, all_weights
from recipes.studies.shared.arms import ARMS
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.run import RunSpec, environment, make_trainer

RESULTS = Path(__file__).parent / "results"
KEY = ("task", "checkpoint", "seed", "learning_rate", "batches", "weight")
BASE_CHECKPOINT = "base"
DEFAULT_TASKS = ("running_sum", "slippery_chain", "checked_sum")
STEPS = (33, 66, 100)
DEFAULT_LEARNING_RATE = 3e-4
DIGITS = 6  # significant ones, in the file


@dataclass(frozen=True)
class Plan:
    """
    What is measured.

    Args:
        tasks (`Sequence[str]`): names in `TASKS`.
        seeds (`int`): runs per task, and samples of the base model.
        batches (`int`): K, per checkpoint.
        steps (`Sequence[int]`): checkpoints, in optimizer steps; the base model comes before them.
        learning_rate (`float`): of the runs.
        first_seed (`int`): of the seeds.
        arms (`Sequence[str]`, *optional*): only these of `ARMS`, and with `r2` in their rows.
    """

    tasks: Sequence[str]
    seeds: int
    batches: int
    steps: Sequence[int]
    learning_rate: float
    first_seed: int = 0
    arms: Sequence[str] | None = None

    def weights(self) -> list[Weight] | None:
        """What is aligned; `None` is everything."""
        return None if self.arms is None else all_weights({name: ARMS[name] for name in self.arms}, beside=False)

    def keys(self, task: str, seed: int) -> list[dict[str, Any]]:
        """The checkpoints of one run, as the leading columns of their rows."""
        base = {
            "task": task,
            "checkpoint": BASE_CHECKPOINT,
            "seed": seed,
            "learning_rate": "",
            "batches": self.batches,
        }
        return [base, *({**base, "checkpoint": s, "learning_rate": self.learning_rate} for s in self.steps)]


PLANNED = Plan(
    ("running_sum", "slippery_chain", "idle_filler", "knights_and_knaves", "checked_sum"),
    3,
    32,
    (33, 66, 100, 300),
    DEFAULT_LEARNING_RATE,
    first_seed=400,
    arms=(BASE, "positive_weight_3", "positive", "positive3"),
)


class Snapshots(TrainerCallback):
    """Copies the model after some optimizer steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = steps
        self.states: dict[int | str, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.states[state.global_step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train(
    task: str, seed: int, learning_rate: float, steps: Sequence[int]
) -> dict[int | str, dict[str, torch.Tensor]]:
    """Train λ = 0 as the arena's runs do; the model's state after each of `steps` optimizer steps."""
    spec = RunSpec("alignment", task, BASE, seed, learning_rate, max_steps=max(steps))
    snapshots = Snapshots(steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(spec, folder)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(snapshots)
        trainer.train()
    return snapshots.states


def rows_of(
    key: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: Any,
    tick: Callable[[], object],
    weights: list[Weight] | None,
) -> list[dict]:
    """The rows of one checkpoint, one per weight, all or those given; `key` says which checkpoint."""
    start = time.perf_counter()
    batches = sample_batches(model, tokenizer, key["task"], seed=key["seed"], count=key["batches"])
    if weights is None:
        columns = measure(model, batches, tick)
    else:
        columns = measure(model, batches, tick, weights)
        with torch.no_grad():
            logps = [token_logps(model, batch) for batch in batches]
        for weight in weights:
            columns[weight.name]["r2"] = critic_r2(weight, batches, logps) if weight.settled else ""
    common = {
        "accuracy": statistics.fmean(batch.rewards.mean().item() for batch in batches),
        "mean_length": statistics.fmean(batch.lengths.float().mean().item() for batch in batches),
        "seconds": time.perf_counter() - start,
    }
    rows = []
    for name, figures in columns.items():
        rounded = {k: f"{v:.{DIGITS}g}" if isinstance(v, float) else v for k, v in {**figures, **common}.items()}
        rows.append({**key, "weight": name, **rounded, **environment()})
    return rows


def study(plan: Plan, ledger: Ledger) -> int:
    """
    Measure the checkpoints whose rows are not all there, and append the rows that are missing.

    Args:
        plan (`Plan`): what is measured.
        ledger (`Ledger`): where the rows go, by `KEY`.

    Returns:
        `int`: checkpoints measured.
    """
    weights = plan.weights()
    names = [weight.name for weight in (all_weights() if weights is None else weights)]
    done, todo = ledger.done(), {}
    for seed, task in itertools.product(range(plan.first_seed, plan.first_seed + plan.seeds), plan.tasks):
        keys = plan.keys(task, seed)
        todo[task, seed] = [k for k in keys if not done >= {ledger.key_of({**k, "weight": name}) for name in names}]
    count = sum(len(keys) for keys in todo.values())
    with tqdm(total=2 * plan.batches * count, desc="alignment", unit="pass") as progress:
        for (task, seed), keys in todo.items():
            if not keys:
                continue
            base = BASE_MODELS[task].folder
            model, tokenizer = Qwen2ForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
            states = {BASE_CHECKPOINT: {name: tensor.clone() for name, tensor in model.state_dict().items()}}
            if any(key["checkpoint"] != BASE_CHECKPOINT for key in keys):
                progress.set_postfix_str(f"{task}, seed {seed}: training")
                states |= train(task, seed, plan.learning_rate, plan.steps)
            for key in keys:
                progress.set_postfix_str(f"{task}, seed {seed}: {key['checkpoint']}")
                model.load_state_dict(states[key["checkpoint"]])
                for row in rows_of(key, model, tokenizer, progress.update, weights):
                    if ledger.key_of(row) not in done:
                        ledger.append(row)
    return count


def default_learning_rate() -> float:
    """That which tuning chose for λ = 0, if it has."""
    file = RESULTS / "learning_rates.json"
    return json.loads(file.read_text(encoding="utf-8"))[BASE] if file.exists() else DEFAULT_LEARNING_RATE


def main() -> None:
    """Parse the command line, run the study and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one_turn = [task for task in TASKS if environment_of(task) is None]
    parser.add_argument("--tasks", nargs="+", choices=one_turn, default=DEFAULT_TASKS, metavar="TASK")
    parser.add_argument("--batches", type=int, default=40, help="per checkpoint (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per task (default: %(default)s)")
    parser.add_argument(
        "--learning_rate", type=float, help="of the runs (default: that of results/learning_rates.json)"
    )
    parser.add_argument("--results", type=Path, help="the CSV file; the figure goes beside it")
    parser.add_argument("--planned", action="store_true", help="question H5 of PLAN.md, in planned_alignment.csv")
    parser.add_argument("--smoke", action="store_true", help="one task, one seed, 6 batches, one early checkpoint")
    args = parser.parse_args()
    if args.smoke and args.results is None:
        parser.error("--smoke needs --results: its rows are no results")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    plan = Plan(args.tasks, args.seeds, args.batches, STEPS, args.learning_rate or default_learning_rate())
    if args.planned:
        plan = replace(PLANNED, learning_rate=plan.learning_rate)
    if args.smoke:
        plan = replace(plan, tasks=plan.tasks[:1], seeds=1, batches=6, steps=(4,))
    path = args.results or RESULTS / ("planned_alignment.csv" if args.planned else "alignment.csv")
    study(plan, Ledger(path, KEY))
    plot(path, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
