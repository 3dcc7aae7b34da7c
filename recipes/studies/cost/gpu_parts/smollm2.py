"""
Part e: SmolLM2-135M learns to multiply, with both weights and with TRL's dapo, as in `recipes/configs/smollm2/`.

bf16, LoRA of rank 16, 64 completions of up to 256 tokens a step, 200 steps or as many as half of the part's time
allows. `--tiny` puts a stand-in of random weights in the model's place.
"""

import random
import re
from collections.abc import Iterator
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
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

BENCH = "gpu e: SmolLM2"
MINUTES = 10
STEPS, EDGE = 200, 10  # optimizer steps, and those that count as its beginning and its end
SYSTEM = "Answer with the final result only."
ARMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "both": (LambdaGRPOConfig, LambdaGRPOTrainer, {"length_weight": "lambda_grpo", "token_weight": "tr_grpo"}),
    "dapo": (GRPOConfig, GRPOTrainer, {"loss_type": "dapo"}),
}
METRICS = {"reward": "reward", "completions/mean_length": "mean length", "entropy": "entropy"}


def model_folder(context: Context) -> Path:
    """The pretrained model, or its stand-in."""
    if context.tiny:
        folder = context.folder / "smollm2"
        write_model(context, folder, "tiny")
        return folder
    from recipes.playground.smollm2 import model_path  # not needed by the stand-in

    return Path(model_path())


def problems(count: int = 512) -> Dataset:
    """Products of two one-digit numbers as conversations."""
    rng = random.Random(0)
    pairs = [(rng.randint(2, 9), rng.randint(2, 9)) for _ in range(count)]
    return Dataset.from_list(
        [
            {
                "prompt": [
                    {"role": "system", "content": SYSTEM},
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


def settings(context: Context) -> dict[str, Any]:
    """What the arms have in common."""
    rows, tokens = (8, 8) if context.tiny else (64, 256)
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


def train(arm: str, context: Context) -> Iterator[Rows]:
    """One run: memory and time, then reward, length and entropy at both ends, and λ."""
    config_class, trainer_class, options = ARMS[arm]
    common, model = settings(context), model_folder(context)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    probe = Probe(context)
    trainer = trainer_class(
        model=str(model),
        reward_funcs=last_number,
        args=config_class(**common, **options),
        train_dataset=problems(),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        peft_config=lora,
        callbacks=[probe],
    )
    trainer.remove_callback(PrinterCallback)
    peak = peak_during(trainer.train, context.device)
    setting = f"{common['per_device_train_batch_size']} completions of {common['max_completion_length']} tokens"
    yield probe.cost_rows(BENCH, arm, setting, peak)
    yield [row(BENCH, arm, setting, "optimizer steps", len(probe.seconds), "count")]
    for metric, words in METRICS.items():
        values = probe.logged(metric)
        yield [
            row(BENCH, arm, setting, f"{words}, first {EDGE} steps", fmean(values[:EDGE]), "mean"),
            row(BENCH, arm, setting, f"{words}, last {EDGE} steps", fmean(values[-EDGE:]), "mean"),
        ]
    if lambdas := probe.logged("lambda/value"):
        yield [row(BENCH, arm, setting, "λ at the end", lambdas[-1], "λ")]


def half_time(arm: str, context: Context) -> Iterator[Rows]:
    """`train`, the first arm with half of the part's time."""
    ends = context.ends
    if arm == next(iter(ARMS)):
        context.ends -= 30 * MINUTES
    yield from train(arm, context)
    context.ends = ends


PART = Part(BENCH, MINUTES, tuple((arm, partial(half_time, arm)) for arm in ARMS))
