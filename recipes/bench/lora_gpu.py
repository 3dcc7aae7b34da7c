"""
Peak memory and step time of LoRA training, TRL's trainer and this package's, as a CSV.

The model has the shape of Qwen2.5-1.5B and random weights in bf16, so that no hub is needed; batch, lengths and
adapters are those of `recipes/configs/gsm8k_qwen2.5-1.5b_lora.yaml`. Random weights almost never end a completion:
every one has the full length, which is the most memory and time that the recipe can take.

    python -m recipes.bench.lora_gpu --out lora_gpu.csv           # one GPU of 24 GB
    python -m recipes.bench.lora_gpu --out lora_gpu.csv --tiny    # any CPU, to try the script itself

It has been tried with `--tiny` only.
"""

import argparse
import csv
import gc
import platform
import random
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = yaml.safe_load((ROOT / "recipes" / "configs" / "gsm8k_qwen2.5-1.5b_lora.yaml").read_text(encoding="utf-8"))
TAKEN = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "max_completion_length")
ARMS = {
    "TRL dapo": (GRPOTrainer, GRPOConfig, {"loss_type": "dapo"}),
    "lambda": (LambdaGRPOTrainer, LambdaGRPOConfig, {}),
    "lambda + sigmoid": (LambdaGRPOTrainer, LambdaGRPOConfig, {"token_regulation": "sigmoid"}),
}
# Qwen/Qwen2.5-1.5B's config.json: 1.54 B parameters.
QWEN = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TINY = QWEN | {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}


class Clock(TrainerCallback):
    """Seconds of each optimizer step, generation included."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = _now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(_now() - self.start)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def random_reward(completions: list[str], **kwargs) -> list[float]:
    """Rewards that differ within every group, so that no gradient is 0."""
    return [random.random() for _ in completions]


def measure(arm: str, tiny: bool, steps: int) -> dict[str, float | int | str]:
    """Train `steps` steps with one arm; the first, which warms up, is left out of the time."""
    trainer_class, config_class, options = ARMS[arm]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "playground" / "base_model")
    shape = TINY if tiny else QWEN
    gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**shape, eos_token_id=1, pad_token_id=0, bos_token_id=None))
    model = model.to(torch.bfloat16 if gpu else torch.float32)
    batch = {name: RECIPE[name] for name in TAKEN} | ({"max_completion_length": 16} if tiny else {})
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": steps, "report_to": "none", "save_strategy": "no", "bf16": gpu, "use_cpu": not gpu}
        trainer = trainer_class(
            model=model,
            reward_funcs=random_reward,
            args=config_class(output_dir=folder, **settings, **batch, **options),
            train_dataset=Dataset.from_dict({"prompt": ["A" + "12+34+" * 40] * 64}),  # 241 tokens
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=RECIPE["lora_r"],
                lora_alpha=RECIPE["lora_alpha"],
                lora_dropout=RECIPE["lora_dropout"],
                target_modules=RECIPE["lora_target_modules"],
                task_type="CAUSAL_LM",
            ),
            callbacks=[clock],
        )
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else ""
    row = {"arm": arm, "peak_gib": peak, "step_seconds": round(statistics.median(clock.seconds[1:]), 3)}
    row |= {"steps": steps, "parameters": sum(p.numel() for p in model.parameters()), **batch}
    del trainer, model
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
    return row


def circumstances() -> dict[str, str]:
    """What a number is worth nothing without."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    return {"commit": commit, "device": device} | {name: version(name) for name in ("torch", "transformers", "trl")}


def main() -> None:
    """Measure every arm and append the rows to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file to append to")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each arm, at least 2")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script on a CPU")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps is {args.steps}; the first step warms up, so that at least 2 are needed.")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no GPU is visible; --tiny tries the script on a CPU.")
    new = not args.out.exists()
    for arm in ARMS:
        row = circumstances() | measure(arm, args.tiny, args.steps)
        with open(args.out, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        new = False
        print(f"{arm:18} {row['step_seconds']} s a step, peak {row['peak_gib'] or 'unknown'} GiB", flush=True)


if __name__ == "__main__":
    main()
