"""The adapter to reasoning-gym, on a stand-in for the library."""

import json
import sys
from dataclasses import dataclass

import pytest
from gym_stand_in import install_gym

from recipes import reasoning_gym_tasks
from recipes.reasoning_gym_tasks import (
    ReasoningGymArguments,
    extract_answer,
    make_datasets,
    question_key,
    reasoning_gym_score,
    trainer_datasets,
)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    reasoning_gym_tasks.make_scorer.cache_clear()
    yield install_gym(monkeypatch)
    reasoning_gym_tasks.make_scorer.cache_clear()


def products(**changes):
    return ReasoningGymArguments(**{"reasoning_gym": "products", "reasoning_gym_answer": "last_number", **changes})


def reply(text, role="assistant"):
    return [{"role": role, "content": text}]


@pytest.mark.parametrize(
    ("text", "extractor", "answer"),
    [
        ("3 * 7 = 21", "last_number", "21"),
        ("3*7=21.", "last_number", "21"),
        ("It is **21**, not 24 or so.", "last_number", "24"),
        ("5 - 3 = -2", "last_number", "-2"),
        ("between 3-4", "last_number", "4"),
        ("1,234,567.50", "last_number", "1234567.50"),
        ("1,2,3", "last_number", "3"),
        ("none", "last_number", None),
        ("x4", "last_number", None),
        ("<answer>3</answer> or <answer> 4\n</answer>", "answer_tags", "4"),
        ("<answer>3", "answer_tags", None),
        (" 21 \n", "text", "21"),
    ],
)
def test_answers_are_extracted(text, extractor, answer):
    assert extract_answer(text, extractor) == answer


def test_the_reward_scores_the_extracted_answer():
    row = {"task": "products", "parameters": {}, "extractor": "last_number"}
    entry = {"question": "What is 2 * 2", "answer": "4", "metadata": {"terms": [2, 2]}}
    metadata = json.dumps({**row, "entry": entry})
    texts = ["2 * 2 = 4", "4 is 2 * 2", "24", "4, no 5", "", "four"]
    rewards = reasoning_gym_score([reply(text) for text in texts], metadata=[metadata] * len(texts), answer=["4"] * 6)
    assert rewards == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]  # the library alone gives part marks to four of them
    assert reasoning_gym_score([reply("4", role="tool")], metadata=[metadata]) == [0.0]

    tagged = json.dumps({**row, "extractor": "answer_tags", "entry": entry})
    texts = ["<answer>4</answer>", "4", "<answer>24</answer>"]
    rewards = reasoning_gym_score([reply(text) for text in texts], metadata=[tagged] * 3)
    assert rewards == [1.0, 0.0, 0.5]  # other extractors keep the library's part marks


def test_each_row_is_scored_by_its_own_task_parameters_and_entry():
    rows = []
    for name, parameters, answer in [
        ("products", {}, "4"),
        ("products", {}, "6"),
        ("fragile", {}, "04"),
        ("last_digits", {"max_digits": 1}, "14"),
        ("last_digits", {"max_digits": 2}, "14"),
    ]:
        entry = {"question": "", "answer": answer, "metadata": {"terms": [1]}}
        rows.append(json.dumps({"task": name, "parameters": parameters, "extractor": "text", "entry": entry}))
    assert reasoning_gym_score([reply("4")] * 5, metadata=rows) == [1.0, 0.0, 1.0, 1.0, 0.0]


def test_a_scorer_that_raises_on_a_reply_gives_zero():
    entry = {"question": "", "answer": "4", "metadata": {}}
    row = json.dumps({"task": "fragile", "parameters": {}, "extractor": "text", "entry": entry})
    assert reasoning_gym_score([reply("four"), reply("4")], metadata=[row, row]) == [0.0, 1.0]


@pytest.mark.parametrize("sizes", [(500, 0, 40), (500, 10, 20), (3, 1, 1)])
def test_no_held_out_question_is_trained_on(sizes):
    train, validation, test = sizes
    # seeds apart by one share all generated questions but one
    datasets = make_datasets(
        products(
            reasoning_gym_train_size=train,
            reasoning_gym_validation_size=validation,
            reasoning_gym_test_size=test,
            reasoning_gym_train_seed=0,
            reasoning_gym_validation_seed=1,
            reasoning_gym_test_seed=2,
        )
    )
    assert list(datasets) == (["test", "validation", "train"] if validation else ["test", "train"])
    questions = {split: [row["prompt"][-1]["content"] for row in rows] for split, rows in datasets.items()}
    keys = {split: {question_key(question) for question in texts} for split, texts in questions.items()}
    for split, other in [("train", "test"), ("train", "validation"), ("validation", "test")]:
        assert not keys.get(split, set()) & keys.get(other, set())
    assert len(set(questions["test"])) == len(questions["test"]) <= test


def test_both_orders_of_a_product_are_one_question():
    assert question_key("What is 3 * 7") == question_key("What is 7 * 3") != question_key("What is 3 * 8")


def test_rows_are_conversations_with_the_entry_as_json():
    arguments = products(
        reasoning_gym_kwargs='{"max_digits": 2}',
        reasoning_gym_system_prompt="Be short.",
        reasoning_gym_prompt="Q: {question}?",
    )
    row = make_datasets(arguments)["test"][0]
    assert row["prompt"][0] == {"role": "system", "content": "Be short."}
    metadata = json.loads(row["metadata"])
    assert row["prompt"][1] == {"role": "user", "content": f"Q: {metadata['entry']['question']}?"}
    assert metadata["parameters"] == {"max_digits": 2} and metadata["entry"]["answer"] == row["answer"]
    assert reasoning_gym_score([reply(f"It is {row['answer']}")], metadata=[row["metadata"]]) == [1.0]


def test_evaluation_uses_the_validation_split_before_the_test_split():
    @dataclass
    class Arguments(ReasoningGymArguments):
        dataset_name: str | None = None

    assert trainer_datasets(Arguments()) == {}
    named = {"reasoning_gym": "products", "reasoning_gym_test_size": 5}
    without = trainer_datasets(Arguments(**named))
    assert without["eval_dataset"].to_list() == make_datasets(Arguments(**named))["test"].to_list()
    named["reasoning_gym_validation_size"] = 4
    assert (
        trainer_datasets(Arguments(**named))["eval_dataset"].to_list()
        == make_datasets(Arguments(**named))["validation"].to_list()
    )
    with pytest.raises(ValueError, match="dataset_name='x' has no effect beside reasoning_gym"):
        trainer_datasets(Arguments(**named, dataset_name="x"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reasoning_gym": "product"}, "'product' is not a task of reasoning-gym; close names: products."),
        ({"reasoning_gym_kwargs": {"digits": 1}}, "has 'digits'; products accepts max_digits, min_digits."),
        ({"reasoning_gym_kwargs": {"seed": 1}}, "reasoning_gym_kwargs has 'seed'"),
        ({"reasoning_gym_kwargs": {"max_digits": 0}}, "max_digits must be positive"),
        ({"reasoning_gym_kwargs": "[1]"}, "accepted: a JSON object"),
        ({"reasoning_gym_answer": "number"}, "accepted: last_number, answer_tags, text"),
        ({"reasoning_gym_prompt": "question"}, "does not contain {question}"),
        ({"reasoning_gym_train_size": 0}, "at least 1"),
        ({"reasoning_gym_test_size": -1}, "at least 0"),
        ({"reasoning_gym": "shapes"}, "needs metadata that JSON does not keep"),
        ({"reasoning_gym": None}, "reasoning_gym_answer needs reasoning_gym"),
    ],
)
def test_what_cannot_be_used_is_refused_before_a_model_is_loaded(changes, message):
    with pytest.raises(ValueError) as error:
        products(**changes)
    assert message in str(error.value)


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.delitem(sys.modules, "reasoning_gym.factory")
    with pytest.raises(ValueError, match=r'pip install -e "\.\[reasoning-gym\]"'):
        products()


def test_held_out_questions_may_not_use_up_the_task():
    with pytest.raises(ValueError, match="has no train question beside 55 held-out ones"):
        make_datasets(products(reasoning_gym_test_size=3000))


def test_other_fields_of_a_recipe_need_no_task():
    @dataclass
    class Arguments(ReasoningGymArguments):
        dataset_name: str | None = None

    assert Arguments(dataset_name="x").reasoning_gym is None
