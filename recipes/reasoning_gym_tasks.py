"""
Tasks of reasoning-gym as datasets and reward for GRPO.

reasoning-gym generates a hundred kinds of verifiable questions and scores replies to them. In YAML:

    reasoning_gym: products
    reasoning_gym_kwargs: {min_digits: 1, max_digits: 1}
    reasoning_gym_answer: last_number
    reward_funcs: [recipes.reasoning_gym_tasks.reasoning_gym_score]

Two properties of the library matter here. Its item i depends on seed + i alone, so seed 0 and seed 1 share all
questions but one. Many of its scorers give part marks to any text that contains the answer, so the answer is extracted
first.

Needs: pip install -e ".[reasoning-gym]"
"""

import difflib
import json
import re
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from datasets import Dataset

NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
EXTRACTORS = ("last_number", "answer_tags", "text")


@dataclass
class ReasoningGymArguments:
    """
    Arguments that replace `dataset_name` by a task of reasoning-gym. List them first among the bases of a dataclass.

    Args:
        reasoning_gym (`str`, *optional*):
            Name of the task, such as `"products"`.
        reasoning_gym_kwargs (`dict`, *optional*):
            Parameters of the task, without seed and size. On the command line: JSON.
        reasoning_gym_train_size (`int`, *optional*, defaults to `1000`):
            Number of generated training questions. Those that are held out are then dropped.
        reasoning_gym_validation_size, reasoning_gym_test_size (`int`, *optional*, default to `0` and `100`):
            Largest number of held-out questions. They are all different.
        reasoning_gym_train_seed, reasoning_gym_validation_seed, reasoning_gym_test_seed (`int`, *optional*):
            Seeds, by default 0, 1,000,000 and 2,000,000. Neighbouring seeds give almost the same questions.
        reasoning_gym_system_prompt (`str`, *optional*):
            System message before each question.
        reasoning_gym_prompt (`str`, *optional*, defaults to `"{question}"`):
            Template of the user's message. It contains `{question}`.
        reasoning_gym_answer (`str`, *optional*, defaults to `"answer_tags"`):
            Answer within a reply: `"last_number"`, `"answer_tags"` (the last `<answer>`), or `"text"` (all of it).

    Raises:
        `ValueError`: reasoning-gym is missing, does not know the task or a parameter, or a value is out of range.
    """

    reasoning_gym: str | None = field(default=None, metadata={"help": "Task of reasoning-gym, such as 'products'."})
    reasoning_gym_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of the task, without seed and size."}
    )
    reasoning_gym_train_size: int = field(default=1000, metadata={"help": "Number of generated training questions."})
    reasoning_gym_validation_size: int = field(default=0, metadata={"help": "Largest number of validation questions."})
    reasoning_gym_test_size: int = field(default=100, metadata={"help": "Largest number of test questions."})
    reasoning_gym_train_seed: int = field(default=0, metadata={"help": "Seed of the training questions."})
    reasoning_gym_validation_seed: int = field(default=1_000_000, metadata={"help": "Seed of validation questions."})
    reasoning_gym_test_seed: int = field(default=2_000_000, metadata={"help": "Seed of the test questions."})
    reasoning_gym_system_prompt: str | None = field(default=None, metadata={"help": "System message."})
    reasoning_gym_prompt: str = field(
        default="{question}", metadata={"help": "Template of the user's message, with {question}."}
    )
    reasoning_gym_answer: str = field(
        default="answer_tags", metadata={"help": "Answer within a reply: 'last_number', 'answer_tags' or 'text'."}
    )

    def __post_init__(self):
        if self.reasoning_gym is None:
            own = fields(ReasoningGymArguments)
            if changed := [each.name for each in own if getattr(self, each.name) != each.default]:
                raise ValueError(f"{changed[0]} needs reasoning_gym, the name of a task.")
            return
        if isinstance(self.reasoning_gym_kwargs, str):
            self.reasoning_gym_kwargs = read_json_object(self.reasoning_gym_kwargs)
        if self.reasoning_gym_answer not in EXTRACTORS:
            raise ValueError(f"reasoning_gym_answer={self.reasoning_gym_answer!r}; accepted: {', '.join(EXTRACTORS)}.")
        if "{question}" not in self.reasoning_gym_prompt:
            raise ValueError(f"reasoning_gym_prompt={self.reasoning_gym_prompt!r} does not contain {{question}}.")
        held_out_sizes = (self.reasoning_gym_validation_size, self.reasoning_gym_test_size)
        if self.reasoning_gym_train_size < 1 or min(held_out_sizes) < 0:
            raise ValueError("reasoning_gym_train_size must be at least 1, and the held-out sizes at least 0.")
        check_task(self.reasoning_gym, self.reasoning_gym_kwargs or {})


def read_json_object(text: str) -> dict[str, Any]:
    """Parse parameters from the command line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f'reasoning_gym_kwargs={text!r}; accepted: a JSON object such as {{"max_digits": 1}}.')
    return value


def check_task(name: str, parameters: dict[str, Any]) -> None:
    """
    Check task, parameters and scorer on one question.

    Raises:
        ValueError: if the library is missing, the name or a parameter is unknown, the task refuses a value, or its
            scorer needs metadata that JSON does not keep.
    """
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f'reasoning_gym={name!r} needs the library ({error}): pip install -e ".[reasoning-gym]"'
        ) from error
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS) or sorted(DATASETS)
        raise ValueError(f"reasoning_gym={name!r} is not a task of reasoning-gym; close names: {', '.join(close)}.")
    accepted = sorted({each.name for each in fields(DATASETS[name][1])} - {"seed", "size"})
    if unknown := sorted(parameters.keys() - set(accepted)):
        raise ValueError(f"reasoning_gym_kwargs has {unknown[0]!r}; {name} accepts {', '.join(accepted)}.")
    try:
        task = make_task(name, parameters, seed=0, size=1)
        entry = task[0]
        score = task.score_answer(entry["answer"], {**entry, "metadata": json.loads(json.dumps(entry["metadata"]))})
    except Exception as error:  # tasks refuse values by assertions and errors of several kinds
        raise ValueError(f"reasoning_gym={name!r} cannot be used with {parameters}: {error}") from error
    if entry["answer"] is not None and score != 1.0:
        raise ValueError(f"reasoning_gym={name!r} cannot be used: its scorer needs metadata that JSON does not keep.")


def make_task(name: str, parameters: dict[str, Any], seed: int, size: int) -> Any:
    """Create the library's dataset of one task."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=seed, size=size, **parameters)


def question_key(question: str) -> str:
    """Return the words of a question in alphabetical order. "3 * 7" and "7 * 3" have the same key."""
    return " ".join(sorted(question.split()))


def make_datasets(arguments: ReasoningGymArguments) -> dict[str, Dataset]:
    """
    Make the datasets `"train"`, `"validation"` and `"test"`, which share no question.

    The test questions are generated first, each once. Validation and training questions follow, without those that
    have the words of an earlier split's question, in any order. Seeds alone would not keep the splits apart: one digit
    times one digit has only 100 questions. Training questions may repeat.

    Args:
        arguments (`ReasoningGymArguments`):
            Task, sizes and seeds.

    Returns:
        `dict[str, Dataset]`: columns `prompt` (messages), `answer` and `metadata` (JSON, since its keys differ between
        questions). A split of size 0 is left out.

    Raises:
        ValueError: if the held-out questions leave no question for a later split.
    """
    task = {
        "task": arguments.reasoning_gym,
        "parameters": arguments.reasoning_gym_kwargs or {},
        "extractor": arguments.reasoning_gym_answer,
    }
    system = arguments.reasoning_gym_system_prompt
    messages = [] if system is None else [{"role": "system", "content": system}]
    datasets: dict[str, Dataset] = {}
    held_out: set[str] = set()
    for split in ("test", "validation", "train"):
        size = getattr(arguments, f"reasoning_gym_{split}_size")
        if size == 0:
            continue
        seed = getattr(arguments, f"reasoning_gym_{split}_seed")
        entries = list(make_task(task["task"], task["parameters"], seed, size))
        entries = [entry for entry in entries if question_key(entry["question"]) not in held_out]
        if not entries:
            raise ValueError(
                f"reasoning_gym={task['task']!r} has no {split} question beside {len(held_out)} held-out ones; reduce "
                "reasoning_gym_test_size or reasoning_gym_validation_size."
            )
        if split != "train":
            entries = list({entry["question"]: entry for entry in entries}.values())
            held_out |= {question_key(entry["question"]) for entry in entries}
        rows = []
        for entry in entries:
            prompt = arguments.reasoning_gym_prompt.replace("{question}", entry["question"])
            row = {"prompt": [*messages, {"role": "user", "content": prompt}], "answer": entry["answer"]}
            rows.append({**row, "metadata": json.dumps({**task, "entry": entry})})
        datasets[split] = Dataset.from_list(rows)
    return datasets


def trainer_datasets(arguments: Any, mixture: Any = None) -> dict[str, Dataset]:
    """
    Return `train_dataset` and `eval_dataset` of a recipe, empty where it names no task.

    The evaluation dataset is the validation split, or the test split where there is no validation split.

    Raises:
        ValueError: if the recipe names a dataset, its preparation or a `mixture` (its `datasets`) too.
    """
    if arguments.reasoning_gym is None:
        return {}
    others = {"dataset_name": arguments.dataset_name, "dataset_preparation": arguments.dataset_preparation}
    for name, value in {**others, "datasets": mixture}.items():
        if value:
            raise ValueError(f"{name}={value!r} has no effect beside reasoning_gym; remove one.")
    datasets = make_datasets(arguments)
    evaluation = datasets.get("validation", datasets.get("test"))
    return {"train_dataset": datasets["train"], "eval_dataset": evaluation}


def extract_answer(reply: str, extractor: str) -> str | None:
    """
    Return the answer within a reply, or `None`. A true minus sign becomes a hyphen, except in `"text"`.

    Args:
        reply (`str`):
            Text of the model.
        extractor (`str`):
            `"last_number"`: the last decimal number, without thousands separators. `"answer_tags"`: the text of the
            last `<answer>`. `"text"`: the whole reply without surrounding space.
    """
    if extractor == "text":
        return reply.strip()
    found = (NUMBER if extractor == "last_number" else TAGS).findall(reply.replace("\N{MINUS SIGN}", "-"))
    if not found:
        return None
    return found[-1].replace(",", "") if extractor == "last_number" else found[-1].strip()


@cache
def make_scorer(name: str, parameters: str) -> Any:
    """Return the library's scorer of one task. `parameters` is JSON, which can be a key of the cache."""
    return make_task(name, json.loads(parameters), seed=0, size=1).score_answer


def reasoning_gym_score(completions: list[Any], metadata: list[str], **kwargs: Any) -> list[float]:
    """
    The library's score of the extracted answer, 0 to 1.

    With `"last_number"` it is 1 or 0: the library would give 24 half the marks where 4 is right.

    Args:
        completions (`list`):
            Conversations, (B,).
        metadata (`list[str]`):
            Column of `make_datasets`, (B,).

    Returns:
        `list[float]`: rewards, (B,).
    """
    rewards = []
    for completion, text in zip(completions, metadata, strict=True):
        row, last = json.loads(text), completion[-1]
        reply = last.get("content") if last["role"] == "assistant" else None  # a cut conversation ends with a tool's
        answer = extract_answer(reply or "", row["extractor"])
        score_answer = make_scorer(row["task"], json.dumps(row["parameters"], sort_keys=True))
        try:
            score = float(score_answer(answer, row["entry"]))
        except Exception:  # some of the library's scorers raise on a reply that they cannot parse
            score = 0.0
        rewards.append(float(score == 1.0) if row["extractor"] == "last_number" else score)
    return rewards
