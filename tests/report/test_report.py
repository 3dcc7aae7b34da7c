"""The picture, the page and the lines of a run: what is drawn, where from, and what is refused."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from harness import Batch, build, config
from matplotlib.figure import Figure
from pyarrow import parquet
from transformers import TrainerControl, TrainerState

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
from trl_lambda.report import ReportCallback, main, plot_run, read_log_history, run_report, summarize_run
from trl_lambda.report.panels import PANELS, draw_panel, panels_of

METRICS = sorted({key for panel in PANELS if not panel.stacked for key in panel.curves.values()})
SHARES = {f"share/length_q{q}": q / 10 for q in (1, 2, 3, 4)} | {f"share/probability_q{q}": 0.25 for q in (1, 2, 3, 4)}
SHARES |= {"share/turns_1": 0.5, "share/turns_2": 0.25, "share/turns_3plus": 0.25}


def entry(step: int, **values) -> dict:
    rewards = {"reward": 0.01 * step, "rewards/exact/mean": 0.02 * step, "rewards/_format/mean": 0.9}
    return {"step": step, "loss": 0.1} | dict.fromkeys(METRICS, 0.5) | SHARES | rewards | values


HISTORY = [
    {"step": 0, "eval_reward": 0.25, "eval_rewards/exact/mean": 0.25, "eval_completions/mean_length": 12.0},
    *map(entry, range(1, 31)),
    {"step": 30, "eval_reward": 0.5, "eval_rewards/exact/mean": 0.5, "eval_completions/mean_length": 15.0},
    {"step": 30, "train_runtime": 9.0, "train_loss": 0.0},
]


def draw(history: list[dict]) -> dict:
    """The axes of each panel, by title, without a layout and a file, which take seconds."""
    figure = Figure()
    drawn = {panel.title: figure.add_subplot() for panel in panels_of(history)}
    for panel in panels_of(history):
        draw_panel(drawn[panel.title], panel, history)
    return drawn


def curves(axes) -> dict[str, list[tuple[float, float]]]:
    points = {line.get_label(): zip(*line.get_data(), strict=True) for line in axes.lines}
    return {name: [p for p in xy if not np.isnan(p[1])] for name, xy in points.items() if not name.startswith("_")}


def write_state(folder: Path, history: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


def test_every_panel_shows_what_was_logged():
    drawn = draw(HISTORY)
    assert list(drawn) == ["Reward", "Reward by function", *(panel.title for panel in PANELS[1:])]
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in drawn.values())
    reward = curves(drawn["Reward"])
    assert reward["training"][-1] == (30, pytest.approx(0.29))  # mean of the last three: .28, .29, .30
    assert reward["held-out"] == [(0, 0.25), (30, 0.5)]
    assert list(curves(drawn["Reward by function"])) == ["exact", " _format"]
    assert curves(drawn["Completion length"])["held-out"] == [(0, 12.0), (30, 15.0)]
    areas = drawn["Share of the loss, by response length"].collections
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in areas]
    assert tops == pytest.approx([0.1, 0.3, 0.6, 1.0]) and areas[0].get_label() == "shortest ¼"


def test_what_was_not_logged_is_not_drawn():
    of_masses = {panel.title for panel in PANELS if "mass/" in str(panel.curves)}
    areas, rewards = {"Share of the loss, by response length"}, {"Reward by function"}  # one function has no panel
    cases = {"lambda/mean_logp": set(), "share/length_q2": areas, "mass/": of_masses, "rewards/_format": rewards}
    for prefix, gone in cases.items():
        history = [{key: value for key, value in row.items() if not key.startswith(prefix)} for row in HISTORY]
        assert {"Reward by function", *(panel.title for panel in PANELS)} - set(draw(history)) == gone


def test_a_log_without_shares_leaves_a_gap():
    """TRL logs `None` where a metric has no value, as where no group had a signal."""
    nothing = dict.fromkeys([*SHARES, "advantage/length_correlation"])
    drawn = draw([entry(step, **(nothing if 4 <= step <= 6 else {})) for step in range(1, 10)])
    (area, *_) = drawn["Share of the loss, by response length"].collections
    covered = {x for path in area.get_paths() for x in path.vertices[:, 0]}
    assert len(area.get_paths()) == 2 and not any(3.5 < x < 6.5 for x in covered)
    assert [x for x, _ in curves(drawn["Do longer answers earn more?"])["within groups"]] == [1, 2, 3, 7, 8, 9]


@pytest.mark.parametrize("value", [None, float("inf"), "x"])
def test_values_that_are_no_numbers_are_left_out(value):
    drawn = draw([{"step": 1, "reward": value}, {"step": 2, "reward": 0.5}, {"step": 3, "reward": value}])
    assert curves(drawn["Reward"]) == {"training": [(2, 0.5)]}
    # A line through a single point is invisible, and an area of one log is as wide as its interval.
    marks, area = drawn["Reward"].lines[-1], draw([entry(5)])["Share of the loss, by token probability"].collections[0]
    assert (area.get_paths()[0].vertices[:, 0].min(), area.get_paths()[0].vertices[:, 0].max()) == (4.5, 5.5)
    assert marks.get_marker() == "." and marks.get_markevery() == [1]


def test_curves_and_areas_differ_without_colour():
    names = {f"rewards/reward_{number}/mean": 0.1 * number for number in range(14)}
    drawn = draw([entry(step, **names) for step in range(1, 20)])
    lines = [line for line in drawn["Reward by function"].lines if line.get_linestyle() != "None"]
    looks = {(line.get_linestyle(), line.get_marker(), line.get_color()) for line in lines}
    assert len(looks) == len(lines) == 16 and {color for *_, color in looks} <= {"black", "0.6"}
    shades = [area.get_facecolor()[0][:3] for area in drawn["Share of the loss, by response length"].collections]
    grey = [np.dot((0.299, 0.587, 0.114), shade) for shade in shades]
    assert grey == sorted(grey, reverse=True) and min(-np.diff(grey)) > 0.1


def test_a_real_run_with_two_held_out_sets(tmp_path, capsys):
    batch = Batch()
    args = config(LambdaGRPOConfig, batch, max_steps=2, eval_strategy="steps", eval_steps=1, log_completions=True,
                  output_dir=str(tmp_path / "run"), per_device_eval_batch_size=12, token_weight="tr_grpo")  # fmt: skip
    sets = {"easy": batch.dataset(), "hard_ones": batch.dataset().select([1])}
    trainer = build(LambdaGRPOTrainer, args, batch, eval_dataset=sets, callbacks=[ReportCallback()])
    trainer.train()
    trainer.save_state()
    capsys.readouterr()  # the tables of completions
    logged = [row["eval_reward"] for row in trainer.state.log_history if "eval_reward" in row]
    assert (tmp_path / "run" / "report.png").is_file()
    drawn = draw(read_log_history(tmp_path / "run"))
    reward = curves(drawn["Reward"])
    assert reward["held-out: easy"] == [(1, logged[0]), (2, logged[2])]
    assert reward["held-out: hard_ones"] == [(1, logged[1]), (2, logged[3])]
    assert "Weight on right and on wrong answers" in drawn and "Token weight v" in drawn
    line = ("held-out reward reward (hard_ones)", f"{logged[1]:.3f} -> {logged[3]:.3f} (step 1 -> 2)")
    assert line in summarize_run(trainer.state.log_history)
    page = plot_run(tmp_path / "run", tmp_path / "run.html").read_text(encoding="utf-8")
    assert "<h2>Completions of step 2</h2>" in page


def test_the_page_holds_everything_itself_and_fits_a_phone(tmp_path):
    page = plot_run(HISTORY, tmp_path / "run.html", title="arm <1>").read_text(encoding="utf-8")
    assert "<h1>arm &lt;1&gt;</h1>" in page and 'name="viewport"' in page
    assert "<td>held-out mean length</td><td>12.000 → 15.000 tokens (step 0 → 30)</td>" in page
    assert "<td>lambda/value</td><td>0.5</td><td>step 30</td>" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    images = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', page)
    assert len(images) == len(PANELS) + 1 and images[0][0] == "Reward"


def write_completions(folder: Path, step: int, rows: list[dict]) -> None:
    (folder / "completions").mkdir(exist_ok=True)
    table = pyarrow.Table.from_pylist([{"step": step} | row for row in rows])
    parquet.write_table(table, folder / "completions" / f"completions_{step:05d}.parquet")


def test_the_page_shades_the_last_completions_by_their_advantage(tmp_path):
    folder = write_state(tmp_path / "run", TRAINED)
    write_completions(folder, 9, [{"prompt": "old", "completion": "old", "advantage": 1.0}])
    answers = (("<b>yes", 0.5), ("", None))
    write_completions(folder, 10, [{"prompt": "1 < 2?", "completion": c, "advantage": a} for c, a in answers])
    write_completions(folder, 11, [{"prompt": "eval", "completion": "eval", "advantage": 0.0}])
    page = plot_run(folder, tmp_path / "run.html").read_text(encoding="utf-8")
    assert "Completions of step 10" in page and "<p>A = +0.50. Prompt: 1 &lt; 2?</p>" in page
    shown = re.findall(r'<span style="background:rgb(.*?);color:#\w+" title="(\S+)">(.*?)</span>', page)
    assert shown == [("(8, 48, 107)", "0.5", "&lt;b&gt;yes"), ("(247, 251, 255)", "0", "")]
    # Conversations are shown with their roles.
    prompt = [{"role": "user", "content": "3+4"}]
    messages = [{"role": "assistant", "content": "no"}, {"role": "tool", "content": None}]
    write_completions(folder, 12, [{"prompt": prompt, "completion": messages, "advantage": 1.0}])
    page = plot_run(folder, tmp_path / "run.html").read_text(encoding="utf-8")
    assert "<p>A = +1.00. Prompt: [user] 3+4</p>" in page and "[assistant] no↵\n[tool] </span>" in page


def test_a_folder_is_read_where_the_run_has_come_furthest(tmp_path):
    run = tmp_path / "run"
    write_state(run / "checkpoint-9", HISTORY[:10])
    write_state(run / "checkpoint-10", HISTORY[:11])
    assert read_log_history(run) == HISTORY[:11] == read_log_history(str(run / "checkpoint-10"))
    write_state(run, HISTORY[:4])  # of a first session
    assert read_log_history(run) == HISTORY[:11]
    write_state(run, HISTORY)
    assert read_log_history(run) == HISTORY


DAMAGED = [b'{"log_history": [{"st', b"\xff\xfe\x00", b"[]", b"{}", b'{"log_history": [1]}']


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((content, "trainer_state.json is damaged, it holds no log history") for content in DAMAGED),
        (None, "has no trainer_state.json, nor has a checkpoint-N in it; give a run's output_dir"),
        (b'{"log_history": [{"step": 1, "loss": 0.1}]}', "has not logged anything"),
    ],
)
def test_nothing_to_draw_is_one_line(tmp_path, content, message, capsys):
    if content is not None:
        (tmp_path / "trainer_state.json").write_bytes(content)
    with pytest.raises(SystemExit, match=rf"^error: .*{message}.*$"):
        main([str(tmp_path)])
    assert capsys.readouterr().out == "" and not list(tmp_path.glob("report*"))


TRAINED = [
    {"step": 1, "rewards/f/mean": 0.2, "rewards/g/mean": None, "completions/mean_length": 10.0, "lambda/value": 0.0},
    {"step": 2, "rewards/f/mean": 0.4, "rewards/g/mean": 0.5, "completions/mean_length": 12.5, "lambda/value": 0.25},
]


def test_the_summary_is_of_held_out_data_if_there_is_any():
    lam = ("lambda", "0.000 -> 0.250 (step 1 -> 2)")
    rewards = [("training reward f", "0.200 -> 0.400 (step 1 -> 2)"), ("training reward g", "0.500 (step 2)")]
    length = ("training mean length", "10.000 -> 12.500 tokens (step 1 -> 2)")
    assert summarize_run(TRAINED) == [*rewards, length, lam] and summarize_run([]) == []
    evaluation = {"step": 2, "eval_rewards/f/mean": 0.6, "eval_completions/mean_length": 9.0}
    lines = [("held-out reward f", "0.600 (step 2)"), ("held-out mean length", "9.000 tokens (step 2)"), lam]
    assert summarize_run([*TRAINED, evaluation]) == lines


def test_the_command_writes_both_and_leaves_pyplot_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    folder = write_state(tmp_path / "run", TRAINED)
    main([str(folder), "--html"])
    out = capsys.readouterr().out
    assert (folder / "report.png").is_file() and "<h1>run</h1>" in (folder / "report.html").read_text(encoding="utf-8")
    assert "training mean length" in out and str(folder / "report.html") in out
    assert "matplotlib.pyplot" not in sys.modules


def test_the_callback_writes_every_so_many_logs_and_at_the_end(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(run_report, "plot_run", lambda run, path, title: written.append((len(run), path.name, title)))
    callback, state, control = ReportCallback(every=3), TrainerState(), TrainerControl()
    args = config(LambdaGRPOConfig, Batch(), output_dir=str(tmp_path / "arm"))
    for step in range(1, 8):
        state.log_history.append(entry(step))
        callback.on_log(args, state, control, logs=entry(step))
        callback.on_log(args, state, control, logs={"eval_reward": 1.0})
    callback.on_train_end(args, state, control)
    state.is_world_process_zero = False
    callback.on_train_end(args, state, control)
    assert written == [(logs, "report.png", "arm") for logs in (3, 6, 7)]


def test_a_picture_that_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    state = TrainerState(log_history=TRAINED)
    args = config(LambdaGRPOConfig, Batch(), output_dir=str(tmp_path / "file" / "folder"))
    ReportCallback().on_train_end(args, state, TrainerControl())
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("no report: ")
