"""The tasks of the playground beside `running_sum`, and the small base models of all of them."""

import itertools
import json
import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.playground.knights_and_knaves import is_consistent, is_true, solutions
from recipes.playground.make_base_model import BASE_MODELS, is_usable
from recipes.playground.measure import measure
from recipes.playground.rewards import exact_answer
from recipes.playground.tasks import SLIP, TASKS, checked_sum, idle_filler, make_splits, slippery_chain

NEW_TASKS = [task for task in TASKS if task != "running_sum"]


def identity(task: str, row: dict):
    """What makes a problem itself, read off its row: sums do not depend on the order of their terms."""
    if task == "lookup_agent":
        return row["prompt"][0]["content"], row["table"]
    return row["prompt"] if task == "knights_and_knaves" else tuple(sorted(re.findall(r"\d+", row["prompt"])))


@pytest.mark.parametrize("task", TASKS)
def test_training_tuning_and_test_never_share_a_problem(task):
    splits = make_splits(task)
    seen = [identity(task, problem.row()) for problems in splits.values() for problem in problems]
    assert len(set(seen)) == len(seen)
    assert min(map(len, splits.values())) >= 256
    assert make_splits(task) == splits
    sizes = {"train": 64}
    assert make_splits(task, seed=1, sizes=sizes) != make_splits(task, seed=2, sizes=sizes)


@pytest.mark.parametrize("task", TASKS)
def test_base_model_can_read_and_answer_every_problem(task):
    spec = BASE_MODELS[task]
    rng = random.Random(0)
    for problem in (TASKS[task](rng) for _ in range(300)):
        assert set(problem.prompt + problem.short + problem.long) <= set(spec.characters)
        assert problem.prompt[0] == "ABCDEF"[list(TASKS).index(task)] and problem.prompt[-1] == "="
        assert exact_answer([problem.short], [problem.solution]) == [1.0]


def test_sums_have_the_right_answers_of_equal_width():
    rng = random.Random(1)
    for task in (slippery_chain, idle_filler):
        for problem in (task(rng) for _ in range(200)):
            first, second = map(int, re.findall(r"\d+", problem.prompt))
            assert problem.solution == f"{first + second:03d}"
    for problem in (checked_sum(rng) for _ in range(200)):
        assert int(problem.solution) == sum(map(int, re.findall(r"\d+", problem.prompt))) % 10


def test_a_chain_is_wrong_more_often_the_more_links_it_has():
    rng = random.Random(2)
    right: dict[int, list[float]] = {}
    for problem in (slippery_chain(rng) for _ in range(8000)):
        links = re.split("[;=]", problem.long)
        right.setdefault(len(links), []).append(exact_answer([problem.long], [problem.solution])[0])
    assert sorted(right) == [2, 3, 4, 5, 6]
    for links, rewards in right.items():
        # Slips of opposite sign may cancel: a little above (1 - SLIP)^links.
        assert (1 - SLIP) ** links - 0.05 < sum(rewards) / len(rewards) < (1 - SLIP) ** links + 0.13


def test_fillers_are_idle_and_span_0_to_20():
    rng = random.Random(3)
    problems = [idle_filler(rng) for _ in range(2000)]
    counts = [text.count(".") for p in problems for text in (p.short, p.long)]
    assert set(counts) == set(range(21))
    assert exact_answer([p.long for p in problems], [p.solution for p in problems]) == [1.0] * 2000


def test_checks_repeat_the_same_steps_and_lengths_span_1_to_47():
    rng = random.Random(4)
    problems = [checked_sum(rng) for _ in range(3000)]
    for problem in problems:
        assert len(set(problem.long.split("?"))) == 1
        total = None
        for step in problem.long.split("?")[0].split(";"):
            left, right, result = map(int, re.fullmatch(r"(\d)\+(\d)=(\d)", step).groups())
            assert (left + right) % 10 == result and total in (None, left)
            total = result
    assert {len(p.short) for p in problems} == {1} and max(len(p.long) for p in problems) == 47


@pytest.mark.parametrize(
    ("statement", "true_for"),
    [
        ("aK", ["KK", "KN"]),
        ("bN", ["KN", "NN"]),
        ("aK&bK", ["KK"]),
        ("aN|bK", ["KK", "NK", "NN"]),
        ("a~b", ["KK", "NN"]),
        ("b^a", ["KN", "NK"]),
    ],
)
def test_statements(statement, true_for):
    assert [kinds for kinds in ("KK", "KN", "NK", "NN") if is_true(statement, kinds)] == true_for


def test_knights_and_knaves_have_one_solution_and_searches_refute_only_what_is_wrong():
    # "b is a knave" and "we are of one kind": were a a knave, b would be a knight, whose statement would be false.
    assert solutions(["bN", "a~b"]) == ["KN"]
    rng = random.Random(5)
    for problem in (TASKS["knights_and_knaves"](rng) for _ in range(300)):
        statements = problem.prompt[1:-1].split(";")
        consistent = [
            "".join(kinds)
            for kinds in itertools.product("KN", repeat=len(statements))
            if is_consistent(statements, "".join(kinds))
        ]
        assert consistent == [problem.solution]
        search, answer = problem.long.split("=")
        *refuted, found = search.split("-")
        assert found == answer == problem.solution and found not in refuted
        assert all(len(case) == len(found) for case in refuted)


@pytest.mark.parametrize("task", TASKS)
def test_base_model_is_what_its_figures_say(task):
    spec = BASE_MODELS[task]
    recorded = json.loads((spec.folder / "measured.json").read_text())
    # The choice was made on the validation split; the test split may lie a little outside.
    low, high = spec.accuracy_range
    assert low <= recorded["tasks"][task]["accuracy_sampled"] <= high + 0.1
    chosen = [e for e in recorded["validation_history"] if e["step"] == recorded["chosen_step"]]
    assert len(chosen) == 1 and is_usable(chosen[0], spec)
    model = AutoModelForCausalLM.from_pretrained(spec.folder)
    assert model.num_parameters() == recorded["parameters"] and model.dtype == torch.float32
    problems = make_splits(task)["test"][:128]
    figures = measure(model, AutoTokenizer.from_pretrained(spec.folder), problems, num_samples=4, seed=11)
    assert figures["accuracy_sampled"] == pytest.approx(recorded["tasks"][task]["accuracy_sampled"], abs=0.09)
    assert figures["mean_length"] == pytest.approx(recorded["tasks"][task]["mean_length"], rel=0.15)
