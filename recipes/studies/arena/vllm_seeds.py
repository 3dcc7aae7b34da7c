"""
The playground's recipe with vLLM's completions, and the same with `generate`'s: four seeds each, `vllm_seeds.csv`.

    make .vllm/.installed
    .venv/bin/python -m recipes.studies.arena.vllm_seeds  # goes on where it stopped

One thread each, one run after the other.
"""

import time
from importlib.metadata import distributions
from pathlib import Path
from statistics import fmean

import torch

from recipes.studies.cost.measure.rows import circumstances
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.recipe import ROOT, train_recipe

TABLE = Path(__file__).parent / "results" / "vllm_seeds.csv"
SEEDS = range(4)
LAUNCHERS = {
    "generate": ["recipes/train.py"],
    "vllm": ["-m", "recipes.playground.vllm_cpu", "--use_vllm", "--vllm_mode", "colocate"],
}
CONFIG = "recipes/configs/playground/demo.yaml"
DIFFERENCE = "sampling/sampling_logp_difference"


def summarize(history: list[dict]) -> dict[str, float]:
    """What a row of the table says about a run, from its log history; differences are `nan` without vLLM."""
    steps = [entry for entry in history if "reward" in entry]
    held_out = {entry["step"]: entry["eval_reward"] for entry in history if "eval_reward" in entry}
    rewards = [entry["reward"] for entry in steps]
    return {
        "steps": len(steps),
        "reward_steps_1_to_20": fmean(rewards[:20]),
        "reward_last_20_steps": fmean(rewards[-20:]),
        "held_out_before": held_out[0],
        "held_out_after": held_out[len(steps)],
        "lambda": steps[-1]["lambda/value"],
        "mean_length_last_20_steps": fmean(entry["completions/mean_length"] for entry in steps[-20:]),
        "logp_difference_mean": fmean(entry.get(f"{DIFFERENCE}/mean", float("nan")) for entry in steps),
        "logp_difference_worst_step": max(entry.get(f"{DIFFERENCE}/mean", float("nan")) for entry in steps),
        "logp_difference_max": max(entry.get(f"{DIFFERENCE}/max", float("nan")) for entry in steps),
    }


def run(sampler: str, seed: int) -> dict:
    """Train in a process of its own and return the row."""
    start = time.perf_counter()
    own = [str(ROOT / ".vllm")] if sampler == "vllm" else []
    command = [*LAUNCHERS[sampler], "--config", CONFIG, "--seed", str(seed)]
    history = train_recipe(command, pythonpath=own)
    row = {name: f"{value:.4g}" for name, value in summarize(history).items()}
    row |= {"seconds": f"{time.perf_counter() - start:.0f}", "vllm_cpu": vllm_version() if sampler == "vllm" else ""}
    return {"sampler": sampler, "seed": seed, **row, **circumstances("cpu")}


def vllm_version() -> str:
    """Version of vLLM's build for a CPU in `.vllm`, which is not on this process's path."""
    (found,) = distributions(name="vllm-cpu", path=[str(ROOT / ".vllm")])
    return found.version


def main() -> None:
    """Run what the table does not have yet, in pairs, and append each row as soon as there is one."""
    torch.set_num_threads(1)  # what the trainings use, and the rows say
    ledger = Ledger(TABLE, ("sampler", "seed"))
    for seed in SEEDS:
        for sampler in LAUNCHERS:
            if (sampler, str(seed)) not in ledger.done():
                row = run(sampler, seed)
                ledger.append(row)
                print(row, flush=True)


if __name__ == "__main__":
    main()
