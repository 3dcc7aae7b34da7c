"""TRL's trainer and this package's, built on the same weights and the same prepared completions."""

import os
import random
from dataclasses import dataclass, field
from typing import Any

# Completions are prepared, and come in by way of TRL's `rollout_func`, which warns that it is new.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from recipes.studies.cost.measure.rows import ROOT
from recipes.studies.cost.measure.workload import EOS, Workload, build_model

BASELINE = "GRPOTrainer"
PROMPT_TOKENS = 16
# Name -> the names of trainer and configuration in `trl_lambda`, and options. Metrics are part of what a user runs;
# without those that look at every token is the second figure.
_LAMBDA = ("LambdaGRPOTrainer", "LambdaGRPOConfig")
_TR = ("TRGRPOTrainer", "TRGRPOConfig")
_PLAIN = {"token_metrics": False}
_V = {"token_weight": "tr_grpo"}
_HERE = "recipes.studies.cost.measure.trainers"
ARMS: dict[str, tuple[tuple[str, str] | None, dict[str, Any]]] = {
    BASELINE: (None, {}),
    "GRPOTrainer again": (None, {}),  # what the machine itself scatters by
    "lambda_grpo": (_LAMBDA, {}),
    "tr_grpo": (_TR, {}),
    "unified": (_LAMBDA, _V),
    "three features": (
        _LAMBDA,
        {
            "length_weight": "power",
            "lambda_side": "positive",
            "lambda_features": ["length", "mean_logp", "min_logp"],
        },
    ),
    "target": (
        _LAMBDA,
        {"length_weight": "power", "length_target": lambda workload: workload.completion / 2},
    ),
    # Functions that are called with everything that needs no forward pass of its own.
    "own functions": (
        _LAMBDA,
        {"length_weight": f"{_HERE}.reward_share", "token_weight": f"{_HERE}.of_all_arguments"},
    ),
    "lambda_grpo, token_metrics=False": (_LAMBDA, _PLAIN),
    "tr_grpo, token_metrics=False": (_TR, _PLAIN),
    "unified, token_metrics=False": (_LAMBDA, _V | _PLAIN),
}


def reward_share(rewards: Any, advantages: Any, lengths: Any, step: int) -> Any:
    """A length weight of rewards, smooth, so that devices agree: 2 minus the group's mean reward."""
    return (2 - rewards.mean(dim=1, keepdim=True)).expand_as(rewards)


def of_all_arguments(
    probs: Any, advantages: Any, entropies: Any, old_logps: Any, mask: Any, lengths: Any, step: int
) -> Any:
    """A smooth token weight of what the loss has at hand."""
    return (1 + 0.1 * advantages.tanh() * probs + 0.1 * entropies / lengths) * mask


@dataclass
class Completions:
    """Prepared prompts, completions and rewards of one generation batch, the same in every process and arm."""

    workload: Workload
    processes: int = 1
    all_longest: bool = False
    ids: list[list[int]] = field(init=False)
    rewards: list[float] = field(init=False)

    def __post_init__(self) -> None:
        rng, longest = random.Random(0), self.workload.completion
        rows = self.workload.step_rows * self.processes
        shortest = longest if self.all_longest else max(1, longest // 4)
        lengths = [longest, *(rng.randint(shortest, longest) for _ in range(rows - 1))]
        self.ids = [[*(rng.randrange(2, 24) for _ in range(n - 1)), EOS] for n in lengths]
        self.rewards = [rng.random() for _ in lengths]

    def dataset(self) -> Dataset:
        prompts = len(self.ids) // self.workload.group
        texts = [("A" + "12+34+" * PROMPT_TOKENS)[: PROMPT_TOKENS - len(str(p))] + str(p) for p in range(prompts)]
        return Dataset.from_dict({"prompt": texts})

    def rollout(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        first = trainer.accelerator.process_index * len(prompts)
        rows = [(first + i) % len(self.ids) for i in range(len(prompts))]
        prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": prompt_ids, "completion_ids": [self.ids[r] for r in rows], "logprobs": None, "row": rows}

    def reward(self, completions: list[str], row: list[int], **kwargs: Any) -> list[float]:
        return [self.rewards[r] for r in row]


def measured_arms(*, token_metrics: bool = True) -> list[str]:
    """All arms; with `token_metrics`, without those that turn the metrics of every token off."""
    return [arm for arm, (_, options) in ARMS.items() if not (token_metrics and "token_metrics" in options)]


def build_trainer(
    arm: str,
    workload: Workload,
    folder: str,
    model: Any = None,
    processes: int = 1,
    *,
    settings: dict[str, Any] | None = None,
    train: bool = True,
) -> Any:
    """
    A trainer for one arm, after one optimizer step, so that everything it makes lazily is there.

    Args:
        arm (`str`): a key of `ARMS`.
        workload (`Workload`): what it trains.
        folder (`str`): its output folder.
        model (*optional*): a model to share; `None` builds its own, with the same weights.
        processes (`int`): how many processes share a generation batch.
        settings (`dict`, *optional*): fields of the configuration that differ from the usual ones.
        train (`bool`): `False` leaves the first step, and all others, to the caller.
    """
    classes, options = ARMS[arm]
    options = {name: value(workload) if callable(value) else value for name, value in options.items()}
    found: tuple[Any, Any] = (GRPOTrainer, GRPOConfig) if classes is None else _ours(classes)
    trainer_class, config_class = found
    args = config_class(output_dir=folder, **(_settings(workload) | options | (settings or {})))
    completions = Completions(workload, processes)
    trainer = trainer_class(
        model=build_model(workload) if model is None else model,
        reward_funcs=completions.reward,
        args=args,
        train_dataset=completions.dataset(),
        processing_class=AutoTokenizer.from_pretrained(ROOT / "recipes" / "playground" / "base_model"),
        rollout_func=completions.rollout,
        peft_config=_lora() if workload.lora else None,
    )
    trainer.remove_callback(PrinterCallback)
    torch.manual_seed(0)  # TRL shuffles rows with the global generator
    if train:
        trainer.train()
        trainer.model.train()
    return trainer


def _settings(workload: Workload) -> dict[str, Any]:
    """What every arm's configuration has in common."""
    return {
        "loss_type": "dapo",
        "num_generations": workload.group,
        "per_device_train_batch_size": workload.rows,
        "gradient_accumulation_steps": workload.accumulation,
        "max_completion_length": workload.completion,
        "gradient_checkpointing": workload.checkpointing,
        "optim": workload.optim,
        "bf16": workload.dtype == "bfloat16",
        "use_cpu": workload.device == "cpu",
        "logging_steps": workload.logging_steps,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


def _ours(names: tuple[str, str]) -> tuple[type, type]:
    # Imported here, so that a process which measures TRL alone does not hold this package.
    import trl_lambda

    return getattr(trl_lambda, names[0]), getattr(trl_lambda, names[1])


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
