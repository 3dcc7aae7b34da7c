"""
The playground's recipe with vLLM's completions beside the same with `generate`'s, four seeds each: `vllm_seeds.csv`.

    make .vllm/.installed
    .venv/bin/python -m recipes.playground.vllm_seeds  # goes on where it stopped

One thread each, one run after the other.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions
from pathlib import Path
from statistics import fmean

import torch

from recipes.bench.measure.rows import circumstances

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = Path(__file__).with_suffix(".csv")
SEEDS = range(4)
LAUNCHERS = {
    "generate": ["recipes/train.py"],
    "vllm": ["-m", "recipes.playground.vllm_cpu", "--use_vllm", "--vllm_mode", "colocate"],
}
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
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    own = [str(ROOT / ".vllm")] if sampler == "vllm" else []
    environment["PYTHONPATH"] = os.pathsep.join([*own, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *LAUNCHERS[sampler], "--config", "recipes/configs/playground.yaml"]
        command += ["--seed", str(seed), "--output_dir", folder, "--plot", "false", "--disable_tqdm", "true"]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{sampler}, seed {seed}:\n{done.stderr[-6000:]}")
        seconds = time.perf_counter() - start
        history = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    row = {name: f"{value:.4g}" for name, value in summarize(history).items()}
    row |= {"seconds": f"{seconds:.0f}", "vllm_cpu": vllm_version() if sampler == "vllm" else ""}
    return {"sampler": sampler, "seed": seed, **row, **circumstances("cpu")}


def vllm_version() -> str:
    """Version of vLLM's build for a CPU in `.vllm`, which is not on this process's path."""
    (found,) = distributions(name="vllm-cpu", path=[str(ROOT / ".vllm")])
    return found.version


def main() -> None:
    """Run what the table does not have yet, in pairs, and append each row as soon as there is one."""
    torch.set_num_threads(1)  # what the trainings use, and the rows say
    rows = list(csv.DictReader(TABLE.open())) if TABLE.exists() else []
    done = {(row["sampler"], int(row["seed"])) for row in rows}
    for seed in SEEDS:
        for sampler in LAUNCHERS:
            if (sampler, seed) in done:
                continue
            row = run(sampler, seed)
            with TABLE.open("a", newline="") as file:
                writer = csv.DictWriter(file, row, lineterminator="\n")
                if not rows:
                    writer.writeheader()
                rows.append(row)
                writer.writerow(row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
