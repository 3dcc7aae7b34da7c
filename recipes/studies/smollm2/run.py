"""One run of the study: an arm on a task with a seed, LoRA on SmolLM2-135M, measured on held-out questions."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from recipes.playground.smollm2 import model_path
from recipes.reasoning_gym_tasks import NUMBER, ReasoningGymArguments, make_datasets, reasoning_gym_score
from recipes.studies.shared.arms import Arm
from recipes.studies.shared.run import LambdaPath, environment, training_figures
from recipes.studies.smollm2.arms import find_arm
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
from trl_lambda.weights.weighing import import_path

PROMPTS, GENERATIONS = 4, 8  # of one generation batch, which is one optimizer step
LEARNING_RATE = 4e-4
SAMPLES = 3  # sampled replies per held-out question
# Question seeds: item i of reasoning-gym depends on seed + i alone, so that seeds 1,000 apart share no item.
TRAIN_SIZE, TEST_SIZE, TEST_SEED = 200, 40, 2_000_000
LORA: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


def names_answer(completions: list[Any], metadata: list[str], **kwargs: Any) -> list[float]:
    """1 where any number of a reply is the answer, else 0: what follows the answer does not matter."""
    answers = [json.loads(text)["entry"]["answer"] for text in metadata]
    replies = [completion[-1]["content"] for completion in completions]
    return [float(answer in NUMBER.findall(reply)) for answer, reply in zip(answers, replies, strict=True)]


# The reward decides what a task asks of length: nothing, in the second.
DIGITS = {"min_digits": 1, "max_digits": 1}
TASKS: dict[str, tuple[str, dict[str, Any], Callable[..., list[float]]]] = {
    "products": ("products", DIGITS, reasoning_gym_score),
    "products_named": ("products", DIGITS, names_answer),
}


@dataclass(frozen=True)
class SmolSpec:
    """
    What makes a run what it is.

    Args:
        study (`str`): the part of the plan.
        task (`str`): a name in `TASKS`.
        arm (`str`): a name that `find_arm` knows.
        seed (`int`): of questions, their order, adapters and sampling.
        max_steps (`int`): optimizer steps.
        max_completion_length (`int`): tokens, in training and on held-out questions.
    """

    study: str
    task: str
    arm: str
    seed: int
    max_steps: int = 16
    max_completion_length: int = 24

    @property
    def definition(self) -> Arm:
        """The arm that its name stands for."""
        return find_arm(self.arm)

    @property
    def budget(self) -> int:
        """Tokens per completion: the arm's own where it has one."""
        return self.definition.options.get("max_completion_length", self.max_completion_length)


@cache
def questions(task: str, seed: int) -> dict[str, Dataset]:
    """Training questions of a seed, and the task's test questions, which are the same for every seed."""
    name, parameters, _ = TASKS[task]
    return make_datasets(
        ReasoningGymArguments(
            reasoning_gym=name,
            reasoning_gym_kwargs=parameters,
            reasoning_gym_train_size=TRAIN_SIZE,
            reasoning_gym_train_seed=1000 * seed,
            reasoning_gym_test_size=TEST_SIZE,
            reasoning_gym_test_seed=TEST_SEED,
            reasoning_gym_system_prompt="Answer with the final result only.",
            reasoning_gym_answer="last_number",
        )
    )


def make_trainer(spec: SmolSpec, folder: str, model: str | None = None) -> GRPOTrainer:
    """
    Build the trainer of a run: TRL's own for an arm of TRL, else a `LambdaGRPOTrainer`.

    Args:
        spec (`SmolSpec`): the run.
        folder (`str`): output folder; nothing is saved there.
        model (`str`, *optional*): folder of another model, for tests.
    """
    arm, model = spec.definition, model or model_path()
    classes: tuple[Any, Any] = (GRPOConfig, GRPOTrainer) if arm.trl else (LambdaGRPOConfig, LambdaGRPOTrainer)
    config_class, trainer_class = classes
    options = dict(
        seed=spec.seed,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=spec.max_steps,
        per_device_train_batch_size=PROMPTS * GENERATIONS,
        gradient_accumulation_steps=1,
        num_generations=GENERATIONS,
        max_completion_length=spec.max_completion_length,
        temperature=1.0,
        gradient_checkpointing=False,
        bf16=True,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rewards = [import_path(path, "rewards")(**arguments) for path, arguments in arm.rewards.items()]
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=[TASKS[spec.task][2], *rewards],
        args=config_class(folder, **(options | arm.options)),
        train_dataset=questions(spec.task, spec.seed)["train"],
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        peft_config=LoraConfig(**LORA),
        callbacks=[LambdaPath()],
    )
    trainer.remove_callback(PrinterCallback)
    if spec.arm == "dapo_again":
        torch.manual_seed(10_000 + spec.seed)  # the same questions in the same order, other replies
    return trainer


def run(spec: SmolSpec, model: str | None = None) -> dict[str, Any]:
    """Train and measure. Returns one row: spec, options, held-out and training figures, environment."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(spec, folder, model)
        path = next(c for c in trainer.callback_handler.callbacks if isinstance(c, LambdaPath))
        path.trainer = trainer
        # Without Triton, TRL's fused head scores the prompts' positions too and drops them: a quarter of a step.
        with patch("trl.trainer.utils._use_triton", lambda device: True):
            trainer.train()
    # Rewards of an arm's own would hide the accuracy.
    score, history = TASKS[spec.task][2], trainer.state.log_history
    logged = f"rewards/{score.__name__}/mean"
    history = [{**entry, "reward": entry[logged]} if logged in entry else entry for entry in history]
    rows = questions(spec.task, spec.seed)["test"]
    return {
        **asdict(spec),
        "options": json.dumps(spec.definition.key),
        **held_out_figures(trainer.model, trainer.processing_class, rows, spec.budget, score),
        **training_figures(history, path.path, 1),
        "entropy_curve": curve(history, "entropy", 4),
        "at_max_curve": curve(history, "token_weight/at_max", 4),
        "seconds": round(time.perf_counter() - start, 1),
        **environment(),
    }


def curve(history: list[dict[str, Any]], name: str, digits: int) -> str:
    """A logged number of every step, as text; empty where it is not logged."""
    return " ".join(f"{entry[name]:.{digits}f}" for entry in history if name in entry and "grad_norm" in entry)


def held_out_figures(
    model: Any, tokenizer: Any, rows: Dataset, budget: int, score: Callable[..., list[float]]
) -> dict[str, float]:
    """
    Answer held-out questions `SAMPLES` times at temperature 1 with one fixed seed, and once greedily.

    Args:
        model (`PreTrainedModel`): left in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): pads on the left.
        rows (`Dataset`): questions.
        budget (`int`): tokens per reply.
        score (`Callable`): the task's reward.

    Returns:
        `dict[str, float]`: accuracies in 0..1, and the mean length of sampled replies in tokens with the end token.
    """
    prompts, metadata = list(rows["prompt"]) * SAMPLES, list(rows["metadata"]) * SAMPLES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sampled, lengths = answer(model, tokenizer, prompts, metadata, budget, score, do_sample=True)
    once = (prompts[: len(rows)], metadata[: len(rows)])
    greedy, _ = answer(model, tokenizer, *once, budget, score, do_sample=False)
    right = [length for length, reward in zip(lengths, sampled, strict=True) if reward > 0]
    return {
        "accuracy_greedy": statistics.fmean(greedy),
        "accuracy_sampled": statistics.fmean(sampled),
        "mean_length": statistics.fmean(lengths),
        "mean_length_right": statistics.fmean(right) if right else float("nan"),
    }


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    metadata: list[str],
    budget: int,
    score: Callable[..., list[float]],
    *,
    do_sample: bool,
    batch: int = 70,
) -> tuple[list[float], list[int]]:
    """Reply to prompts in batches. Returns rewards and lengths in tokens with the end token."""
    encode: Callable[..., Any] = tokenizer.apply_chat_template
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {"do_sample": False}
    model.eval()
    rewards: list[float] = []
    lengths: list[int] = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        inputs = encode(prompts[part], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True)
        with torch.autocast("cpu", torch.bfloat16):
            output = model.generate(**inputs, max_new_tokens=budget, **options)
        tokens = output[:, inputs["input_ids"].size(1) :]
        ended = (tokens == tokenizer.eos_token_id).long().cumsum(dim=1)
        lengths += ((ended == 0).sum(dim=1) + (ended[:, -1] > 0)).tolist()
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        rewards += score(completions, metadata=metadata[part])
    return rewards, lengths
