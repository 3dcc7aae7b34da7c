"""Pictures of a run: what is drawn, where from, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trl_lambda import report
from trl_lambda.report import plot_run, read_log_history, summarize_run

HISTORY = [
    {"step": 0, "eval_reward": 0.25, "eval_completions/mean_length": 12.0},
    *[
        {
            "step": step,
            "reward": 0.25 + 0.01 * step,
            "completions/mean_length": 12.0 + 0.1 * step,
            "lambda/value": 0.002 * step,
        }
        for step in range(1, 31)
    ],
    {"step": 30, "eval_reward": 0.5, "eval_completions/mean_length": 15.0},
    {"step": 30, "train_runtime": 9.0, "train_loss": 0.0},
]


def without(key: str) -> list[dict]:
    return [{name: value for name, value in entry.items() if name != key} for entry in HISTORY]


@pytest.fixture
def drawn(monkeypatch):
    """The series handed to each panel, by title, seen where they are read from the log."""
    seen = {}
    draw = report._draw_panel

    def spy(axes, history, title, *rest):
        draw(axes, history, title, *rest)
        seen[title] = axes

    monkeypatch.setattr(report, "_draw_panel", spy)
    return seen


def points(line) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def test_three_panels_show_the_logged_values(tmp_path: Path, drawn):
    path = plot_run(HISTORY, tmp_path / "new" / "run.png")
    assert path == tmp_path / "new" / "run.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    lam, reward, length = drawn.values()
    assert (30, 0.06) in [(x, pytest.approx(y)) for x, y in points(lam.lines[1])]
    assert points(reward.lines[0]) == [(step, pytest.approx(0.25 + 0.01 * step)) for step in range(1, 31)]
    assert points(reward.lines[1])[-1] == (30, pytest.approx(0.54))  # mean of the last three: .53, .54, .55
    assert points(reward.lines[2]) == [(0, 0.25), (30, 0.5)]
    assert points(length.lines[2]) == [(0, 12.0), (30, 15.0)]
    assert [axes.get_ylabel() for axes in drawn.values()] == ["λ (no unit)", "reward per completion", "tokens"]
    assert length.get_xlabel() == "optimizer step"


def test_a_run_without_lambda_has_no_lambda_panel(tmp_path: Path, drawn):
    plot_run(without("lambda/value"), tmp_path / "run.png")
    assert list(drawn) == ["Mean reward", "Mean completion length"]


def test_missing_values_are_skipped(tmp_path: Path, drawn):
    history = [{"step": 1, "reward": None}, {"step": 2, "reward": float("nan")}, {"step": 3, "reward": 0.5}]
    plot_run(history, tmp_path / "run.png")
    assert points(drawn["Mean reward"].lines[0]) == [(3, 0.5)]


def test_the_picture_is_readable_without_colour(tmp_path: Path):
    pixels = np.asarray(Image.open(plot_run(HISTORY, tmp_path / "run.png")).convert("RGB")).astype(int)
    assert np.abs(pixels.max(-1) - pixels.min(-1)).max() == 0  # nothing is told by hue
    assert pixels.min() < 60 and (pixels < 128).mean() > 0.005  # and something is drawn


def test_pyplot_is_left_alone(tmp_path: Path):
    code = (
        "import sys; from trl_lambda.report import plot_run; "
        "assert 'matplotlib' not in sys.modules; "
        "plot_run([{'step': 1, 'reward': 0.5}], sys.argv[1]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.png")], check=True)


def write_state(folder: Path, history: list[dict]) -> None:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))


def test_a_folder_is_read_from_its_newest_checkpoint_unless_it_has_its_own_state(tmp_path: Path):
    write_state(tmp_path / "run" / "checkpoint-9", HISTORY[:3])
    write_state(tmp_path / "run" / "checkpoint-10", HISTORY[:4])
    write_state(tmp_path / "run" / "checkpoint-best", HISTORY[:1])
    assert read_log_history(tmp_path / "run") == HISTORY[:4]
    assert plot_run(str(tmp_path / "run"), tmp_path / "run.png").is_file()
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    assert read_log_history(tmp_path / "run") == HISTORY


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ([], "run has 0 entries and nothing to draw"),
        ([{"step": 1, "loss": 0.1}], "run has 1 entries and nothing to draw; needed is at least one of: lambda/value"),
        ([{"reward": 0.5}], "run has an entry without a step"),
        ([["step", 1]], "run is a list; accepted: a log history"),
        ({"log_history": HISTORY}, "run is a dict; accepted: a log history"),
        (None, "run is a NoneType; accepted: a log history"),
    ],
)
def test_bad_histories_are_refused(tmp_path: Path, run, message):
    with pytest.raises(ValueError, match=message):
        plot_run(run, tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no trainer_state.json is"),
        (b'{"log_history": [{"st', "trainer_state.json is damaged"),
        (b"\xff\xfe\x00", "trainer_state.json is damaged"),
        (b"[]", "holds no log_history"),
        (b"{}", "holds no log_history"),
    ],
)
def test_bad_folders_are_refused(tmp_path: Path, content, message):
    if content is not None:
        (tmp_path / "trainer_state.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        plot_run(tmp_path, tmp_path / "run.png")
    assert "\n" not in str(error.value)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # makes the import fail
    with pytest.raises(ImportError, match=r'pip install "trl-lambda\[plots\]"'):
        plot_run(HISTORY, tmp_path / "run.png")


TRAINED = [
    {"step": 1, "reward": 0.2, "rewards/f/mean": 0.2, "rewards/g/mean": None, "completions/mean_length": 10.0},
    {"step": 2, "reward": 0.4, "rewards/f/mean": 0.4, "rewards/g/mean": 0.5, "completions/mean_length": 12.5},
]


def test_without_evaluation_the_summary_is_of_training_and_says_so():
    assert summarize_run(TRAINED) == [
        ("training reward f", "0.200 -> 0.400 (step 1 -> 2)"),
        ("training reward g", "0.500 (step 2)"),
        ("training mean length", "10.000 -> 12.500 tokens (step 1 -> 2)"),
    ]


def test_with_evaluation_the_summary_is_of_held_out_data_only():
    evaluated = {"step": 2, "eval_reward": 0.6, "eval_rewards/f/mean": 0.6, "eval_completions/mean_length": 9.0}
    assert summarize_run([*TRAINED, evaluated]) == [
        ("held-out reward f", "0.600 (step 2)"),
        ("held-out mean length", "9.000 tokens (step 2)"),
    ]
    before = {"step": 0, "eval_reward": 0.3, "eval_rewards/f/mean": 0.3}
    assert summarize_run([before, *TRAINED, evaluated])[0] == ("held-out reward f", "0.300 -> 0.600 (step 0 -> 2)")


def test_a_run_that_logged_nothing_has_no_summary():
    assert summarize_run([]) == []
