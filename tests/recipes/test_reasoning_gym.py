"""The adapter to reasoning-gym, on a stand-in for the library."""

import json
import sys

import pytest
from gym_stand_in import install_gym

from recipes import reasoning_gym_tasks
from recipes.reasoning_gym_tasks import extract_answer, make_datasets, question_key, reasoning_gym_score
from recipes.train import RecipeArguments, agent_kwargs

SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def library(monkeypatch):
    reasoning_gym_tasks.make_scorer.cache_clear()
    yield install_gym(monkeypatch)
    reasoning_gym_tasks.make_scorer.cache_clear()


def products(**changes):
    return RecipeArguments(**{"reasoning_gym": "products", "reasoning_gym_answer": "last_number", **changes})


def reply(text, role="assistant"):
    return [{"role": role, "content": text}]


LAST = {
    "3*7=21.": "21", "It is **21**, not 24 or so.": "24", "5 - 3 = −2": "-2", "between 3-4": "4", "x4": None,
    "1,234,567.50": "1234567.50", "1,2,3": "3",
}  # fmt: skip
TAGS = {"<answer>3</answer> or <answer> 4\n</answer>": "4", "<answer>3": None}
EXTRACTORS = {"last_number": LAST, "answer_tags": TAGS, "text": {" 21 \n": "21"}}


@pytest.mark.parametrize(("extractor", "text"), [(name, text) for name, cases in EXTRACTORS.items() for text in cases])
def test_answers_are_extracted(extractor, text):
    assert extract_answer(text, extractor) == EXTRACTORS[extractor][text]


def test_each_row_is_scored_by_its_own_task_parameters_and_extractor():
    cases = [
        *((products, "last_number", text, right) for text, right in (("2 * 2 = 4", 1.0), ("4 is 2 * 2", 0.0))),
        *((products, "last_number", text, 0.0) for text in ("24", "4, no 5", "", "four")),  # the library: part marks
        *((products, "answer_tags", f"<answer>{text}</answer>", right) for text, right in (("4", 1.0), ("24", 0.5))),
        (products, "answer_tags", "4", 0.0),
        (("fragile", {}, "04"), "text", "4", 1.0),
        (("fragile", {}, "4"), "text", "four", 0.0),  # the scorer raises
        (("last_digits", {"max_digits": 1}, "14"), "text", "4", 1.0),
        (("last_digits", {"max_digits": 2}, "14"), "text", "4", 0.0),
    ]
    rows, texts, rights = [], [], []
    for task, extractor, text, right in cases:
        name, parameters, answer = ("products", {}, "4") if task is products else task
        entry = {"question": "", "answer": answer, "metadata": {"terms": [2, 2]}}
        rows.append(json.dumps({"task": name, "parameters": parameters, "extractor": extractor, "entry": entry}))
        texts.append(reply(text))
        rights.append(right)
    assert reasoning_gym_score(texts, metadata=rows) == rights
    assert reasoning_gym_score([reply("4", role="tool")], metadata=rows[:1]) == [0.0]


@pytest.mark.parametrize("sizes", [(500, 0, 40), (500, 10, 20), (3, 1, 1)])
def test_no_held_out_question_is_trained_on(sizes):
    options = {f"reasoning_gym_{split}_size": size for split, size in zip(SPLITS, sizes, strict=True)}
    options |= {f"reasoning_gym_{split}_seed": seed for seed, split in enumerate(SPLITS)}
    datasets = make_datasets(products(**options))  # seeds apart by one share all generated questions but one
    assert list(datasets) == (["test", "validation", "train"] if sizes[1] else ["test", "train"])
    questions = {split: [row["prompt"][-1]["content"] for row in rows] for split, rows in datasets.items()}
    keys = {split: {question_key(question) for question in texts} for split, texts in questions.items()}
    for split, other in [("train", "test"), ("train", "validation"), ("validation", "test")]:
        assert not keys.get(split, set()) & keys.get(other, set())
    assert len(set(questions["test"])) == len(questions["test"]) <= sizes[2]
    assert question_key("What is 3 * 7") == question_key("What is 7 * 3") != question_key("What is 3 * 8")


def test_rows_are_conversations_with_the_entry_as_json():
    prompts = {"reasoning_gym_system_prompt": "Be short.", "reasoning_gym_prompt": "Q: {question}?"}
    row = make_datasets(products(reasoning_gym_kwargs='{"max_digits": 2}', **prompts))["test"][0]
    assert row["prompt"][0] == {"role": "system", "content": "Be short."}
    metadata = json.loads(row["metadata"])
    assert row["prompt"][1] == {"role": "user", "content": f"Q: {metadata['entry']['question']}?"}
    assert metadata["parameters"] == {"max_digits": 2} and metadata["entry"]["answer"] == row["answer"]
    assert reasoning_gym_score([reply(f"It is {row['answer']}")], metadata=[row["metadata"]]) == [1.0]


def test_evaluation_uses_the_validation_split_before_the_test_split():
    assert reasoning_gym_tasks.trainer_datasets(RecipeArguments(dataset_name="x")) == {}
    named = {"reasoning_gym": "products", "reasoning_gym_test_size": 5}
    for split, size in (("test", {}), ("validation", {"reasoning_gym_validation_size": 4})):
        arguments = RecipeArguments(**named, **size)
        held_out = reasoning_gym_tasks.trainer_datasets(arguments)["eval_dataset"]
        assert held_out.to_list() == make_datasets(arguments)[split].to_list()
    for also, mixture in (({"dataset_name": "x"}, None), ({"dataset_preparation": "x"}, None), ({}, ["x"])):
        with pytest.raises(ValueError, match="'x'.* has no effect beside reasoning_gym"):
            reasoning_gym_tasks.trainer_datasets(RecipeArguments(**named, **also), mixture)
    with_tools = RecipeArguments(**named, tools=["recipes.agents.calculator.calculate"], reward_funcs=["a.b"])
    nothing = type("Arguments", (), {"datasets": None, "model_name_or_path": None})
    assert agent_kwargs(with_tools, None, nothing, nothing).keys() == {"tools"}  # the task is the data


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
