"""Tools and environments: what they refuse, what they cannot break, what the script says before it loads a model."""

import asyncio
import json
import sqlite3
import sys
from typing import Any

import pytest
from stand_ins import write_agent_model, write_model
from trl.chat_template_utils import qwen3_chat_template

from recipes.agents import search
from recipes.agents.calculator import calculate
from trl_lambda import training as train
from trl_lambda.training.agent_rewards import answer_match, final_accuracy, last_message
from trl_lambda.training.agents import check_rows, check_tokenizer, load_environment, load_tools
from trl_lambda.training.guard import MAX_CHARACTERS, ToolError, guard, guard_environment

# ---- The calculator ----


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2 + 17", "41"),
        ("1,000 * 3", "3000"),
        ("12,345,678+1", "12345679"),
        ("2**10", "1024"),
        ("2^10", "1024"),
        ("3 × (4 − 6) ÷ 2", "-3"),
        ("7//2", "3"),
        ("-7 % 3", "2"),
        ("0.1+0.2", "0.3"),
        ("1/3", "0.333333333333"),
        ("2**-1", "0.5"),
        ("(-2)**3", "-8"),
        ("0**0", "1"),
        ("1e3", "1000"),
        ("1_000", "1000"),
        ("10**30", "1" + "0" * 30),
        ("--3", "3"),
        ("(" * 99 + "1" + ")" * 99, "1"),
    ],
)
def test_the_calculator_calculates(expression, value):
    assert calculate(expression) == value


NOT_ARITHMETIC = [
    "__import__('os').system('ls')",
    "open('/etc/passwd').read()",
    "eval('1+1')",
    "exec('x=1')",
    "print(1)",
    "abs(-1)",
    "a",
    "a+1",
    "None",
    "True",
    "True+1",
    "not 1",
    "~1",
    "1 if 1 else 2",
    "1 and 2",
    "1 or 2",
    "1 < 2",
    "1 == 1",
    "1 | 2",
    "1 & 2",
    "1 ^^ 2",
    "1 << 70",
    "1 >> 1",
    "1 @ 2",
    "'a' * 1000000",
    "'1' + '2'",
    "b'1'",
    "f'{1}'",
    "[1] * 10",
    "(1, 2)",
    "1, 2",
    "{1: 2}",
    "{1}",
    "[x for x in (1, 2)]",
    "lambda: 1",
    "(lambda: 1)()",
    "x := 1",
    "(x := 1)",
    "x = 1",
    "import os",
    "().__class__.__bases__",
    "(1).real",
    "1 .__class__",
    "[1][0]",
    "...",
    "1j",
    "1; 2",
    "1\n2",
    "yield 1",
    "await x",
    "*1",
    "",
    " ",
    "1 +",
    "((1)",
    "one plus one",
    "\x00",
    "\ud800",
]
TOO_LARGE = [
    "9**9**9**9",
    "10**31",
    "10**1000000000",  # were it calculated, this test would not end
    "2**101",
    "1e308*10",
    "1e400",
    "9" * 31,
    "-(10**30) - 1",
    "0.5**-1000",
    "1" + "+1" * 100,
    "-" * 50 + "1",
    "+".join("1" * 30),
]
UNDEFINED = ["1/0", "1//0", "1%0", "0**-1", "1/0.0", "(-8)**0.5", "0.0**-1"]


@pytest.mark.parametrize("expression", [*NOT_ARITHMETIC, *TOO_LARGE, *UNDEFINED])
def test_the_calculator_refuses_anything_else(expression):
    with pytest.raises(ValueError):
        calculate(expression)


def test_at_least_fifty_attempts_are_not_arithmetic():
    assert len(set(NOT_ARITHMETIC)) >= 50


@pytest.mark.parametrize("expression", [None, 5, b"1+1", ["1"], {"expression": "1"}])
def test_the_calculator_refuses_what_is_no_text(expression):
    with pytest.raises(ValueError):
        calculate(expression)


# ---- Tools that go wrong ----


class Unwritable(dict):
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


def endless() -> None:
    while True:
        pass


def raises(error: BaseException) -> None:
    raise error


MISBEHAVIOUR = {
    "raises": lambda: raises(ValueError("wrong")),
    "raises a megabyte": lambda: raises(ValueError("x" * 10**6)),
    "raises what has no text": lambda: raises(ValueError(Unwritable())),
    "exits": lambda: sys.exit(1),
    "recurses": lambda: (lambda f: f(f))(lambda f: f(f)),
    "loops": endless,
    "bytes": lambda: b"bytes",
    "bytearray": lambda: bytearray(3),
    "object": object,
    "a megabyte": lambda: "x" * 10**6,
    "a list of a megabyte": lambda: ["x" * 10**6],
    "parts of a megabyte": lambda: [{"type": "text", "text": "x" * 10**6}],
    "a number too long to write": lambda: 10**100_000,
    "what has no text": Unwritable,
}


def misbehave(how: str) -> str:
    """
    Go wrong.

    Args:
        how: In which way.
    """
    return MISBEHAVIOUR[how]()


async def misbehave_later(how: str) -> str:
    """
    Go wrong in a coroutine.

    Args:
        how: In which way.
    """
    await asyncio.sleep(0)
    if how == "loops":
        await asyncio.Event().wait()
    return MISBEHAVIOUR[how]()


@pytest.mark.parametrize("how", MISBEHAVIOUR)
def test_whatever_goes_wrong_is_a_failure_with_a_short_text(how):
    for call in (guard(misbehave, timeout=0.2), guard(misbehave_later, timeout=0.2)):
        with pytest.raises(ToolError) as error:
            answer = call(how=how)
            asyncio.run(answer)
        assert len(str(error.value)) < 300 and str(error.value).encode()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("text", "text"),
        ("", ""),
        (7, "7"),
        (0.5, "0.5"),
        (None, "None"),
        ([1, 2], "[1, 2]"),
        ({"a": 1}, "{'a': 1}"),
        ("half a pair \ud800", "half a pair ?"),
        ("x" * MAX_CHARACTERS, "x" * MAX_CHARACTERS),
        ([{"type": "text", "text": "a"}], [{"type": "text", "text": "a"}]),  # content parts stay what they are
    ],
)
def test_an_answer_arrives_as_text(answer, text):
    def tool() -> Any:
        """Answer."""
        return answer

    assert guard(tool, timeout=600)() == text


def test_a_guarded_tool_looks_like_the_tool():
    guarded = guard(calculate)
    from transformers.utils import get_json_schema

    assert get_json_schema(guarded) == get_json_schema(calculate)
    assert guarded.__name__ == "calculate" and guarded(expression="6*7") == "42"


def test_an_environments_tools_are_guarded_and_nothing_else():
    class Environment:
        def reset(self, **row):
            return b"observation"

        def look(self) -> str:
            """Look."""
            return b"bytes"

        @staticmethod
        def count(to: int) -> str:
            """
            Count.

            Args:
                to: Up to here.
            """
            return str(to)

        def get_reward(self):
            return 1.0

        def _hidden(self):
            return b"hidden"

    guarded = guard_environment(Environment)
    assert guarded.__name__ == "Environment" and issubclass(guarded, Environment)
    instance = guarded()
    assert instance.count(to=3) == "3" and instance.count("a") == "a"
    assert instance.reset() == b"observation" and instance._hidden() == b"hidden" and instance.get_reward() == 1.0
    with pytest.raises(ToolError, match="look: the answer is of type bytes"):
        instance.look()


@pytest.fixture(scope="module")
def agent_model(tmp_path_factory) -> str:
    calls = [("misbehave", {"how": how}) for how in MISBEHAVIOUR]
    return write_agent_model(tmp_path_factory.mktemp("agent"), calls)


def test_a_run_with_tools_that_go_wrong_goes_on_and_counts_them(agent_model, tmp_path, monkeypatch):
    """The real loop: every call fails, in all the ways above, and is told to the model and logged."""
    rows = [json.dumps({"prompt": [{"role": "user", "content": "a"}], "solution": "72"})] * 16
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    options = {
        "model_name_or_path": agent_model,
        "dataset_name": str(tmp_path),
        "tools": "test_agents.misbehave",
        "tool_timeout": 0.2,
        "max_tool_calling_iterations": 2,
        "reward_funcs": "test_agents.reward_any",
        "max_completion_length": 64,
        "per_device_train_batch_size": 32,
        "max_steps": 1,
        "output_dir": tmp_path / "out",
    }
    flags = ["--use_cpu", "--bf16", "false", "--disable_tqdm", "true", "--report_to", "none", "--logging_steps", "1"]
    flags += ["--save_strategy", "no"]
    pairs = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    trainer = train.make_trainer(*train.parse([*pairs, *flags]))
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["tools/call_frequency"] > 0.5 and logged["tools/failure_frequency"] == 1.0


def reward_any(completions, **kwargs) -> list[float]:
    return [float(index % 2) for index, _ in enumerate(completions)]


# ---- What the script says before a model is loaded ----


def no_types(key):
    """Look up."""


def no_docstring(key: str) -> str:
    return key


class NoReset:
    def look(self) -> str:
        """Look."""


class NoTool:
    def reset(self, **row):
        pass


class NeedsArgument(NoTool):
    def __init__(self, path):
        pass

    def look(self) -> str:
        """Look."""


class Undescribed(NoTool):
    def look(self, where):
        """Look."""


class Narrow:
    def reset(self, table):
        pass

    def look(self) -> str:
        """Look."""


NAMED = "test_agents"
REFUSED = [
    (["--tools", "calculate"], "tools has 'calculate'; accepted: a dotted path to a function."),
    (["--tools", "recipes.agents.calculator.nothing"], "tools has 'recipes.agents.calculator.nothing', which cannot"),
    (["--tools", f"{NAMED}.NoTool"], f"tools has '{NAMED}.NoTool', which is a type; accepted: a function."),
    (["--tools", f"{NAMED}.no_types"], f"tools has '{NAMED}.no_types', which cannot be described to a model: "),
    (["--tools", f"{NAMED}.no_docstring"], f"tools has '{NAMED}.no_docstring', which cannot be described to a model:"),
    (["--tools", f"{NAMED}.misbehave", f"{NAMED}.misbehave"], "tools has several functions of the name 'misbehave'"),
    (["--environment", f"{NAMED}.misbehave"], f"environment is '{NAMED}.misbehave', which is a function; accepted: "),
    (["--environment", f"{NAMED}.NoReset"], f"environment is '{NAMED}.NoReset', which has no method reset"),
    (["--environment", f"{NAMED}.NoTool"], f"environment is '{NAMED}.NoTool', which has no tool"),
    (["--environment", f"{NAMED}.NeedsArgument"], f"environment is '{NAMED}.NeedsArgument', which cannot be made: "),
    (["--environment", f"{NAMED}.Undescribed"], "its tool 'look', which cannot be described to a model: "),
    (["--environment", "recipes.agents.search.Search"], "there is no index at "),
    (["--tools", "recipes.agents.calculator.calculate", "--tool_timeout", "0"], "tool_timeout=0.0 must be above 0."),
    (["--tool_timeout", "5"], "tool_timeout is set without tools and environment."),
    (
        ["--tools", "recipes.agents.calculator.calculate", "--reward_funcs", "accuracy_reward"],
        "reward_funcs has 'accuracy_reward', which reads the first message",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_what_cannot_be_used_is_said_in_one_line_before_a_model_is_loaded(options, message, tmp_path, monkeypatch):
    base = ["train.py", "--model_name_or_path", "nowhere", "--dataset_name", "nowhere", "--output_dir", str(tmp_path)]
    monkeypatch.delenv(search.INDEX_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*base, "--use_cpu", "--bf16", "false", *options])
    with pytest.raises(SystemExit) as error:
        train.main()
    assert str(error.value.code).startswith("error: ") and message in error.value.code
    assert "\n" not in error.value.code


def test_an_environment_with_a_reward_needs_no_other():
    class Scores(NoTool):
        def get_reward(self):
            return 1.0

    script_args = train.parse(["--model_name_or_path", "x", "--use_cpu", "--bf16", "false", "--output_dir", "x"])[0]
    assert train.load_rewards(script_args, Scores) == []
    with pytest.raises(ValueError, match="no reward"):
        train.load_rewards(script_args, NoTool)


def test_rows_that_an_environment_cannot_take_are_refused():
    row = {"prompt": [{"role": "user", "content": "a"}], "table": "b", "solution": "7"}
    check_rows([{"prompt": row["prompt"]}], None, None)
    with pytest.raises(ValueError, match="conversational prompts"):
        check_rows([row | {"prompt": "a"}], NoTool, "x.NoTool")
    check_rows([row], NoTool, "x.NoTool")
    with pytest.raises(ValueError, match=r"reset does not take the columns .* \(prompt, table, solution\)"):
        check_rows([row], Narrow, "x.Narrow")


def test_a_tokenizer_that_cannot_hold_a_conversation_with_tools_is_refused(agent_model, tmp_path):
    check_tokenizer(agent_model, None, False)
    plain = write_model(tmp_path / "plain")
    with pytest.raises(ValueError, match="chat template cannot render calls"):
        check_tokenizer(plain, None, False)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(agent_model)
    tokenizer.chat_template = qwen3_chat_template + "{# changed #}"
    tokenizer.save_pretrained(tmp_path / "unknown")
    with pytest.raises(ValueError, match="calls TRL cannot read: set a response_template"):
        check_tokenizer(str(tmp_path / "unknown"), None, False)
    lookup = AutoTokenizer.from_pretrained("recipes/playground/models/lookup_agent")
    lookup.response_template = lookup.response_template | {"start_anchor": "F"}
    lookup.save_pretrained(tmp_path / "anchor")
    with pytest.raises(ValueError, match="read an earlier turn's call again and run it twice"):
        check_tokenizer(str(tmp_path / "anchor"), None, False)


def test_an_older_trl_is_named(agent_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", None)  # makes the import fail
    with pytest.raises(ValueError, match="tools and environment need a newer TRL"):
        check_tokenizer(agent_model, None, False)


def test_dotted_paths_load():
    (tool,) = load_tools(["recipes.agents.calculator.calculate"], 1.0)
    assert tool(expression="2*3") == "6"
    environment = load_environment("recipes.playground.lookup_agent.LookUp")
    instance = environment()
    instance.reset(table="b7000000")
    assert instance.look_up(key="a") == "b"
    assert [each.__name__ for each in load_tools("recipes.agents.calculator.calculate")] == ["calculate"]
    assert load_tools(None) == [] and load_environment(None) is None


# ---- Search ----

PARAGRAPHS = [
    ("Alien", "Alien is a film of 1979. Its director is Ridley Scott."),
    ("Ridley Scott", "Ridley Scott is an English director."),
    ("Moss", "Moss grows in the shade."),
    ("Moss", "Moss grows in the shade."),
]


@pytest.fixture
def index(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "index.sqlite"
    assert search.build_index(PARAGRAPHS, path) == 3  # each once
    monkeypatch.setenv(search.INDEX_VARIABLE, str(path))
    return path


def test_search_finds_the_best_paragraphs_first(index):
    environment = search.Search()
    environment.reset(prompt=[], solution="Ridley Scott")
    found = environment.search("Who is the director of the film Alien?")
    assert found.splitlines()[0] == "Alien: " + PARAGRAPHS[0][1]
    assert environment.search("zebra") == "Nothing was found."
    assert search.build_index(PARAGRAPHS[2:], index) == 1 and "shade" in search.Search().search("moss")


@pytest.mark.parametrize("query", ['"', "alien AND NOT", "NEAR(alien)", "title:*", "a'; DROP TABLE paragraphs", "al*"])
def test_a_query_is_words_and_no_language(index, query):
    environment = search.Search()
    try:
        environment.search(query)
    except ValueError as error:
        assert "no words" in str(error)
    assert "Ridley" in environment.search("alien")
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        environment._connection.execute("DELETE FROM paragraphs")


def test_paragraphs_are_read_in_both_forms_that_data_sets_have():
    columns = {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]}
    paragraphs = [{"title": "A", "sentences": ["One.", " Two."]}, {"title": "B", "sentences": ["Three."]}]
    for context in (columns, paragraphs):
        assert list(search.context_paragraphs([{"context": context}])) == [("A", "One. Two."), ("B", "Three.")]


def test_long_paragraphs_and_queries_are_cut(tmp_path, monkeypatch):
    search.build_index([(f"Title {i}", "word " * 10_000) for i in range(10)], tmp_path / "long.sqlite")
    monkeypatch.setenv(search.INDEX_VARIABLE, str(tmp_path / "long.sqlite"))
    assert len(search.Search().search("word " * 10_000)) < 3 * 700


# ---- Rewards of the last message ----

CALL = {"role": "assistant", "content": "I calculate.", "tool_calls": [{"type": "function"}]}
TOOL = {"role": "tool", "name": "calculate", "content": r"\boxed{72}"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_rewards_read_the_policys_last_message():
    conversations = {
        "right": [CALL, TOOL, answer(r"So it is \boxed{72}.")],
        "right at once": [answer(r"\boxed{72}")],
        "changed its mind": [answer(r"\boxed{72}"), TOOL, answer(r"\boxed{73}")],
        "cut off in a call": [CALL | {"content": r"\boxed{72}"}],
        "cut off after the tool": [CALL, TOOL],
        "nothing": [],
    }
    rewards = final_accuracy(list(conversations.values()), ["72"] * len(conversations))
    assert rewards == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert [last_message(each) != "" for each in conversations.values()] == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<answer>Ridley Scott</answer>", 1.0),
        ("<answer> the ridley scott. </answer>", 1.0),
        ("<answer>x</answer> no: <answer>Ridley\nScott</answer>", 1.0),
        ("<answer>Ridley Scott</answer><answer>x</answer>", 0.0),
        ("Ridley Scott", 0.0),
        ("<answer>Scott</answer>", 0.0),
        ("<answer></answer>", 0.0),
    ],
)
def test_answer_match(text, reward):
    assert answer_match([[answer(text)]], ["Ridley Scott"]) == [reward]
    assert answer_match([[answer("<answer>the</answer>")]], ["a"]) == [0.0]  # nothing is left of either
