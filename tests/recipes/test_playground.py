"""The playground: its tasks, data, reward and base models, and that its recipe learns."""

import itertools
import json
import random
import re
from functools import cache

import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.playground.knights_and_knaves import is_consistent, solutions
from recipes.playground.lookup_agent import LookUp
from recipes.playground.make_base_model import BASE_MODELS, MODEL_DIR, is_usable, make_tokenizer, save_tokenizer
from recipes.playground.make_data import DATA_DIR, write_data
from recipes.playground.measure import measure
from recipes.playground.rewards import exact_answer
from recipes.playground.rollouts import roll_out
from recipes.playground.tasks import SPLIT_SIZES, TASKS, Problem, make_splits
from recipes.studies.arena import learn_agent
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.recipe import train_recipe
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer


@cache
def loaded(task: str):
    folder = BASE_MODELS[task].folder
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def drawn(task: str, count: int) -> list[Problem]:
    rng = random.Random(0)
    return [TASKS[task](rng) for _ in range(count)]


def numbers_of(text: str) -> tuple[int, ...]:
    return tuple(sorted(int(number) for number in re.findall(r"\d+", text)))


def identity(task: str, row: dict):
    if task == "lookup_agent":
        return row["prompt"][0]["content"], row["table"]
    return row["prompt"] if task == "knights_and_knaves" else numbers_of(row["prompt"])


def test_data_files_are_reproduced_byte_for_byte_and_load_as_a_dataset(tmp_path):
    written = write_data(tmp_path)
    committed = sorted(path.relative_to(DATA_DIR) for path in DATA_DIR.rglob("*.jsonl"))
    assert sorted(path.relative_to(tmp_path) for path in written) == committed
    assert all((tmp_path / path).read_bytes() == (DATA_DIR / path).read_bytes() for path in committed)
    rows = load_dataset(str(DATA_DIR / "running_sum"))
    assert {split: len(rows[split]) for split in rows} == SPLIT_SIZES
    for row in itertools.chain(*rows.values()):
        assert set(row) == {"prompt", "solution"} and re.fullmatch(r"A\d\d(\+\d\d){1,3}=", row["prompt"])
        assert row["solution"] == str(sum(numbers_of(row["prompt"])))


@pytest.mark.parametrize("task", TASKS)
def test_splits_never_share_a_problem_and_the_base_model_can_read_each(task):
    splits = make_splits(task)
    seen = [identity(task, problem.row()) for problems in splits.values() for problem in problems]
    assert len(set(seen)) == len(seen) and min(map(len, splits.values())) >= 256 and make_splits(task) == splits
    assert make_splits(task, seed=1, sizes={"train": 64}) != make_splits(task, seed=2, sizes={"train": 64})
    for problem in drawn(task, 300):
        assert set(problem.prompt + problem.short + problem.long) <= set(BASE_MODELS[task].characters)
        assert problem.prompt[0] == "ABCDEF"[list(TASKS).index(task)] and problem.prompt[-1] == "="
        assert exact_answer([problem.short], [problem.solution]) == [1.0]
        if task in ("running_sum", "slippery_chain", "idle_filler"):
            assert int(problem.solution) == sum(numbers_of(problem.prompt))


def test_knights_and_knaves_have_one_solution_and_searches_refute_only_what_is_wrong():
    # "b is a knave" and "we are of one kind": were a a knave, b would be a knight, whose statement would be false.
    assert solutions(["bN", "a~b"]) == ["KN"]
    for problem in drawn("knights_and_knaves", 300):
        statements = problem.prompt[1:-1].split(";")
        cases = map("".join, itertools.product("KN", repeat=len(statements)))
        assert [kinds for kinds in cases if is_consistent(statements, kinds)] == [problem.solution]
        search, answer = problem.long.split("=")
        *refuted, found = search.split("-")
        assert found == answer == problem.solution and found not in refuted


def said(content, role="assistant", **more) -> dict:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        *((text, 1.0) for text in ("164", " 164\n", "47+86=133;133+31=164", "47+86=999;999+31=164")),
        *((text, 0.0) for text in ("165", "47+86=164;164+31=195", "47+86=133;133+31=", "164;", "164+", "1164")),
        *((text, 0.0) for text in ("0164", "16", "-164", "164.0", "164=165", "", "=", "+;=;+", "é😀", None)),
        ([said("133+31=164")], 1.0),
        ([said("165", "tool"), said("164")], 1.0),
        ([said(""), said("164", "tool")], 0.0),  # cut off: nobody answered
        ([said("164", tool_calls=[{"type": "function"}])], 0.0),  # it asks again
        ([said([{"type": "text", "text": "164"}])], 1.0),
        ([said(None)], 0.0),
        ([], 0.0),
    ],
)
def test_exact_answer(completion, reward):
    # The neighbour keeps its own reward: solutions are matched by position.
    rewards = exact_answer(prompts=["A47+86+31="] * 2, completions=[completion, "7"], solution=["164", "7"])
    assert rewards == [reward, 1.0]


def test_exact_answer_refuses_lists_that_do_not_match_and_never_matches_nothing():
    with pytest.raises(ValueError, match="solution has 1 entries for 2 completions"):
        exact_answer(["1", "2"], ["1"])
    assert exact_answer([""], [""]) == [0.0]


def test_the_tokenizer_is_one_token_per_character_pads_on_the_left_and_is_saved_as_made(tmp_path):
    tokenizer, texts = loaded("demo")[1], ["A47+86=", "A47+86+31="]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[0] * 3 + [1] * 7, [1] * 10]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == texts
    assert tokenizer("A4 xé?")["input_ids"] == tokenizer("A4?")["input_ids"]  # unknown characters are left out
    save_tokenizer(make_tokenizer(), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (MODEL_DIR / name).read_bytes()


@pytest.mark.parametrize("name", BASE_MODELS)
def test_a_base_model_is_what_its_figures_say(name):
    """512 samples of 128 problems: three standard errors of the mean over problems are below 0.09."""
    spec, (model, tokenizer) = BASE_MODELS[name], loaded(name)
    recorded = json.loads((spec.folder / "measured.json").read_text())
    figures = recorded["tasks"][spec.task]
    # The choice was made on the validation split; the test split may lie a little outside.
    assert spec.accuracy_range[0] <= figures["accuracy_sampled"] <= spec.accuracy_range[1] + 0.1
    (chosen,) = (entry for entry in recorded["validation_history"] if entry["step"] == recorded["chosen_step"])
    assert is_usable(chosen, spec)
    assert model.num_parameters() == recorded["parameters"] and model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    found = measure(model, tokenizer, make_splits(spec.task)["test"][:128], num_samples=4, seed=11)
    assert found["accuracy_sampled"] == pytest.approx(figures["accuracy_sampled"], abs=0.09)
    assert found["mean_length"] == pytest.approx(figures["mean_length"], rel=0.15)


def test_the_readme_gives_the_measured_figures():
    readme = (MODEL_DIR.parent / "README.md").read_text()
    recorded = json.loads((MODEL_DIR / "measured.json").read_text())["tasks"]["running_sum"]
    table = re.findall(r"^\| .+ \| ([\d.]+) \|$", readme.partition("## The six tasks")[0], re.MULTILINE)
    assert len(table) == 7 and set(map(float, table)) <= set(recorded.values())
    columns = ("accuracy_sampled", "accuracy_greedy", "mean_length", "length_reward_correlation")
    for task in TASKS:
        recorded = json.loads((MODEL_DIR.parent / "models" / task / "measured.json").read_text())["tasks"][task]
        assert f"| `{task}` | {' | '.join(f'{recorded[name]:.3f}' for name in columns)} |" in readme


def test_the_demo_learns_and_lambda_ends_positive():
    command = ["recipes/train.py", "--config", "recipes/configs/playground/demo.yaml", "--max_steps", "50"]
    history = train_recipe(command)
    before, after = (entry["eval_reward"] for entry in history if "eval_reward" in entry)
    # One sample of 512 problems has a standard error of 0.02; seeds 0 to 3 gained 0.07 to 0.2 by then.
    assert after > before + 0.05
    lambdas = [entry["lambda/value"] for entry in history if "lambda/value" in entry]
    assert len(lambdas) == 50 and 0 < lambdas[0] < 0.02 and lambdas[-1] > 0.08


def test_the_tokenizer_renders_and_reads_a_conversation():
    tokenizer = loaded("lookup_agent")[1]
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"key": "a"}}}
    messages = [{"role": "user", "content": "Fa"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    messages += [{"role": "tool", "name": "look_up", "content": "7"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "Fa=[a]<eos>(7)="
    assert tokenizer.parse_response("[a]<eos>", prefix="Fa=")["tool_calls"] == [call]
    # The second turn is read alone, whatever came before it.
    assert tokenizer.parse_response("7<eos>", prefix="Fa=[a]<eos>(7)=") == {"role": "assistant", "content": "7"}


@pytest.mark.parametrize("limit", [48, 18, 9])
def test_conversations_for_measuring_are_those_of_trls_loop(limit, tmp_path):
    model, tokenizer = loaded("lookup_agent")
    problems = make_splits("lookup_agent")["test"][:24]
    twice = [p for p in problems for _ in range(2)]
    completions, own = roll_out(model, tokenizer, twice, limit=limit, sampling={"do_sample": False})
    rows, options = [problem.row() for problem in twice], {"top_k": 1, "max_completion_length": limit}
    options |= {"per_device_train_batch_size": len(rows), "num_generations": 2, "use_cpu": True, "bf16": False}
    args = LambdaGRPOConfig(str(tmp_path), report_to="none", **options)
    given = {"train_dataset": Dataset.from_list(rows), "environment_factory": LookUp}
    trainer = LambdaGRPOTrainer(model.train(), exact_answer, args, processing_class=tokenizer, **given)
    output = trainer._generate_and_score_completions(rows)
    for row, (ids, mask) in enumerate(zip(completions, own, strict=True)):
        kept = output["completion_mask"][row].bool()
        assert output["completion_ids"][row][kept].tolist() == ids
        assert output["tool_mask"][row][kept].tolist() == mask
    assert {0, 1} == {x for mask in own for x in mask}
    assert max(map(len, own)) == (26 if limit == 48 else limit)


def test_it_learns_to_look_everything_up():
    options = ["--max_steps", "30", "--eval_strategy", "no", "--eval_on_start", "false"]
    history = train_recipe(["recipes/train.py", "--config", str(learn_agent.RECIPE), *options])
    logged = {key: [entry[key] for entry in history if key in entry] for key in history[0]}
    first, last = (sum(logged["reward"][s]) / 10 for s in (slice(10), slice(-10, None)))
    assert last > first + 0.1
    assert sum(logged["tools/call_frequency"][-10:]) > sum(logged["tools/call_frequency"][:10])
    assert logged["lambda/value"][-1] > 0 and max(logged["tools/failure_frequency"]) < 0.2


def test_the_rows_of_six_seeds_show_what_the_readme_says():
    rows = Ledger(learn_agent.RESULTS, ("arm", "seed")).rows()
    readme = " ".join((BASE_MODELS["demo"].folder.parent / "README.md").read_text().split())
    for arm in learn_agent.ARMS:
        runs = [row for row in rows if row["arm"] == arm]
        assert [int(row["seed"]) for row in runs] == list(learn_agent.SEEDS)
        assert sum(float(row["reward_last_10"]) > 0.9 for row in runs) >= 5
        columns = ("reward_first_5", "reward_last_10", "held_out_before", "held_out_after", "calls_last_10")
        means = [f"{sum(float(row[name]) for row in runs) / len(runs):.3f}" for name in columns]
        assert f"| {' | '.join(means)} |" in readme
