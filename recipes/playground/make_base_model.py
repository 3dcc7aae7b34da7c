"""
Make the playground's base models and their tokenizers: `python -m recipes.playground.make_base_model [NAME ...]`.

A model learns both ways of answering its task from supervised examples. Arithmetic appears abruptly, so it is measured
often, and the checkpoint kept is the one that answers right part of the time and whose rewards go with length as the
task means them to: what a length preference can be learned from. `demo` is the model of `recipes/configs/`; the
others, named for their tasks, are those of the arena study, a fifth of its size. Seeds are fixed, but other hardware,
thread counts or library versions round differently, so a run elsewhere gives a similar model, not the same bytes;
`measured.json` says what this one does.
"""

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from recipes.playground.lookup_agent import CHAT_TEMPLATE, RESPONSE_TEMPLATE
from recipes.playground.measure import MAX_NEW_TOKENS, measure
from recipes.playground.problem import EOS
from recipes.playground.tasks import find_task, make_splits

PLAYGROUND = Path(__file__).parent
MODEL_DIR = PLAYGROUND / "base_model"
SPECIAL_TOKENS = ["<pad>", "<eos>", "<unk>"]
CHARACTERS = "0123456789+-=;,:?ABCD"  # of the demo; 24 tokens with the special ones
ARENA_CHARACTERS = "0123456789+-=;?.&|~^ABCDEKNabc"  # one letter per task; 33 tokens with the special ones
LOOKUP_CHARACTERS = "0123456789Fabcdefgh[]()=?"
SEED = 7
BATCH_SIZE = 32  # rows; with 128 the same accuracy took more than twice the rows
MIN_STYLE_SHARE = 0.25  # of either way of answering


@dataclass(frozen=True)
class BaseModel:
    """
    How a base model is made, and which of its checkpoints is chosen.

    Args:
        task (`str`): what it is taught, a name in `TASKS` or `LONG_TASKS`.
        folder (`Path`): where it is written.
        characters (`str`): its vocabulary beside the special tokens.
        hidden_size (`int`), num_layers (`int`): its size; the feed-forward layer is four times as wide.
        max_length (`int`): tokens of prompt and completion that it can take.
        max_new_tokens (`int`): where a completion is cut when it is measured.
        steps (`int`): optimizer steps of the whole schedule, which ends early: see `pretrain`.
        learning_rate (`float`): peak of the one-cycle schedule.
        first_measure (`int`), measure_every (`int`): when it is measured, in optimizer steps.
        target_accuracy (`float`), accuracy_range (`tuple`): sampled at temperature 1.
        correlation_range (`tuple`): of reward and length within a group.
        styles_by_equals_sign (`bool`): whether a long answer is one with `=` in it, so that style shares can be told.
        chat_template (`str`), response_template (`dict`): of the tokenizer, for a task with an environment.
        problems (`int`): the most problems of a split that are measured.
    """

    task: str
    folder: Path
    characters: str = ARENA_CHARACTERS
    hidden_size: int = 64
    num_layers: int = 3
    max_length: int = 128
    max_new_tokens: int = MAX_NEW_TOKENS
    steps: int = 6400
    learning_rate: float = 3e-3
    first_measure: int = 400
    measure_every: int = 40
    target_accuracy: float = 0.35
    accuracy_range: tuple[float, float] = (0.20, 0.50)
    correlation_range: tuple[float, float] = (-1.0, 1.0)
    styles_by_equals_sign: bool = True
    chat_template: str | None = None
    response_template: dict[str, Any] | None = None
    problems: int = sys.maxsize


def _arena_model(task: str, **settings: Any) -> BaseModel:
    return BaseModel(task, PLAYGROUND / "models" / task, **settings)


BASE_MODELS: dict[str, BaseModel] = {
    "demo": BaseModel(
        "running_sum",
        MODEL_DIR,
        characters=CHARACTERS,
        hidden_size=128,
        num_layers=4,
        steps=3200,
        learning_rate=2e-3,
        first_measure=800,
        target_accuracy=0.30,
        accuracy_range=(0.20, 0.40),
        correlation_range=(0.25, 1.0),
    ),
    "running_sum": _arena_model("running_sum", target_accuracy=0.30, correlation_range=(0.2, 1.0)),
    "slippery_chain": _arena_model("slippery_chain", correlation_range=(-1.0, -0.2)),
    "idle_filler": _arena_model("idle_filler", correlation_range=(-0.06, 0.06), styles_by_equals_sign=False),
    "knights_and_knaves": _arena_model("knights_and_knaves"),
    "checked_sum": _arena_model("checked_sum"),
    "lookup_agent": _arena_model(
        "lookup_agent",
        characters=LOOKUP_CHARACTERS,
        steps=1200,
        target_accuracy=0.65,
        accuracy_range=(0.55, 0.75),
        correlation_range=(0.2, 1.0),
        chat_template=CHAT_TEMPLATE,
        response_template=RESPONSE_TEMPLATE,
    ),
}


def make_tokenizer(
    characters: str = CHARACTERS,
    max_length: int = 128,
    chat_template: str | None = None,
    response_template: dict[str, Any] | None = None,
) -> PreTrainedTokenizerFast:
    """
    Build the character-level tokenizer.

    Args:
        characters (`str`):
            The characters it knows.
        max_length (`int`):
            The most tokens of a text.
        chat_template (`str`, *optional*), response_template (`dict`, *optional*):
            How a conversation is written, and how calls are read from what the model wrote.

    Returns:
        `PreTrainedTokenizerFast`: one token per character and three special ones, with padding on the left, as
        generation needs it.
    """
    # Byte-level BPE without merges: one token per character, and a tokenizer of the kind that Qwen2 models have, since
    # AutoTokenizer of transformers 5 reads no other kind for them. It leaves out characters it does not know.
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    templates = {"chat_template": chat_template, "response_template": response_template}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **{name: template for name, template in templates.items() if template is not None},
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the tokenizer under the name of Qwen2's class, which transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "Qwen2Tokenizer"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def make_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int) -> Qwen2ForCausalLM:
    """
    Build the untrained model: four heads per layer, tied embeddings.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            Gives the vocabulary size and the ids of the padding and end tokens.
        hidden_size (`int`):
            Width; the feed-forward layer is four times as wide.
        num_layers (`int`):
            Number of layers.

    Returns:
        `Qwen2ForCausalLM`: in fp32, without dropout.
    """
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        use_cache=True,
        **ids,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, **ids)
    return model


def training_batches(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, held_out: set, task: str = "running_sum"
) -> Iterator[dict[str, torch.Tensor]]:
    """
    Draw supervised batches without end, each problem answered as its `demonstration` does: the short or the long way
    with equal odds, or a conversation with its environment.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            The playground's tokenizer.
        rng (`random.Random`):
            Source of problems and styles.
        held_out (`set`):
            Keys of problems that must not be trained on.
        task (`str`):
            A name in `TASKS` or `LONG_TASKS`.

    Yields:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask`, and `labels` for what the model is to write of the
        completion, each (B, T).
    """
    draw = find_task(task)
    while True:
        examples: list[list[tuple[str, bool]]] = []
        while len(examples) < BATCH_SIZE:
            problem = draw(rng)
            if problem.key not in held_out:
                examples.append([(problem.prompt, False), *problem.demonstration(rng)])
        full = ["".join(text for text, _ in pieces) for pieces in examples]
        batch = tokenizer(full, padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, pieces in enumerate(examples):
            start = 0
            for text, is_own in pieces:
                length = len(text.replace(EOS, "$"))  # one token per character, and one for the end of a turn
                if not is_own:
                    labels[row, start : start + length] = -100
                start += length
        yield {**batch, "labels": labels}


def is_usable(entry: dict, spec: BaseModel) -> bool:
    """Whether a measurement lies in the ranges that `spec` sets, with both ways of answering present."""
    within = [
        (entry["accuracy_sampled"], spec.accuracy_range),
        (entry["length_reward_correlation"], spec.correlation_range),
    ]
    if spec.styles_by_equals_sign:
        within.append((entry["share_long"], (MIN_STYLE_SHARE, 1 - MIN_STYLE_SHARE)))
    return all(low <= value <= high for value, (low, high) in within)


def choose(history: list[dict], spec: BaseModel) -> dict:
    """
    Choose the measurement whose sampled accuracy is nearest to the target among those that are usable.

    Args:
        history (`list[dict]`):
            Measurements with `accuracy_sampled`, `length_reward_correlation` and `share_long`.
        spec (`BaseModel`):
            Target and ranges.

    Returns:
        `dict`: one entry of `history`.

    Raises:
        RuntimeError: if none is good enough, with the nearest miss.
    """
    good = [entry for entry in history if is_usable(entry, spec)]
    nearest = min(good or history, key=lambda entry: abs(entry["accuracy_sampled"] - spec.target_accuracy))
    if not good:
        raise RuntimeError(f"no checkpoint is usable; the nearest to the target accuracy is {nearest}.")
    return nearest


def pretrain(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, spec: BaseModel, seed: int
) -> tuple[dict, list[dict]]:
    """
    Train on both styles, measure until the accuracy leaves its range, and load the best weights back into the model.

    Args:
        model (`Qwen2ForCausalLM`):
            Changed in place.
        tokenizer (`PreTrainedTokenizerFast`):
            The playground's tokenizer.
        spec (`BaseModel`):
            Task, schedule and what is looked for.
        seed (`int`):
            Seed of the batches.

    Returns:
        `tuple[dict, list[dict]]`: the measurement chosen and all of them, made on the validation split.
    """
    splits = make_splits(spec.task)
    validation = splits["validation"][: min(128, spec.problems)]
    held_out = {problem.key for split in ("validation", "test") for problem in splits[split]}
    batches = training_batches(tokenizer, random.Random(seed), held_out, spec.task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, spec.learning_rate, total_steps=spec.steps, pct_start=0.1
    )
    history, checkpoints = [], {}
    progress = tqdm(range(1, spec.steps + 1), desc=f"pre-training on {spec.task}", unit="step")
    for step in progress:
        model.train()
        loss = model(**{name: tensor.to(model.device) for name, tensor in next(batches).items()}).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step >= spec.first_measure and step % spec.measure_every == 0:
            figures = measure(
                model, tokenizer, validation, num_samples=4, seed=seed, max_new_tokens=spec.max_new_tokens
            )
            history.append({"step": step, "loss": round(loss.item(), 4), **figures})
            checkpoints[step] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
            progress.set_postfix(accuracy=figures["accuracy_sampled"], corr=figures["length_reward_correlation"])
            # Past the range there is nothing left to choose. Decaying the learning rate within it instead delays the
            # abrupt rise: a schedule of 1800 steps ended at 0.10.
            if figures["accuracy_sampled"] > spec.accuracy_range[1]:
                break
    progress.close()
    chosen = choose(history, spec)
    model.load_state_dict(checkpoints[chosen["step"]])
    return chosen, history


def final_figures(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, spec: BaseModel, seed: int
) -> dict[str, float]:
    """Measure the chosen model on problems that neither training nor the choice has seen; `measured.json` holds it."""
    problems, limit = make_splits(spec.task)["test"][: spec.problems], spec.max_new_tokens
    greedy = measure(model, tokenizer, problems, num_samples=1, seed=seed, greedy=True, max_new_tokens=limit)
    sampled = measure(model, tokenizer, problems, num_samples=8, seed=seed, max_new_tokens=limit)
    return {**sampled, "accuracy_greedy": greedy["accuracy_sampled"], "mean_length_greedy": greedy["mean_length"]}


def make(spec: BaseModel, seed: int, folder: Path, device: str = "cpu") -> dict:
    """
    Train, choose, measure and write one base model.

    Args:
        spec (`BaseModel`): which.
        seed (`int`): seed of weights and batches.
        folder (`Path`): where it is written.
        device (`str`): where it is trained, as torch names it.

    Returns:
        `dict`: what `measured.json` holds: figures on the test split, seed, size, versions, course of the training.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(spec.characters, spec.max_length, spec.chat_template, spec.response_template)
    model = make_model(tokenizer, spec.hidden_size, spec.num_layers).to(device)
    chosen, history = pretrain(model, tokenizer, spec, seed)
    measured = {
        "tasks": {spec.task: final_figures(model, tokenizer, spec, seed)},
        "split": "test",
        "seed": seed,
        "parameters": model.num_parameters(),
        "chosen_step": chosen["step"],
        "schedule_steps": spec.steps,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, tokenizers, datasets)},
        },
        "validation_history": history,
    }
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    (folder / "measured.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    return measured


def main() -> None:
    """Make the models named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description="Make the playground's base models and their tokenizers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BASE_MODELS)} (default: all)")
    parser.add_argument("--output_dir", type=Path, help="folder to write into, one folder per name, in place of the "
                        "playground's own")  # fmt: skip
    parser.add_argument("--seed", type=int, default=SEED, help="seed of weights and batches (default: %(default)s)")
    args = parser.parse_args()
    for name in args.names or BASE_MODELS:
        if name not in BASE_MODELS:
            parser.error(f"unknown name {name!r}; accepted: {', '.join(BASE_MODELS)}")
    for name in args.names or BASE_MODELS:
        spec = BASE_MODELS[name]
        measured = make(spec, args.seed, args.output_dir / name if args.output_dir else spec.folder)
        print(json.dumps({key: value for key, value in measured.items() if key != "validation_history"}, indent=2))


if __name__ == "__main__":
    main()
