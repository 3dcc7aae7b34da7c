"""`recipes/train.py`: the command with tools and environments, whose errors are told before a model is loaded."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from stand_ins import write_agent_model

from recipes import train

ROOT = Path(train.ROOT)


def reward(completions, **kwargs) -> list[float]:
    return [float(index % 2) for index, _ in enumerate(completions)]


class Counter:
    """An environment that owns its data and its reward."""

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
    """Run the script with these options, one short step on this CPU."""
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
    chosen = {"tools": "misbehaviour.misbehave", "tool_timeout": 0.2, "reward_funcs": "test_train.reward"}
    trainer = run(monkeypatch, tmp_path, model_name_or_path=model, dataset_name=tmp_path, **chosen)
    logged = trainer.state.log_history[0]
    assert logged["tools/call_frequency"] > 0.5 and logged["tools/failure_frequency"] > 0.5


@pytest.mark.parametrize("rows", [None, {"start": "e"}, {"prompt": [{"role": "user", "content": "o"}]}])
def test_an_environment_needs_no_reward_no_prompt_and_no_dataset(rows, model, tmp_path, monkeypatch):
    dataset = {}
    if rows is not None:
        (tmp_path / "train.jsonl").write_text((json.dumps(rows) + "\n") * 16)
        dataset = {"dataset_name": tmp_path}
    trainer = run(monkeypatch, tmp_path, model_name_or_path=model, environment="test_train.Counter", **dataset)
    logged = trainer.state.log_history[0]
    assert logged["rewards/Counter/std"] > 0 and 0 < abs(trainer.lambda_value) < 0.2


def test_the_short_progress_bar_shows_the_latest_figures(monkeypatch):
    shown = []
    progress = train.ShortProgress()
    progress.on_log(None, None, None, logs={"reward": 0.5})  # no bar on this process
    progress.training_bar = SimpleNamespace(set_postfix=shown.append)
    progress.on_log(None, None, None, logs={"reward": 0.5, "lambda/value": -0.25, "completions/mean_length": None})
    progress.on_log(None, None, None, logs={"train_runtime": 1.0})
    assert shown == [{"reward": "0.500", "lambda": "-0.250"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": "misbehaviour.nothing"}, "tools='misbehaviour.nothing' cannot be imported"),
        ({"tool_timeout": 5}, "tool_timeout has no effect without tools or environment."),
        ({"tools": "misbehaviour.misbehave"}, "no dataset: set dataset_name"),
        ({"environment": "test_train.Counter", "model_name_or_path": "no/where"}, "couldn't find them"),
        ({"environment": "test_train.Counter"}, "no model: "),
        ({"tools": "misbehaviour.misbehave", "reward_funcs": "accuracy_reward"}, "which reads the first message"),
        ({"tolls": "x"}, "unknown argument '--tolls'; did you mean '--tools'?"),
    ],
)
def test_what_cannot_be_used_is_one_line(options, message, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, tmp_path, **options)
    assert str(error.value.code).startswith("error: ") and message in error.value.code
    assert "\n" not in error.value.code
