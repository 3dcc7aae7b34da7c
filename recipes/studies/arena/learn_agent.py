"""
Train the recipe `lookup_agent.yaml` on six seeds, with its weights and as TRL has it, and write a row per run to
`lookup_agent.csv`: `python -m recipes.playground.learn_agent`. One thread; about half a minute a run.
"""

import argparse
import csv
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

from trl_lambda import training as train

RECIPE = Path(__file__).parents[1] / "configs" / "lookup_agent.yaml"
RESULTS = Path(__file__).parent / "lookup_agent.csv"
SEEDS = tuple(range(6))
ARMS = {"recipe": [], "trl": ["--aggregation", "none", "--token_regulation", "none"]}


def run(arm: str, seed: int, options: list[str]) -> dict[str, Any]:
    """
    Train once.

    Args:
        arm (`str`): a name in `ARMS`.
        seed (`int`): of the sampling, the order of the problems and the trainer.
        options (`list[str]`): further options of `recipes/train.py`.

    Returns:
        `dict[str, Any]`: a row: mean reward of the first five and the last ten steps, held-out reward before and
        after, λ, calls a conversation, failed part of them, own tokens a conversation, versions.
    """
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--disable_tqdm", "true", "--plot", "false", "--seed", str(seed), "--output_dir", folder]
        parsed = train.parse(["--config", str(RECIPE), *quiet, *ARMS[arm], *options])
        trainer = train.make_trainer(*parsed)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    history = trainer.state.log_history

    def logged(name: str) -> list[float]:
        return [entry[name] for entry in history if name in entry]

    rewards, lambdas = logged("reward"), logged("lambda/value")
    calls, lengths = logged("tools/call_frequency"), logged("completions/mean_length")
    figures = {
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
    return {
        "arm": arm,
        "seed": seed,
        "steps": trainer.state.global_step,
        **{name: value if value == "" else round(value, 4) for name, value in figures.items()},
        "reward_curve": " ".join(f"{value:.4f}" for value in rewards),
        **{module.__name__: module.__version__ for module in (torch, transformers, trl)},
        "machine": platform.machine(),
    }


def main() -> None:
    """Parse the command line, run, and write each row when it is there."""
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds (default: 0 to 5)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write (default: %(default)s)")
    args, options = parser.parse_known_args()
    torch.set_num_threads(1)
    rows = []
    for seed in args.seeds:
        for arm in ARMS:
            rows.append(run(arm, seed, options))
            with args.results.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            print({name: rows[-1][name] for name in ("arm", "seed", "reward_first_5", "reward_last_10")}, flush=True)


if __name__ == "__main__":
    main()
