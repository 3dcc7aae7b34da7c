"""
Does the agent of the playground learn, with the recipe's weights and with TRL's own reduction? Six seeds each.

    python -m recipes.studies.arena.learn_agent    # half a minute a run; goes on where results/lookup_agent.csv stops
"""

import argparse
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.recipe import ROOT, train_recipe

RECIPE = ROOT / "recipes" / "configs" / "agents" / "lookup.yaml"
RESULTS = Path(__file__).parent / "results" / "lookup_agent.csv"
SEEDS = tuple(range(6))
ARMS = {"recipe": [], "trl": ["--length_weight", "none", "--token_weight", "none"]}


def figures(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The columns of a row that come from a run's log."""

    def logged(name: str) -> list[float]:
        return [entry[name] for entry in history if name in entry]

    rewards, lambdas = logged("reward"), logged("lambda/value")
    calls, lengths = logged("tools/call_frequency"), logged("completions/mean_length")
    columns = {
        "reward_first_5": statistics.fmean(rewards[:5]),
        "reward_last_10": statistics.fmean(rewards[-10:]),
        "held_out_before": logged("eval_reward")[0],
        "held_out_after": logged("eval_reward")[-1],
        "calls_first_5": statistics.fmean(calls[:5]),
        "calls_last_10": statistics.fmean(calls[-10:]),
        "failed_calls": statistics.fmean(logged("tools/failure_frequency")),
        "own_tokens_first_5": statistics.fmean(lengths[:5]),
        "own_tokens_last_10": statistics.fmean(lengths[-10:]),
        "lambda_20": lambdas[19] if len(lambdas) > 19 else "",
        "lambda_end": lambdas[-1] if lambdas else "",
    }
    rounded = {name: value if value == "" else round(value, 4) for name, value in columns.items()}
    return {"steps": len(rewards), **rounded, "reward_curve": " ".join(f"{value:.4f}" for value in rewards)}


def main() -> None:
    """Parse the command line, and append a row for each run that has none."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds (default: 0 to 5)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to append to (default: %(default)s)")
    args, options = parser.parse_known_args()
    ledger = Ledger(args.results, ("arm", "seed"))
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
    for seed in args.seeds:
        for arm, own in ARMS.items():
            if (arm, str(seed)) not in ledger.done():
                command = ["recipes/train.py", "--config", str(RECIPE), "--seed", str(seed), *own]
                row = {"arm": arm, "seed": seed, **figures(train_recipe(command, options)), **versions}
                ledger.append(row | {"machine": platform.machine()})
                print({name: row[name] for name in ("arm", "seed", "reward_first_5", "reward_last_10")}, flush=True)


if __name__ == "__main__":
    main()
