"""`recipes/agents`: the calculator, the guard around tools, the search, the rewards, and what the checks refuse."""

import asyncio
import json
import re
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from misbehaviour import MISBEHAVIOUR, misbehave
from stand_ins import write_agent_model, write_model
from transformers import AutoTokenizer
from transformers.utils import get_json_schema
from trl.chat_template_utils import qwen3_chat_template

from recipes import train
from recipes.agents import search
from recipes.agents.calculator import calculate
from recipes.agents.checks import check_rows, check_tokenizer, load_environment, load_tools
from recipes.agents.guard import MAX_CHARACTERS, ToolError, guard, guard_environment
from recipes.agents.rewards import answer_match, final_accuracy
from recipes.playground.make_base_model import BASE_MODELS

ARITHMETIC = {
    "48/2 + 17": "41", "1,000 * 3": "3000", "12,345,678+1": "12345679", "2**10": "1024", "2^10": "1024",
    "3 × (4 − 6) ÷ 2": "-3", "7//2": "3", "-7 % 3": "2", "0.1+0.2": "0.3", "1/3": "0.333333333333", "2**-1": "0.5",
    "(-2)**3": "-8", "0**0": "1", "1e3": "1000", "1_000": "1000", "10**30": "1" + "0" * 30, "--3": "3",
    "(" * 99 + "1" + ")" * 99: "1",
}  # fmt: skip
NOT_ARITHMETIC = [
    "__import__('os').system('ls')", "eval('1+1')", "abs(-1)", "a+1", "None", "True", "True+1", "not 1", "~1",
    "1 if 1 else 2", "1 and 2", "1 < 2", "1 | 2", "1 << 70", "1 @ 2", "'a' * 1000000", "b'1'", "f'{1}'", "[1] * 10",
    "(1, 2)", "{1: 2}", "[x for x in (1, 2)]", "(lambda: 1)()", "(x := 1)", "x = 1", "().__class__.__bases__",
    "(1).real", "[1][0]", "...", "1j", "1; 2", "1\n2", "", " ", "1 +", "((1)", "one plus one", "\x00", "\ud800",
]  # fmt: skip
TOO_LARGE = [
    "9**9**9**9", "10**31", "10**1000000000", "2**101", "1e308*10", "1e400", "9" * 31, "-(10**30) - 1", "0.5**-1000",
    "1" + "+1" * 100, "-" * 50 + "1", "+".join("1" * 30),
]  # fmt: skip
UNDEFINED = ["1/0", "1//0", "1%0", "0**-1", "1/0.0", "(-8)**0.5", "0.0**-1"]
NO_TEXT = [None, 5, b"1+1", ["1"], {"expression": "1"}]


@pytest.mark.parametrize("expression", ARITHMETIC)
def test_the_calculator_calculates(expression):
    assert calculate(expression) == ARITHMETIC[expression]


@pytest.mark.parametrize("expression", [*NOT_ARITHMETIC, *TOO_LARGE, *UNDEFINED, *NO_TEXT])
def test_the_calculator_refuses_anything_else(expression):
    with pytest.raises(ValueError):
        calculate(expression)


async def misbehave_later(how: str) -> str:
    """Go wrong in a coroutine."""
    await asyncio.sleep(0)
    return await asyncio.Event().wait() if how == "loops" else MISBEHAVIOUR[how]()


@pytest.mark.parametrize("how", MISBEHAVIOUR)
def test_whatever_goes_wrong_is_a_failure_with_a_short_text(how):
    for call in (guard(misbehave, timeout=0.2), guard(misbehave_later, timeout=0.2)):
        with pytest.raises(ToolError) as error:
            answer = call(how=how)
            asyncio.run(answer)
        assert len(str(error.value)) < 300 and str(error.value).encode()


PARTS = [{"type": "text", "text": "a"}]  # content parts stay what they are


@pytest.mark.parametrize(
    ("answer", "text"),
    [("text", "text"), ("", ""), (7, "7"), (0.5, "0.5"), (None, "None"), ([1, 2], "[1, 2]"), ({"a": 1}, "{'a': 1}"),
     ("half a pair \ud800", "half a pair ?"), ("x" * MAX_CHARACTERS, "x" * MAX_CHARACTERS), (PARTS, PARTS)],
)  # fmt: skip
def test_an_answer_arrives_as_text(answer, text):
    def tool() -> Any:
        """Answer."""
        return answer

    assert guard(tool, timeout=600)() == text


class Environment:
    def reset(self, **row):
        return b"observation"

    def look(self) -> str:
        """Look."""
        return b"bytes"

    @staticmethod
    def count(to):
        return str(to)


def test_tools_are_guarded_and_look_as_before_and_nothing_else_is():
    guarded = guard(calculate)
    assert get_json_schema(guarded) == get_json_schema(calculate) and guarded(expression="6*7") == "42"
    guarded = guard_environment(Environment)
    assert guarded.__name__ == "Environment" and issubclass(guarded, Environment)
    instance = guarded()
    assert instance.count(to=3) == "3" and instance.count("a") == "a"
    assert instance.reset() == b"observation"
    with pytest.raises(ToolError, match="look: the answer is of type bytes"):
        instance.look()


class NoTool:
    def reset(self, **row):
        pass


class NoReset:
    def look(self) -> str:
        """Look."""


class NeedsArgument(NoTool, NoReset):
    def __init__(self, path):
        pass


class Undescribed(NoTool):
    def look(self, where):
        """Look."""


class Narrow(NoReset):
    def reset(self, table):
        pass


def no_types(key):
    """Look up."""


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (load_tools, "recipes.agents.calculator.nothing", " cannot be imported"),
        (load_tools, "test_agents.NoTool", ", which is a type; accepted: functions."),
        (load_tools, "test_agents.no_types", ", which cannot be described to a model: "),
        (load_environment, "misbehaviour.misbehave", ", which is a function; accepted: a class."),
        (load_environment, "test_agents.NoReset", ", which has no method reset"),
        (load_environment, "test_agents.NoTool", ", which has no tool"),
        (load_environment, "test_agents.NeedsArgument", ", which cannot be made: TypeError"),
        (load_environment, "test_agents.Undescribed", "its tool 'look', which cannot be described to a model: "),
        (load_environment, "recipes.agents.search.Search", "there is no index at "),
    ],
)
def test_a_tool_or_environment_that_cannot_be_used_is_refused(load, name, message, monkeypatch, tmp_path):
    monkeypatch.delenv(search.INDEX_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"(?:tools|environment).*{name}.*{re.escape(message)}"):
        load([name] if load is load_tools else name)


def test_dotted_paths_load():
    (tool,) = load_tools(["recipes.agents.calculator.calculate"], 1.0)
    assert tool(expression="2*3") == "6" and len(load_tools("recipes.agents.calculator.calculate")) == 1
    instance = load_environment("recipes.playground.lookup_agent.LookUp")()
    instance.reset(table="b7000000")
    assert instance.look_up(key="a") == "b"
    assert load_tools(None) == [] and load_environment(None) is None
    with pytest.raises(ValueError, match="two functions named 'calculate'"):
        load_tools(["recipes.agents.calculator.calculate"] * 2)
    with pytest.raises(ValueError, match="tool_timeout=0 must be above 0"):
        load_environment("recipes.playground.lookup_agent.LookUp", 0)


def test_rows_that_cannot_be_used_are_refused():
    row = {"prompt": [{"role": "user", "content": "a"}], "table": "b", "solution": "7"}
    check_rows([row], NoTool, "x.NoTool")
    check_rows([{"table": "b"}], Narrow, "x.Narrow")  # an environment needs no prompt
    check_rows([{"prompt": row["prompt"]}], None, None)
    check_rows([], None, None)
    for bad, environment in ((row | {"prompt": "a"}, NoTool), ({"solution": "7"}, None)):
        with pytest.raises(ValueError, match="conversational prompts"):
            check_rows([bad], environment, "x.NoTool")
    with pytest.raises(ValueError, match=r"reset does not take the columns .* \(prompt, table, solution\)"):
        check_rows([row], Narrow, "x.Narrow")


def test_a_tokenizer_that_cannot_hold_a_conversation_with_tools_is_refused(tmp_path):
    model = write_agent_model(tmp_path / "agent", [("calculate", {"expression": "1"})])
    check_tokenizer(model, None, False)
    with pytest.raises(ValueError, match="chat template cannot render calls"):
        check_tokenizer(write_model(tmp_path / "plain"), None, False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = qwen3_chat_template + "{# changed #}"
    tokenizer.save_pretrained(tmp_path / "unknown")
    with pytest.raises(ValueError, match="calls TRL cannot read: set a response_template"):
        check_tokenizer(str(tmp_path / "unknown"), None, False)
    check_tokenizer(str(BASE_MODELS["lookup_agent"].folder), None, False)
    lookup = AutoTokenizer.from_pretrained(BASE_MODELS["lookup_agent"].folder)
    lookup.response_template = lookup.response_template | {"start_anchor": "F"}
    lookup.save_pretrained(tmp_path / "anchor")
    with pytest.raises(ValueError, match="read an earlier turn's call again and run it twice"):
        check_tokenizer(str(tmp_path / "anchor"), None, False)


PARAGRAPHS = [("Alien", "Alien is a film of 1979. Its director is Ridley Scott.")]
PARAGRAPHS += [("Ridley Scott", "Ridley Scott is an English director.")]
PARAGRAPHS += [("Moss", "Moss grows in the shade.")] * 2


@pytest.fixture
def index(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "index.sqlite"
    assert search.build_index(PARAGRAPHS, path) == 3  # each once
    monkeypatch.setenv(search.INDEX_VARIABLE, str(path))
    return path


def test_search_finds_the_best_paragraphs_first(index):
    environment = search.Search()
    environment.reset(prompt=[], solution="Ridley Scott")
    assert environment.search("Who is the director of the film Alien?").startswith("Alien: " + PARAGRAPHS[0][1])
    assert environment.search("zebra") == "Nothing was found."
    assert search.build_index(PARAGRAPHS[2:], index) == 1 and "shade" in search.Search().search("moss")


@pytest.mark.parametrize("query", ["alien AND NOT", "NEAR(alien)", "title:*", "a'; DROP TABLE paragraphs", "al*"])
def test_a_query_is_words_and_no_language(index, query):
    environment = search.Search()
    environment.search(query)
    with pytest.raises(ValueError, match="no words"):
        environment.search('"')
    assert "Ridley" in environment.search("alien")
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        environment._connection.execute("DELETE FROM paragraphs")


def test_paragraphs_are_read_in_both_forms_and_cut(tmp_path, monkeypatch):
    columns = {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]}
    paragraphs = [{"title": "A", "sentences": ["One.", " Two."]}, {"title": "B", "sentences": ["Three."]}]
    for context in (columns, paragraphs):
        assert list(search.context_paragraphs([{"context": context}])) == [("A", "One. Two."), ("B", "Three.")]
    search.build_index([(f"Title {i}", "word " * 10_000) for i in range(10)], tmp_path / "long.sqlite")
    monkeypatch.setenv(search.INDEX_VARIABLE, str(tmp_path / "long.sqlite"))
    assert len(search.Search().search("word " * 10_000)) < 3 * 700


CALL = {"role": "assistant", "content": "I calculate.", "tool_calls": [{"type": "function"}]}
TOOL = {"role": "tool", "name": "calculate", "content": r"\boxed{72}"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_rewards_read_the_policys_last_message():
    right, changed = answer(r"So it is \boxed{72}."), answer(r"\boxed{73}")
    cut = [[CALL | {"content": r"\boxed{72}"}], [CALL, TOOL], []]  # in a call, after the tool, before anything
    conversations = [[CALL, TOOL, right], [right], [right, TOOL, changed], *cut]
    assert final_accuracy(conversations, ["72"] * 6) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_answer_match():
    rewards = {
        "<answer>Ridley Scott</answer>": 1.0, "<answer> the ridley scott. </answer>": 1.0, "Ridley Scott": 0.0,
        "<answer>x</answer> no: <answer>Ridley\nScott</answer>": 1.0, "<answer>Scott</answer>": 0.0,
        "<answer>Ridley Scott</answer><answer>x</answer>": 0.0, "<answer></answer>": 0.0,
    }  # fmt: skip
    conversations = [[answer(text)] for text in rewards]
    assert answer_match(conversations, ["Ridley Scott"] * len(rewards)) == list(rewards.values())
    assert answer_match([[answer("<answer>the</answer>")]], ["a"]) == [0.0]  # nothing is left of either


def reward(completions, **kwargs) -> list[float]:
    return [float(index % 2) for index, _ in enumerate(completions)]


class Counter:
    made = 0

    def reset(self, **row):
        Counter.made += 1
        self.seed = Counter.made
        return f"a{row.get('start', '')}"

    def get_reward(self) -> float:
        return float(self.seed % 3)

    def look(self) -> str:
        """Look."""
        return "e"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    ways = ("raises", "exits", "loops", "bytes", "a megabyte")
    calls = [("misbehave", {"how": how}) for how in ways] + [("look", {})]
    return write_agent_model(tmp_path_factory.mktemp("agent"), calls)


def run(monkeypatch, folder: Path, **options):
    options = {
        "output_dir": folder / "out", "use_cpu": "true", "bf16": "false", "disable_tqdm": "true", "report_to": "none",
        "logging_steps": 1, "save_strategy": "no", "max_completion_length": 64, "per_device_train_batch_size": 16,
        "max_tool_calling_iterations": 2, "max_steps": 1,
    } | options  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return train.main()


def test_a_run_with_tools_that_go_wrong_goes_on_and_counts_them(model, tmp_path, monkeypatch):
    row = json.dumps({"prompt": [{"role": "user", "content": "a"}], "solution": "72"})
    (tmp_path / "train.jsonl").write_text((row + "\n") * 16)
    chosen = {"tools": "misbehaviour.misbehave", "tool_timeout": 0.2, "reward_funcs": "test_agents.reward"}
    trainer = run(monkeypatch, tmp_path, model_name_or_path=model, dataset_name=tmp_path, **chosen)
    logged = trainer.state.log_history[0]
    assert logged["tools/call_frequency"] > 0.5 and logged["tools/failure_frequency"] > 0.5


@pytest.mark.parametrize("rows", [None, {"start": "e"}, {"prompt": [{"role": "user", "content": "o"}]}])
def test_an_environment_needs_no_reward_no_prompt_and_no_dataset(rows, model, tmp_path, monkeypatch):
    dataset = {}
    if rows is not None:
        (tmp_path / "train.jsonl").write_text((json.dumps(rows) + "\n") * 16)
        dataset = {"dataset_name": tmp_path}
    trainer = run(monkeypatch, tmp_path, model_name_or_path=model, environment="test_agents.Counter", **dataset)
    logged = trainer.state.log_history[0]
    assert logged["rewards/Counter/std"] > 0 and 0 < abs(trainer.lambda_value) < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": "misbehaviour.nothing"}, "tools='misbehaviour.nothing' cannot be imported"),
        ({"tool_timeout": 5}, "tool_timeout has no effect without tools or environment."),
        ({"tools": "misbehaviour.misbehave"}, "no dataset: set dataset_name"),
        ({"environment": "test_agents.Counter", "model_name_or_path": "no/where"}, "couldn't find them"),
        ({"environment": "test_agents.Counter"}, "no model: "),
        ({"tools": "misbehaviour.misbehave", "reward_funcs": "accuracy_reward"}, "which reads the first message"),
        ({"tolls": "x"}, "unknown argument '--tolls'; did you mean '--tools'?"),
    ],
)
def test_what_cannot_be_used_is_one_line(options, message, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, tmp_path, **options)
    code = str(error.value.code)
    assert code.startswith("error: ") and message in code and "\n" not in code
