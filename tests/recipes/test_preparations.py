"""`recipes.preparations`: the hub's columns become `prompt` and `solution`, and math-verify decides on the answers."""

import pytest
from stand_ins import GSM8K, KNIGHTS_AND_KNAVES, MATH, puzzle
from trl.rewards import accuracy_reward

from recipes import preparations


def rewards_of(answers: list[str], solution: str) -> list[float]:
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    return accuracy_reward(completions, [solution] * len(answers))


def test_gsm8k_takes_the_number_after_the_marks():
    rows = [preparations.gsm8k(**row) for row in GSM8K]
    assert [row["solution"] for row in rows] == ["72", "1000"] and rows[0].keys() == {"prompt", "solution"}
    (message,) = rows[0]["prompt"]
    assert message["role"] == "user" and message["content"].startswith(GSM8K[0]["question"])
    assert "24" not in message["content"]  # nothing of the answer
    assert rewards_of([r"so \boxed{1,000}", r"\boxed{100}", "1000"], "1000") == [1.0, 0.0, 0.0]
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
