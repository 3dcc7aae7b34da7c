"""
Parts e and f: SmolLM2-135M learns to multiply, with LoRA of rank 16 in bf16.

Part e is one digit × one digit, 64 completions of up to 256 tokens a step, with both weights and with TRL's dapo, as
in `recipes/configs/smollm2/`. Part f is two digits × one digit, step by step, 64 completions of up to 1,024 tokens,
with the main arms of `recipes/studies/smollm2`. Runs have 200 steps, or as many as their share of the part's time
allows. `--tiny` puts a stand-in of random weights in the model's place.
"""

import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from recipes.studies.cost.gpu_parts.recipe import Probe, write_model
from recipes.studies.cost.gpu_parts.schedule import Context, Part, Rows
from recipes.studies.cost.measure.memory import peak_during
from recipes.studies.cost.measure.rows import row
from recipes.studies.smollm2.arms import MAIN, find_arm
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

STEPS, EDGE = 200, 10  # optimizer steps, and those that count as its beginning and its end


@dataclass(frozen=True)
class Setting:
    """A part's name, system prompt, digits of the first factor, completions per step and tokens of each at most."""

    bench: str
    minutes: float
    system: str
    arms: tuple[str, ...]
    digits: int
    rows: int
    tokens: int

    @property
    def largest(self) -> int:
        """The largest first factor."""
        return 10**self.digits - 1


SHORT = Setting(
    "gpu e: SmolLM2", 10, "Answer with the final result only.", ("softmax_tr", "dapo"), digits=1, rows=64, tokens=256
)
LONG = Setting("gpu f: SmolLM2, long", 10, "Work step by step.", MAIN, digits=2, rows=64, tokens=1024)
METRICS = {"reward": "reward", "completions/mean_length": "mean length", "entropy": "entropy"}


def model_folder(context: Context) -> Path:
    """The pretrained model, or its stand-in."""
    if context.tiny:
        folder = context.folder / "smollm2"
        write_model(context, folder, "tiny")
        return folder
    from recipes.playground.smollm2 import model_path  # not needed by the stand-in

    return Path(model_path())


def problems(what: Setting, count: int = 512) -> Dataset:
    """Products as conversations. The second factor has one digit."""
    rng = random.Random(0)
    pairs = [(rng.randint(2, what.largest), rng.randint(2, 9)) for _ in range(count)]
    return Dataset.from_list(
        [
            {
                "prompt": [
                    {"role": "system", "content": what.system},
                    {"role": "user", "content": f"Calculate the following: {a} * {b}"},
                ],
                "solution": str(a * b),
            }
            for a, b in pairs
        ]
    )


def last_number(completions: list[Any], solution: list[str], **kwargs: Any) -> list[float]:
    """1 where the last number of the reply is the solution."""
    found = [re.findall(r"\d+", completion[-1]["content"]) for completion in completions]
    return [float(numbers[-1:] == [right]) for numbers, right in zip(found, solution, strict=True)]


def settings(what: Setting, context: Context) -> dict[str, Any]:
    """The options that all arms of a part share."""
    rows, tokens = (8, 8) if context.tiny else (what.rows, what.tokens)
    return {
        "output_dir": str(context.folder / "smollm2_output"),
        "per_device_train_batch_size": rows,
        "num_generations": 4 if context.tiny else 8,
        "max_completion_length": tokens,
        "max_steps": 2 if context.tiny else STEPS,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "bf16": context.device == "cuda",
        "use_cpu": context.device == "cpu",
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32"},  # under bf16 autocast, twice as fast at generation as bf16 weights
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def train(what: Setting, arm: str, context: Context) -> Iterator[Rows]:
    """One run: memory and time, then reward, length and entropy at both ends, and λ."""
    common, model, definition = settings(what, context), model_folder(context), find_arm(arm)
    classes: tuple[Any, Any] = (GRPOConfig, GRPOTrainer) if definition.trl else (LambdaGRPOConfig, LambdaGRPOTrainer)
    config_class, trainer_class = classes
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    probe = Probe(context)
    trainer = trainer_class(
        model=str(model),
        reward_funcs=last_number,
        args=config_class(**common, **definition.options),
        train_dataset=problems(what),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        peft_config=lora,
        callbacks=[probe],
    )
    trainer.remove_callback(PrinterCallback)
    peak = peak_during(trainer.train, context.device)
    setting = f"{common['per_device_train_batch_size']} completions of {common['max_completion_length']} tokens"
    yield probe.cost_rows(what.bench, arm, setting, peak)
    yield [row(what.bench, arm, setting, "optimizer steps", len(probe.seconds), "count")]
    for metric, words in METRICS.items():
        values = probe.logged(metric)
        yield [
            row(what.bench, arm, setting, f"{words}, first {EDGE} steps", fmean(values[:EDGE]), "mean"),
            row(what.bench, arm, setting, f"{words}, last {EDGE} steps", fmean(values[-EDGE:]), "mean"),
        ]
    if lambdas := probe.logged("lambda/value"):
        yield [row(what.bench, arm, setting, "λ at the end", lambdas[-1], "λ")]


def with_its_share(what: Setting, arm: str, context: Context) -> Iterator[Rows]:
    """`train`, with an equal share of the time that is left."""
    runs_left = len(what.arms) - what.arms.index(arm)
    now = time.monotonic()
    yield from train(what, arm, replace(context, ends=now + (context.ends - now) / runs_left))


def part(what: Setting) -> Part:
    """The part of a setting, one step per arm."""
    return Part(what.bench, what.minutes, tuple((arm, partial(with_its_share, what, arm)) for arm in what.arms))
