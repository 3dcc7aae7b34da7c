"""
Part c: `recipes/configs/gsm8k_qwen2.5-1.5b_lora.yaml` itself, end to end with generation, on stand-ins.

The model has the shape of Qwen2.5-1.5B and random weights, the rewards are random, the problems are one repeated.
Random weights almost never end a completion: every one has the full length, which is the most memory and time that
the recipe can take.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback

from recipes.bench.gpu_parts.schedule import Context, Part, Rows, free_memory
from recipes.bench.measure.clock import now
from recipes.bench.measure.memory import peak_during, storage_bytes
from recipes.bench.measure.rows import ROOT, row
from recipes.bench.measure.workload import Workload, build_model
from trl_lambda import training as train

BENCH = "gpu c: LoRA recipe"
MINUTES = 5
RECIPE = ROOT / "recipes" / "configs" / "gsm8k_qwen2.5-1.5b_lora.yaml"
PEAK, RESERVED = "peak memory", "reserved by the allocator"
STEPS = 4
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROBLEM = {"question": "12+34+" * 40, "answer": "#### 46"}  # 241 tokens, one a character


class Clock(TrainerCallback):
    """Seconds of each optimizer step, generation included."""

    def __init__(self, device: str) -> None:
        self.device, self.start = device, 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = now(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(now(self.device) - self.start)


def random_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Rewards that differ within every group, so that no gradient is 0."""
    return [random.random() for _ in completions]


def write_stand_ins(context: Context, folder: Path) -> tuple[Path, Path]:
    """Folders of a model and of a dataset in the places of the hub's."""
    model, dataset = folder / "model", folder / "dataset"
    shape = Workload("tiny" if context.tiny else "qwen2.5-1.5b", dtype="bfloat16", device=context.device)
    build_model(shape).save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "playground" / "base_model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    dataset.mkdir(parents=True, exist_ok=True)
    files = "\n".join(f"  - split: {split}\n    path: {split}.jsonl" for split in ("train", "test"))
    (dataset / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}\n---\n")
    for split in ("train", "test"):
        (dataset / f"{split}.jsonl").write_text((json.dumps(PROBLEM) + "\n") * 64)
    return model, dataset


def overrides(context: Context, model: Path, dataset: Path, output: Path) -> dict[str, Any]:
    """What differs from the recipe's file."""
    changed = {
        "model_name_or_path": model,
        "dataset_name": dataset,
        "output_dir": output,
        "reward_funcs": "recipes.bench.gpu_parts.lora_recipe.random_reward",
        "max_steps": 2 if context.tiny else STEPS,
        "eval_strategy": "no",
        "eval_on_start": "false",
        "save_strategy": "no",
        "plot": "false",
        "disable_tqdm": "true",
    }
    if context.device == "cpu":
        changed |= {"use_cpu": "true", "max_completion_length": 8}
    return changed


def recipe(context: Context) -> Iterator[Rows]:
    """Train a few steps with the recipe's own parser and trainer; the first, which warms up, is not timed."""
    model, dataset = write_stand_ins(context, context.folder / "lora_recipe")
    free_memory(context.device)
    changed = overrides(context, model, dataset, context.folder / "lora_recipe" / "output")
    texts = [text for name, value in changed.items() for text in (f"--{name}", str(value))]
    arguments = train.parse(["--config", str(RECIPE), *texts])
    trainer: Any = train.make_trainer(*arguments)
    clock = Clock(context.device)
    trainer.add_callback(clock)
    held = sum(storage_bytes(trainer.model.parameters()).values())
    peak = held + peak_during(trainer.train, context.device)
    args, model_parameters = trainer.args, sum(p.numel() for p in trainer.model.parameters())
    setting = f"{model_parameters / 1e9:.2f} billion parameters, {args.generation_batch_size} completions of "
    setting += f"{args.max_completion_length} tokens a step"
    lam = trainer.lambda_value
    yield [
        row(BENCH, "lambda", setting, PEAK, peak / 2**30, "GiB"),
        row(BENCH, "lambda", setting, RESERVED, torch.cuda.max_memory_reserved() / 2**30, "GiB"),
        row(BENCH, "lambda", setting, "step with generation", clock.seconds[1:], "s"),
        row(BENCH, "lambda", setting, "λ at the end", lam, "λ"),
    ]


PART = Part(BENCH, MINUTES, (("recipe", recipe),))
