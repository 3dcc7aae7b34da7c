"""`trl_lambda.training.preparations` and its loader: the hub's columns become `prompt` and `solution`, or one line."""

import sys
from pathlib import Path

import pytest
from stand_ins import GSM8K, KNIGHTS_AND_KNAVES, MATH, puzzle, write_dataset, write_datasets
from trl import DatasetMixtureConfig
from trl.rewards import accuracy_reward

from trl_lambda import training as train
from trl_lambda.training import load_splits, preparations

ROOT = Path(__file__).parent.parent
PREPARATIONS = {
    "openai/gsm8k": "trl_lambda.training.preparations.gsm8k",
    "nlile/hendrycks-MATH-benchmark": "trl_lambda.training.preparations.math",
    "K-and-K/knights-and-knaves": "trl_lambda.training.preparations.knights_and_knaves",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return write_datasets(tmp_path_factory.mktemp("datasets"))


def load(name: str, evaluate: bool = False, mixture: DatasetMixtureConfig | None = None, **options):
    script_args = train.LambdaGRPOScriptArguments(dataset_name=name, **options)
    return load_splits(script_args, DatasetMixtureConfig() if mixture is None else mixture, evaluate)


def rewards_of(answers: list[str], solution: str) -> list[float]:
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    return accuracy_reward(completions, [solution] * len(answers))


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("name", PREPARATIONS)
def test_the_hubs_columns_become_prompt_and_solution_and_nothing_else(name, streaming, folders):
    knights = name.startswith("K-and-K")
    splits = {"dataset_config": "train", "dataset_test_config": "test"} if knights else {}
    splits |= {"dataset_train_split": "2ppl+3ppl", "dataset_test_split": "4ppl"} if knights else {}
    options = {"dataset_preparation": PREPARATIONS[name], "dataset_streaming": streaming, **splits}
    train_rows, test_rows = (list(rows) for rows in load(folders[name], evaluate=True, **options))
    for row in [*train_rows, *test_rows]:
        assert row.keys() == {"prompt", "solution"}
        assert [message["role"] for message in row["prompt"]] == ["user"] and isinstance(row["solution"], str)
    assert (len(train_rows), len(test_rows)) == ((32, 2) if knights else (64, 4))


def test_gsm8k_takes_the_number_after_the_marks():
    rows = [preparations.gsm8k(**row) for row in GSM8K]
    assert [row["solution"] for row in rows] == ["72", "1000"]
    assert rows[0]["prompt"][0]["content"].startswith(GSM8K[0]["question"])
    assert "24" not in rows[0]["prompt"][0]["content"]  # nothing of the answer
    assert rewards_of([r"\boxed{1000}", r"so \boxed{1,000}", r"\boxed{100}", "1000"], "1000") == [1.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="no '#### N' at the end of the answer 'It is 7.'"):
        preparations.gsm8k("How many?", "It is 7.")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (MATH[0]["solution"], r"\boxed{\frac{1}{2}}"),  # the last of two, braces in braces
        (MATH[1]["solution"], r"\boxed 72"),
        (r"It is $\boxed{\$1,\!234.50}$ in all.", r"\boxed{\$1,\!234.50}"),
        (r"The set $\boxed{\{1,2\}}$.", r"\boxed{\{1,2\}}"),
        (r"$\boxed{\left\{ x \right.}$ and more}", r"\boxed{\left\{ x \right.}"),  # an escaped brace alone
        (r"cut off: \boxed{\frac{1}", r"\boxed{\frac{1}"),
    ],
)
def test_math_takes_the_last_boxed_answer(solution, answer):
    assert preparations.math("?", solution)["solution"] == answer


def test_math_answers_are_decided_by_math_verify():
    half = preparations.math(MATH[0]["problem"], MATH[0]["solution"])["solution"]
    assert rewards_of([r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{3}"], half) == [1.0, 1.0, 0.0]
    assert rewards_of([r"\boxed{72}", r"\boxed{2}"], preparations.math("?", MATH[1]["solution"])["solution"]) == [1, 0]
    with pytest.raises(ValueError, match=r"no \\boxed in the solution 'It is 7\.'"):
        preparations.math("?", "It is 7.")


def test_knights_and_knaves_is_answered_by_one_digit_each():
    def prepare(row):
        return preparations.knights_and_knaves(row["quiz"], row["names"], row["solution"])

    rows = [prepare(row) for row in KNIGHTS_AND_KNAVES]
    assert [row["solution"] for row in rows] == ["12", "121"]
    assert "in the order Ava, Noah, Mia," in rows[1]["prompt"][0]["content"]
    # Order and number of inhabitants count, and a knave who stands first is not lost.
    assert rewards_of([r"\boxed{121}", r"\boxed{112}", r"\boxed{12}", r"\boxed{1211}"], "121") == [1, 0, 0, 0]
    knaves = prepare(puzzle(["Ava", "Noah"], [False, False]))
    assert rewards_of([r"\boxed{22}", r"\boxed{2}", r"\boxed{11}"], knaves["solution"]) == [1, 0, 0]
    with pytest.raises(ValueError, match="1 truth values for the names Ava, Noah"):
        preparations.knights_and_knaves("?", ["Ava", "Noah"], [True])


def test_splits_are_put_together_and_the_held_out_one_comes_from_its_own_configuration(tmp_path):
    rows = {n: [{"prompt": f"{n} {i}", "solution": "1"} for i in range(n)] for n in (2, 3, 4)}
    layout = {"train": {"a": rows[2], "b": rows[3]}, "test": {"a": rows[4], "b": rows[2]}}
    name = write_dataset(tmp_path, layout)
    options = {"dataset_config": "train", "dataset_train_split": "a+b", "dataset_test_split": "a"}
    both, held_out = load(name, evaluate=True, dataset_test_config="test", **options)
    assert both["prompt"] == ["2 0", "2 1", "3 0", "3 1", "3 2"] and len(held_out) == 4
    assert len(load(name, evaluate=True, **options)[1]) == 2  # without it: the same configuration
    assert load(name, **options)[1] is None
    with pytest.raises(ValueError, match=r"dataset_train_split is 'a\+c'; dataset_name is .*, which has: a, b\."):
        load(name, **options | {"dataset_train_split": "a+c"})


def error_of(monkeypatch, folder: str, *arguments: str) -> str:
    """The line that the script ends with."""
    config = str(ROOT / "recipes" / "configs" / "playground.yaml")
    options = ["--config", config, "--dataset_name", folder, "--dataset_test_split", "train", *arguments]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    with pytest.raises(SystemExit) as error:
        train.main()
    assert error.value.code.startswith("error: ") and "\n" not in error.value.code
    return error.value.code


@pytest.mark.parametrize(
    ("preparation", "message"),
    [
        ("gsm8k", "dataset_preparation is 'gsm8k'; accepted: a dotted path to a function."),
        (
            "trl_lambda.training.preparations.gsm9k",
            "dataset_preparation is 'trl_lambda.training.preparations.gsm9k', which cannot be imported",
        ),
        (
            "trl_lambda.training.preparations.REQUEST",
            "dataset_preparation is 'trl_lambda.training.preparations.REQUEST', which is a str;",
        ),
        (
            "trl_lambda.training.preparations.gsm8k",
            "split 'train' has no 'question' column, which dataset_preparation "
            "'trl_lambda.training.preparations.gsm8k' needs; it has: problem, answer.",
        ),
    ],
)
def test_a_preparation_that_does_not_fit_is_one_line(preparation, message, tmp_path, monkeypatch):
    name = write_dataset(tmp_path, {"default": {"train": [{"problem": "1+1", "answer": "#### 2"}]}})
    assert message in error_of(monkeypatch, name, "--dataset_preparation", preparation)


def test_a_row_that_cannot_be_prepared_is_one_line(tmp_path, monkeypatch):
    name = write_dataset(tmp_path, {"default": {"train": [{"question": "1+1", "answer": "2"}]}})
    line = error_of(monkeypatch, name, "--dataset_preparation", "trl_lambda.training.preparations.gsm8k")
    assert line == "error: gsm8k: no '#### N' at the end of the answer '2'."
