"""
Train a pretrained language model on one CPU core, and compare its answers before and after (`make demo-llm`).

    python -m recipes.playground.demo_llm [--seed 0] [--steps 24] [--csv FILE]

SmolLM2-135M-Instruct is fetched and converted by the first call. Recipe: `recipes/configs/smollm2/both.yaml`. A seed
selects the questions too, and no held-out question is trained on.

The model can multiply most digits from the start, and it learns mainly to give the result and stop: training allows 16
tokens. The held-out questions are therefore also scored with 48 tokens, where the gain is smaller.
"""

import argparse
import csv
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import train
from recipes.playground.smollm2 import FOLDER, ModelError, model_path
from recipes.reasoning_gym_tasks import reasoning_gym_score, trainer_datasets
from trl_lambda.scripts import grpo

LONG = 48  # tokens, enough for the explanations of the untrained model
CONFIG = Path(train.ROOT) / "recipes" / "configs" / "smollm2" / "both.yaml"


def answer(model: Any, tokenizer: Any, rows: Dataset, budget: int) -> tuple[list[str], list[float], dict[str, float]]:
    """Answer questions greedily. Returns replies and rewards within `budget` tokens, and the figures of a report."""
    inputs = tokenizer.apply_chat_template(
        list(rows["prompt"]), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model.generate(**inputs, max_new_tokens=LONG, do_sample=False)
    tokens = output[:, inputs["input_ids"].shape[1] :]
    _, right_long = score(tokenizer, rows, tokens)
    tokens = tokens[:, :budget]  # greedy decoding with a smaller budget gives the same first tokens
    replies, right = score(tokenizer, rows, tokens)
    end = (tokens == tokenizer.eos_token_id).long()
    lengths = (end.cumsum(dim=1) - end == 0).sum(dim=1)  # up to the first end token, which counts
    length = lengths.float().mean().item()
    return replies, right, {"accuracy": mean(right), f"accuracy_{LONG}_tokens": mean(right_long), "length": length}


def score(tokenizer: Any, rows: Dataset, tokens: torch.Tensor) -> tuple[list[str], list[float]]:
    """Decode replies and score them by the recipe's reward."""
    replies = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    completions = [[{"role": "assistant", "content": reply}] for reply in replies]
    return replies, reasoning_gym_score(completions, metadata=rows["metadata"])


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def processor() -> str:
    """Name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Commit of this clone, empty outside of one."""
    command = ["git", "-C", train.ROOT, "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV file, and write its header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train SmolLM2-135M on one-digit products.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--csv", type=Path, help="append seed, accuracy, length, λ, time and versions to this file")
    parser.add_argument("--model", help="hub name or folder; without it, the model is fetched and converted")
    parser.add_argument("--output_dir", default="runs/demo_llm")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the demonstration and return its figures."""
    args = parse(arguments)
    start = time.monotonic()
    try:
        if not args.model and not FOLDER.is_dir():
            print("Fetching and converting SmolLM2-135M-Instruct (93 MB), once ...", flush=True)
        model_name = args.model or model_path()
    except ModelError as error:
        sys.exit(f"error: {error}")
    with grpo.one_line_errors():
        options = {
            "config": CONFIG,
            "model_name_or_path": model_name,
            "output_dir": args.output_dir,
            "seed": args.seed,
            "max_steps": args.steps,
            "eval_steps": args.steps,
            # seeds 1,000 apart share no generated question
            "reasoning_gym_train_seed": 1000 * args.seed,
            "reasoning_gym_test_seed": 2_000_000 + 1000 * args.seed,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        parsed = grpo.parse(words, train.RecipeArguments)[:4]
        datasets = trainer_datasets(parsed[0])
    training_args, held_out = parsed[1], datasets["eval_dataset"]
    tokenizer = AutoTokenizer.from_pretrained(model_name, padding_side="left")
    budget = training_args.max_completion_length

    print(f"Answering {len(held_out)} held-out questions before training ...", flush=True)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    replies_before, right_before, before = answer(model, tokenizer, held_out, budget)
    del model

    transformers.trainer.DEFAULT_PROGRESS_CALLBACK = train.ShortProgress
    train_start = time.monotonic()
    trainer = grpo.main(*parsed, **datasets)
    train_seconds = time.monotonic() - train_start
    replies_after, right_after, after = answer(trainer.model, tokenizer, held_out, budget)

    logs = trainer.state.log_history
    sampled = [log["eval_reward"] for log in logs if "eval_reward" in log]
    before["sampled_accuracy"], after["sampled_accuracy"] = sampled[0], sampled[-1]
    parts = {"before": before, "after": after}
    figures = {
        "seed": args.seed,
        "steps": args.steps,
        "questions": len(held_out),
        **{f"{name}_{when}": round(part[name], 3) for name in before for when, part in parts.items()},
        "lambda": round(trainer.lambda_value, 4),
        "seconds_per_step": round(mean([log["step_time"] for log in logs if "step_time" in log]), 1),
        "training_minutes": round(train_seconds / 60, 1),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "machine": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "transformers", "trl", "peft", "reasoning-gym")},
        "commit": commit(),
    }
    gains = [new - old for old, new in zip(right_before, right_after, strict=True)]
    show_answers(held_out, replies_before, replies_after, gains)
    show_figures(before, after, budget, trainer.lambda_value)
    print(f"\nModel card, lambda.json and run.png: {args.output_dir}. {figures['minutes']} minutes in all.")
    if args.csv:
        append_row(args.csv, figures)
    return figures


def show_answers(rows: Dataset, before: list[str], after: list[str], gains: list[float]) -> None:
    """Print three answers side by side, the most improved first."""
    print(f"\n{'question':<12}{'before':<60}after")
    for i in sorted(range(len(rows)), key=lambda i: -gains[i])[:3]:
        question = rows[i]["prompt"][-1]["content"].partition(": ")[2].partition(".")[0]
        old, new = (" ".join(text.split()) for text in (before[i], after[i]))
        print(f"{question:<12}{old:<60}{new}")


def show_figures(before: dict[str, float], after: dict[str, float], budget: int, lam: float) -> None:
    """Print the held-out figures before and after training."""
    labels = {
        "accuracy": f"right, greedy, {budget} tokens",
        "sampled_accuracy": f"right, sampled, {budget} tokens",
        f"accuracy_{LONG}_tokens": f"right, greedy, {LONG} tokens",
        "length": "mean length, tokens",
    }
    print(f"\n{'held-out questions':<30}{'before':>8}{'after':>8}")
    for name, label in labels.items():
        print(f"{label:<30}{before[name]:8.2f}{after[name]:8.2f}")
    print(f"{'λ':<30}{0:8.3f}{lam:8.3f}")


if __name__ == "__main__":
    main()
