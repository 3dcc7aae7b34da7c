"""
Part c: the LoRA recipe of GSM8K itself, end to end with generation, on stand-ins.

The model has the shape of Qwen2.5-1.5B and random weights, the rewards are random, one problem is repeated. Random
weights almost never end a completion: every one has the full length, the most memory and time that the recipe can
take.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback

from recipes.studies.cost.gpu_parts.schedule import Context, Part, Rows, free_memory
from recipes.studies.cost.measure.clock import now
from recipes.studies.cost.measure.memory import peak_during
from recipes.studies.cost.measure.rows import ROOT, row
from recipes.studies.cost.measure.workload import Workload, build_model
from recipes.train import RecipeArguments
from trl_lambda.scripts import grpo

BENCH = "gpu c: LoRA recipe"
MINUTES = 5
RECIPE = ROOT / "recipes" / "configs" / "gsm8k" / "qwen2.5-1.5b_lora.yaml"
STEPS = 4
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROBLEM = {"question": "12+34+" * 40, "answer": "#### 46"}  # 241 tokens, one a character


class Probe(TrainerCallback):
    """Seconds of each optimizer step, generation included, and the log; ends the run when the part's time is up."""

    def __init__(self, context: Context) -> None:
        self.context, self.start, self.parameters = context, 0.0, 0
        self.seconds: list[float] = []
        self.history: list[dict[str, Any]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = now(self.context.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(now(self.context.device) - self.start)
        control.should_training_stop |= self.context.time_is_up()

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        self.parameters = sum(p.numel() for p in model.parameters())
        self.history = state.log_history

    def logged(self, name: str) -> list[float]:
        """A metric's values, step by step."""
        return [entry[name] for entry in self.history if name in entry]

    def cost_rows(self, bench: str, arm: str, setting: str, peak: int) -> Rows:
        """Rows of memory and time. The first step warms up and is not timed."""
        reserved = torch.cuda.max_memory_reserved() if self.context.device == "cuda" else 0
        return [
            row(bench, arm, setting, "peak memory", peak / 2**30, "GiB"),
            row(bench, arm, setting, "reserved by the allocator", reserved / 2**30, "GiB"),
            row(bench, arm, setting, "step with generation", self.seconds[1:], "s"),
        ]


def random_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Rewards that differ within every group, so that no gradient is 0."""
    return [random.random() for _ in completions]


def write_model(context: Context, folder: Path, shape: str) -> None:
    """A model of a shape with random weights, and the playground's tokenizer with a chat template."""
    workload = Workload("tiny" if context.tiny else shape, dtype="bfloat16", device=context.device)
    build_model(workload).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "playground" / "base_model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_dataset(folder: Path) -> None:
    """A folder in the place of the hub's dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    files = "\n".join(f"  - split: {split}\n    path: {split}.jsonl" for split in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}\n---\n")
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text((json.dumps(PROBLEM) + "\n") * 64)


def overrides(context: Context, folder: Path) -> dict[str, Any]:
    """What differs from the recipe's file."""
    changed = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "dataset",
        "output_dir": folder / "output",
        "reward_funcs": f"{__name__}.random_reward",
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
    """Train a few steps with the command's own parser and trainer."""
    folder = context.folder / "lora_recipe"
    write_model(context, folder / "model", "qwen2.5-1.5b")
    write_dataset(folder / "dataset")
    free_memory(context.device)
    texts = [text for name, value in overrides(context, folder).items() for text in (f"--{name}", str(value))]
    arguments = grpo.make_parser(RecipeArguments).parse_args_and_config(["--config", str(RECIPE), *texts])
    args, probe = arguments[1], Probe(context)
    peak = peak_during(lambda: grpo.main(*arguments, callbacks=[probe]), context.device)
    setting = f"{probe.parameters / 1e9:.2f} billion parameters, {args.generation_batch_size} completions of "
    setting += f"{args.max_completion_length} tokens a step"
    yield probe.cost_rows(BENCH, "lambda_grpo", setting, peak)
    yield [row(BENCH, "lambda_grpo", setting, "λ at the end", probe.logged("lambda/value")[-1], "λ")]


PART = Part(BENCH, MINUTES, (("recipe", recipe),))
