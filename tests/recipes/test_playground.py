"""The playground: its data, its reward, its base model."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.playground.make_base_model import (
    BASE_MODELS,
    CHARACTERS,
    MODEL_DIR,
    choose,
    make_tokenizer,
    save_tokenizer,
    training_batches,
)
from recipes.playground.make_data import DATA_DIR, write_data
from recipes.playground.measure import measure, within_group_correlation
from recipes.playground.rewards import exact_answer
from recipes.playground.tasks import SPLIT_SIZES, TASKS, Problem, make_splits, running_sum


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def rows():
    dataset = load_dataset(str(DATA_DIR / "running_sum"))
    return {split: list(dataset[split]) for split in dataset}


def numbers_of(prompt: str) -> tuple[int, ...]:
    """The multiset of numbers in a prompt, read without the package's own key."""
    return tuple(sorted(int(number) for number in re.findall(r"\d+", prompt)))


def test_data_files_are_reproduced_byte_for_byte(tmp_path: Path):
    written = write_data(tmp_path)
    committed = sorted(path.relative_to(DATA_DIR) for path in DATA_DIR.rglob("*.jsonl"))
    assert sorted(path.relative_to(tmp_path) for path in written) == committed
    for path in committed:
        assert (tmp_path / path).read_bytes() == (DATA_DIR / path).read_bytes()


def test_another_seed_gives_other_problems():
    sizes = {"train": 8}
    assert make_splits("running_sum", seed=1, sizes=sizes) != make_splits("running_sum", seed=2, sizes=sizes)


def test_load_dataset_reads_the_folder(rows):
    assert {split: len(rows[split]) for split in rows} == SPLIT_SIZES
    for split in rows:
        assert set(rows[split][0]) == {"prompt", "solution"}
        for row in rows[split]:
            assert re.fullmatch(r"A\d\d(\+\d\d){1,3}=", row["prompt"])
            assert row["solution"] == str(sum(numbers_of(row["prompt"])))


def test_no_problem_occurs_twice_within_or_across_splits(rows):
    keys = [numbers_of(row["prompt"]) for split in rows for row in rows[split]]
    assert len(set(keys)) == len(keys) == sum(SPLIT_SIZES.values())


def test_splits_are_alike_although_small_problems_repeat_sooner(monkeypatch):
    # Every second problem drawn is one of 100 small ones: in the order of the draw, only the first split gets any.
    def task(rng: random.Random) -> Problem:
        number = rng.randrange(100) if rng.random() < 0.5 else rng.randrange(100, 10**9)
        return Problem(number, str(number), "", "", "")

    monkeypatch.setitem(TASKS, "uneven", task)
    for problems in make_splits("uneven", sizes={"train": 500, "test": 500}).values():
        assert 30 < sum(problem.key < 100 for problem in problems) < 70


def test_the_order_of_the_numbers_is_not_a_new_problem():
    rng = random.Random(0)
    problems = [running_sum(rng) for _ in range(2000)]
    for problem in problems:
        assert problem.key == numbers_of(problem.prompt)


def test_both_styles_are_right_and_the_steps_add_up():
    rng = random.Random(3)
    for problem in (running_sum(rng) for _ in range(200)):
        assert exact_answer([problem.short, problem.long], [problem.solution] * 2) == [1.0, 1.0]
        assert len(problem.long) > len(problem.short)
        for step in problem.long.split(";"):
            left, right, result = map(int, re.fullmatch(r"(\d+)\+(\d+)=(\d+)", step).groups())
            assert left + right == result


def test_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task is 'sums'; accepted: running_sum, "):
        make_splits("sums")


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("164", 1.0),
        (" 164\n", 1.0),
        ("47+86=133;133+31=164", 1.0),
        ("47+86=999;999+31=164", 1.0),  # only the answer counts
        ([{"role": "assistant", "content": "133+31=164"}], 1.0),
        ([{"role": "user", "content": "165"}, {"role": "assistant", "content": "164"}], 1.0),
        ([{"role": "tool", "content": "165"}, {"role": "assistant", "content": "164"}], 1.0),
        ([{"role": "assistant", "content": ""}, {"role": "tool", "content": "164"}], 0.0),  # cut off: nobody answered
        ([{"role": "assistant", "content": "164", "tool_calls": [{"type": "function"}]}], 0.0),  # it asks again
        ([{"role": "assistant", "content": [{"type": "text", "text": "164"}]}], 1.0),
        ("165", 0.0),
        ("47+86=164;164+31=195", 0.0),  # right number, not at the end
        ("47+86=133;133+31=", 0.0),
        ("164;", 0.0),
        ("164+", 0.0),
        ("1164", 0.0),
        ("0164", 0.0),
        ("16", 0.0),
        ("-164", 0.0),
        ("164.0", 0.0),
        ("164=165", 0.0),
        ("", 0.0),
        ("=", 0.0),
        ("+;=;+", 0.0),
        ("é😀", 0.0),
        (None, 0.0),
        ([], 0.0),
        ([{"role": "assistant", "content": None}], 0.0),
        ([{"role": "assistant"}], 0.0),
        ([{"role": "assistant", "content": [{"type": "image"}]}], 0.0),
    ],
)
def test_exact_answer(completion, reward):
    # The neighbour keeps its own reward: solutions are matched by position.
    assert exact_answer(prompts=["A47+86+31="] * 2, completions=[completion, "7"], solution=["164", "7"]) == [
        reward,
        1.0,
    ]


def test_exact_answer_refuses_lists_that_do_not_match():
    with pytest.raises(ValueError, match="solution has 1 entries for 2 completions"):
        exact_answer(["1", "2"], ["1"])


def test_an_empty_solution_is_never_matched():
    assert exact_answer([""], [""]) == [0.0]


def test_within_group_correlation_ignores_differences_between_groups():
    # Between the groups longer is worse, inside each it is better: only the inside counts.
    rewards = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    lengths = torch.tensor([[3.0, 3.0, 3.0, 1.0], [10.0, 10.0, 10.0, 12.0]])
    assert within_group_correlation(rewards, lengths) == pytest.approx(1.0)
    assert within_group_correlation(rewards, -lengths) == pytest.approx(-1.0)
    assert within_group_correlation(rewards, torch.ones(2, 4)) == 0.0


def test_choose_takes_the_nearest_that_carries_a_length_signal():
    good = {"accuracy_sampled": 0.36, "length_reward_correlation": 0.3, "share_long": 0.5}
    nearer_without_signal = {**good, "accuracy_sampled": 0.30, "length_reward_correlation": 0.1}
    nearer_of_one_style = {**good, "accuracy_sampled": 0.31, "share_long": 0.9}
    spec = BASE_MODELS["demo"]
    assert choose([nearer_without_signal, good, nearer_of_one_style], spec) is good
    with pytest.raises(RuntimeError, match="no checkpoint is usable"):
        choose([nearer_without_signal], spec)


def test_training_batches_leave_out_held_out_problems_and_prompts(tokenizer):
    rng = random.Random(5)
    first = next(training_batches(tokenizer, random.Random(5), set()))
    texts = tokenizer.batch_decode(first["input_ids"], skip_special_tokens=True)
    held_out = {numbers_of(text.split("=")[0]) for text in texts}
    second = next(training_batches(tokenizer, rng, held_out))
    for ids, labels in zip(second["input_ids"], second["labels"], strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        prompt, _, completion = text.partition("=")
        assert numbers_of(prompt) not in held_out
        assert tokenizer.decode(labels[labels != -100]) == completion + tokenizer.eos_token


def test_tokenizer_is_one_token_per_character_and_pads_on_the_left(tokenizer):
    texts = ["A47+86=", "A47+86+31="]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[0] * 3 + [1] * 7, [1] * 10]
    assert batch["input_ids"][0, :3].tolist() == [tokenizer.pad_token_id] * 3
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == texts
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == len(set(tokenizer.get_vocab().values())) == 24  # nothing was added on loading
    assert tokenizer("A4 xé?")["input_ids"] == tokenizer("A4?")["input_ids"]  # unknown characters are left out


def test_the_saved_tokenizer_is_the_one_that_was_made(tokenizer, tmp_path: Path):
    made = make_tokenizer()
    save_tokenizer(made, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (MODEL_DIR / name).read_bytes()
    assert made(CHARACTERS)["input_ids"] == tokenizer(CHARACTERS)["input_ids"]
    assert made.decode(made(CHARACTERS)["input_ids"]) == CHARACTERS


def test_base_model_files(model, tokenizer):
    assert 0.8e6 < model.num_parameters() < 1.3e6
    assert model.dtype == torch.float32
    assert (MODEL_DIR / "model.safetensors").stat().st_size < 6e6
    assert model.config.vocab_size == len(tokenizer)
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert model.config.attention_dropout == 0.0


def test_base_model_is_right_part_of_the_time_and_more_often_at_length(model, tokenizer):
    problems = make_splits("running_sum")["test"][:128]
    figures = measure(model, tokenizer, problems, num_samples=8, seed=11)
    assert 0.2 <= figures["accuracy_sampled"] <= 0.4
    assert figures["length_reward_correlation"] > 0.1
    assert 0.25 <= figures["share_long"] <= 0.75
    recorded = json.loads((MODEL_DIR / "measured.json").read_text())["tasks"]["running_sum"]
    # 1024 samples of 128 problems: three standard errors of the mean over problems are below 0.08.
    for key in ("accuracy_sampled", "share_long"):
        assert figures[key] == pytest.approx(recorded[key], abs=0.08)


def test_measure_leaves_the_global_random_state_alone(model, tokenizer):
    problems = make_splits("running_sum")["test"][:4]
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = measure(model, tokenizer, problems, num_samples=2, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert measure(model, tokenizer, problems, num_samples=2, seed=1) == first


def test_the_readme_gives_the_measured_figures():
    readme = (MODEL_DIR.parent / "README.md").read_text()
    recorded = json.loads((MODEL_DIR / "measured.json").read_text())["tasks"]["running_sum"]
    demo, _, _ = readme.partition("## The six tasks")
    table = re.findall(r"^\| .+ \| ([\d.]+) \|$", demo, re.MULTILINE)
    assert len(table) == 7 and set(map(float, table)) <= set(recorded.values())
    columns = ("accuracy_sampled", "accuracy_greedy", "mean_length", "length_reward_correlation")
    for task in TASKS:
        recorded = json.loads((MODEL_DIR.parent / "models" / task / "measured.json").read_text())["tasks"][task]
        assert f"| `{task}` | {' | '.join(f'{recorded[name]:.3f}' for name in columns)} |" in readme
