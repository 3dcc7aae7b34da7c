"""One run of the arena: an arm on a task with a seed, trained by its real trainer, measured on held-out problems."""

import json
import math
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from recipes.playground.make_base_model import BASE_MODELS
from recipes.playground.measure import sample
from recipes.playground.rewards import exact_answer
from recipes.playground.tasks import environment_of, make_splits
from recipes.studies.shared.arms import REMOVED, Arm, find_arm
from recipes.studies.shared.machine import commit, processor
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
from trl_lambda.weights.weighing import import_path

PROMPTS, GENERATIONS = 8, 8  # of one generation batch
# Where a completion is cut: half as long again as the longest answer taught, so that verbosity has room to grow.
MAX_COMPLETION_LENGTH = {
    "running_sum": 48,
    "slippery_chain": 36,
    "idle_filler": 36,
    "knights_and_knaves": 48,
    "checked_sum": 72,
    "lookup_agent": 48,
}
LAMBDA_EVERY = 5  # optimizer steps between two points of the λ path


@dataclass(frozen=True)
class RunSpec:
    """
    What makes a run what it is; two runs with equal specs are the same run.

    Args:
        study (`str`): which part of the arena it belongs to.
        task (`str`): a name in `recipes.playground.tasks.TASKS`.
        arm (`str`): a name in `ARMS` or `CONTROLS`.
        seed (`int`): of the order of the problems, of the sampling and of the trainer.
        learning_rate (`float`): of the model, constant.
        max_steps (`int`): optimizer steps.
        steps_per_generation (`int`): optimizer steps that share one generation batch of 64 completions.
        split (`str`): held-out problems that it is measured on; `"validation"` for tuning, else `"test"`.
    """

    study: str
    task: str
    arm: str
    seed: int
    learning_rate: float
    max_steps: int = 100
    steps_per_generation: int = 4
    split: str = "test"

    @property
    def definition(self) -> Arm:
        """The arm that its name stands for."""
        return find_arm(self.arm)

    @property
    def completions(self) -> int:
        """Completions of one generation batch."""
        return PROMPTS * GENERATIONS

    @property
    def base_model(self) -> Path:
        """Folder of the model that the run starts from."""
        return BASE_MODELS[self.task].folder

    @property
    def max_completion_length(self) -> int:
        """Where a completion is cut, in tokens."""
        return MAX_COMPLETION_LENGTH[self.task]

    @property
    def use_cpu(self) -> bool:
        """Whether the run is to stay off an accelerator that is there."""
        return True


def make_trainer(spec: RunSpec, folder: str) -> GRPOTrainer:
    """
    Build the trainer of a run, from the task's base model, on a fresh shuffle of the task's training problems.

    Args:
        spec (`RunSpec`): the run.
        folder (`str`): the trainer's output folder; nothing is saved there.

    Returns:
        `GRPOTrainer`: TRL's own for an arm of TRL, else a `LambdaGRPOTrainer`.

    Raises:
        ValueError: the arm cannot run again.
    """
    arm = spec.definition
    if arm.removed:
        raise ValueError(f"arm {spec.arm!r} {REMOVED}.")
    classes: tuple[Any, Any] = (GRPOConfig, GRPOTrainer) if arm.trl else (LambdaGRPOConfig, LambdaGRPOTrainer)
    config_class, trainer_class = classes
    options = dict(
        seed=spec.seed,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="constant",
        max_steps=spec.max_steps,
        per_device_train_batch_size=spec.completions // spec.steps_per_generation,
        steps_per_generation=spec.steps_per_generation,
        gradient_accumulation_steps=1,
        num_generations=GENERATIONS,
        max_completion_length=spec.max_completion_length,
        temperature=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=spec.use_cpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    args = config_class(folder, **(options | arm.options))
    rewards = [import_path(path, "rewards")(**arguments) for path, arguments in arm.rewards.items()]
    return trainer_class(
        model=Qwen2ForCausalLM.from_pretrained(spec.base_model),
        reward_funcs=[exact_answer, *rewards],
        args=args,
        train_dataset=training_problems(spec.task),
        processing_class=AutoTokenizer.from_pretrained(spec.base_model),
        callbacks=[LambdaPath()],
        environment_factory=environment_of(spec.task),
    )


@cache
def training_problems(task: str) -> Dataset:
    """The task's training split as TRL wants it, with `prompt` and `solution`."""
    return Dataset.from_list([problem.row() for problem in make_splits(task)["train"]])


class LambdaPath(TrainerCallback):
    """Records λ at the start and every `LAMBDA_EVERY` optimizer steps; stays empty where the trainer has no λ."""

    def __init__(self) -> None:
        self.trainer: GRPOTrainer | None = None
        self.path: list[float] = []

    def _record_lambda(self) -> None:
        value = getattr(self.trainer, "lambda_value", None)
        if value is not None:
            self.path.append(value)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._record_lambda()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % LAMBDA_EVERY == 0:
            self._record_lambda()


def run(spec: RunSpec) -> dict[str, Any]:
    """
    Train and measure.

    Args:
        spec (`RunSpec`): the run.

    Returns:
        `dict[str, Any]`: one row of the results: the spec, the arm's options, `held_out_figures`,
        `training_figures` and `environment`.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(spec, folder)
        trainer.remove_callback(PrinterCallback)
        lambda_path = next(c for c in trainer.callback_handler.callbacks if isinstance(c, LambdaPath))
        lambda_path.trainer = trainer
        trainer.train()
    return {
        **asdict(spec),
        "options": json.dumps(spec.definition.key),
        **held_out_figures(trainer.model, trainer.processing_class, spec),
        **training_figures(trainer.state.log_history, lambda_path.path, spec.steps_per_generation),
        "seconds": round(time.perf_counter() - start, 1),
        **environment(),
    }


def held_out_figures(model: Any, tokenizer: Any, spec: RunSpec) -> dict[str, float]:
    """
    Measure the trained model on held-out problems: each once at temperature 1 with one fixed seed, half of them also
    greedily, since answers decoded greedily are much alike from one run to the next.

    Args:
        model (`PreTrainedModel`): it is left in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): the playground's.
        spec (`RunSpec`): says which problems, and where a completion is cut.

    Returns:
        `dict[str, float]`: accuracies in 0..1, lengths in tokens with the end token.
    """
    problems = make_splits(spec.task)[spec.split]
    common: dict[str, Any] = {"num_samples": 1, "seed": 0, "max_new_tokens": spec.max_completion_length}
    greedy = sample(model, tokenizer, problems[: len(problems) // 2], greedy=True, **common)
    sampled = sample(model, tokenizer, problems, **common)
    right = sampled.rewards > 0
    accuracy, length = sampled.rewards.mean().item(), sampled.lengths.mean().item()
    return {
        "accuracy_greedy": greedy.rewards.mean().item(),
        "accuracy_sampled": accuracy,
        "mean_length": length,
        "mean_length_right": sampled.lengths[right].mean().item() if right.any() else math.nan,
        "mean_length_wrong": sampled.lengths[~right].mean().item() if not right.all() else math.nan,
        "accuracy_per_token": accuracy / length,
    }


def training_figures(
    history: list[dict[str, float]], lambda_path: list[float], steps_per_generation: int
) -> dict[str, Any]:
    """
    Reduce a log with one entry per optimizer step to the columns of a row.

    TRL notes reward and length once per generation batch, in the log of its first optimizer step; the entropy and the
    norm of the gradient it notes at every step.

    Args:
        history (`list[dict[str, float]]`): `trainer.state.log_history`.
        lambda_path (`list[float]`): λ every `LAMBDA_EVERY` steps from 0 on; empty without λ.
        steps_per_generation (`int`): optimizer steps per generation batch.

    Returns:
        `dict[str, Any]`: `auc`, `entropy` (nats, mean over the last generation batch), `grad_norm_mean`,
        `grad_norm_cv`, `token_weight_mean`, `lambda_20`, `lambda_100`, and the curves as text.
    """
    steps = [entry for entry in history if "grad_norm" in entry]
    rewards = [entry["reward"] for entry in steps if "reward" in entry]
    lengths = [entry["completions/mean_length"] for entry in steps if "completions/mean_length" in entry]
    norms = [float(entry["grad_norm"]) for entry in steps]
    weights = [entry["token_weight/mean"] for entry in steps if "token_weight/mean" in entry]
    return {
        "auc": statistics.fmean(rewards),
        "entropy": statistics.fmean(entry["entropy"] for entry in steps[-steps_per_generation:]),
        "grad_norm_mean": statistics.fmean(norms),
        # A run without one right answer has no gradient at all.
        "grad_norm_cv": statistics.pstdev(norms) / statistics.fmean(norms) if any(norms) else math.nan,
        "token_weight_mean": statistics.fmean(weights) if weights else "",
        "lambda_20": lambda_path[20 // LAMBDA_EVERY] if len(lambda_path) > 20 // LAMBDA_EVERY else "",
        "lambda_100": lambda_path[100 // LAMBDA_EVERY] if len(lambda_path) > 100 // LAMBDA_EVERY else "",
        "reward_curve": " ".join(f"{value:.4f}" for value in rewards),
        "length_curve": " ".join(f"{value:.2f}" for value in lengths),
        "lambda_curve": " ".join(f"{value:.5f}" for value in lambda_path),
    }


@cache
def environment() -> dict[str, str]:
    """Commit, versions and hardware, as columns."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "hardware": f"{processor()}, {torch.get_num_threads()} thread"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
    }
