"""The picture of a run: what is drawn, where from, and what is refused."""

import base64
import json
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import Batch, build, config
from transformers import TrainerControl, TrainerState

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
from trl_lambda.report import ReportCallback, main, plot_run, read_log_history, run_report, summarize_run
from trl_lambda.report.history import lambda_change
from trl_lambda.report.panels import PANELS
from trl_lambda.weights import length_weights


def entry(step: int) -> dict:
    return {
        "step": step,
        "loss": 0.1,
        "reward": 0.25 + 0.01 * step,
        "rewards/exact/mean": 0.25 + 0.01 * step,
        "rewards/format/mean": 0.9,
        "completions/mean_length": 12.0 + 0.1 * step,
        "completions/min_length": 4.0,
        "completions/max_length": 44.0,
        "lambda/value": 0.05 * step,
        "lambda/grad": -0.02,
        "lambda/mean_logp": 0.2,
        "lambda/min_logp": -0.1,
        "lambda/r2": 0.3,
        "lambda/target_gap": 0.1,
        "advantage/length_correlation": 0.3,
        "advantage/positive_mean_length": 15.0,
        "advantage/negative_mean_length": 11.0,
        "entropy": 0.5,
        "token_weight/at_min": 0.1,
        "token_weight/at_max": 0.6,
        **{f"share/length_q{q}": q / 10 for q in (1, 2, 3, 4)},
        **{f"share/probability_q{q}": 0.25 for q in (1, 2, 3, 4)},
    }


HISTORY = [
    {"step": 0, "eval_reward": 0.25, "eval_completions/mean_length": 12.0},
    *map(entry, range(1, 31)),
    {"step": 30, "eval_reward": 0.5, "eval_completions/mean_length": 15.0},
    {"step": 30, "train_runtime": 9.0, "train_loss": 0.0},
]


def without(*prefixes: str) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.startswith(prefixes)} for row in HISTORY]


@pytest.fixture
def drawn(monkeypatch):
    """The axes of each panel, by title."""
    seen = {}
    finish = run_report.finish_panel

    def spy(axes, panel, run):
        finish(axes, panel, run)
        seen[panel.title] = axes

    monkeypatch.setattr(run_report, "finish_panel", spy)
    return seen


def points(line) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def labels(axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def test_all_panels_show_the_logged_values(tmp_path: Path, drawn):
    path = plot_run(HISTORY, tmp_path / "new" / "run.png", aggregation="lambda")
    assert path == tmp_path / "new" / "run.png"
    assert path.read_bytes().startswith(b"\x89PNG") and [file.name for file in path.parent.iterdir()] == ["run.png"]
    assert list(drawn) == [panel.title for panel in PANELS]
    reward = drawn["Reward"]
    assert points(reward.lines[0]) == [(step, pytest.approx(0.25 + 0.01 * step)) for step in range(1, 31)]
    assert points(reward.lines[1])[-1] == (30, pytest.approx(0.54))  # mean of the last three: .53, .54, .55
    assert points(reward.lines[2]) == [(0, 0.25), (30, 0.5)]
    assert labels(reward) == ["training, as logged", "mean of 3 logs", "held-out"]
    assert points(drawn["Length preference λ"].lines[1])[-1] == (30, pytest.approx(1.5))
    assert points(drawn["Gradient of λ"].lines[1])[0] == (1, -0.02)
    assert labels(drawn["Reward by function"]) == ["exact", "format"]
    sign = drawn["Mean length by sign of the advantage"]
    assert [points(line)[0][1] for line in sign.lines] == [15.0, 11.0] and "A > 0" in labels(sign)[0]
    length = drawn["Completion length"]
    assert points(length.lines[1]) == [(0, 12.0), (30, 15.0)] and length.get_ylim()[0] == 0


def test_shares_are_stacked_from_the_lowest_quarter(tmp_path: Path, drawn):
    plot_run(HISTORY, tmp_path / "run.png")
    shares = drawn["Share of the loss by response length"]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in shares.collections]
    assert tops == pytest.approx([0.1, 0.3, 0.6, 1.0])
    assert labels(shares)[0] == "shortest quarter" and shares.get_ylim() == (0, 1)


def test_the_length_weight_is_drawn_for_lambda_at_start_midway_and_end(tmp_path: Path, drawn):
    plot_run(HISTORY, tmp_path / "run.png", aggregation="power")
    axes = drawn["Length weight f over the run's lengths"]
    assert labels(axes) == ["λ = 0.05 at start", "λ = 0.75 midway", "λ = 1.50 at end"]
    for line, lam in zip(axes.lines[1:], (0.05, 0.75, 1.5), strict=True):
        lengths, weights = map(torch.tensor, line.get_data())
        assert (lengths[0], lengths[-1]) == (4, 44)  # the run's own shortest and longest
        expected = length_weights(lengths.unsqueeze(0), lam, aggregation="power")[0]
        torch.testing.assert_close(weights, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
    assert axes.get_xlabel() == "response length (tokens)"


def test_a_lambda_that_stands_still_is_one_curve(tmp_path: Path, drawn):
    fixed = [row | {"lambda/value": 2.0} if "loss" in row else row for row in HISTORY]
    plot_run(fixed, tmp_path / "run.png", aggregation="lambda")
    assert labels(drawn["Length weight f over the run's lengths"]) == ["λ = 2.00 at end"]


OF_RULES = (
    "What λ prefers beside length",
    "Variance of A that λ's regression explains",
    "Mean length against its target",
)


@pytest.mark.parametrize(
    ("prefixes", "gone"),
    [
        (("lambda/",), {"Length preference λ", "Gradient of λ", "Length weight f over the run's lengths", *OF_RULES}),
        (("lambda/mean_logp", "lambda/min_logp"), OF_RULES[:1]),
        (("lambda/r2",), OF_RULES[1:2]),
        (("lambda/target_gap",), OF_RULES[2:]),
        (("lambda/grad",), {"Gradient of λ"}),
        (("completions/max_length",), {"Length weight f over the run's lengths"}),
        (("share/length_q2",), {"Share of the loss by response length"}),
        (("rewards/format",), {"Reward by function"}),
        (("token_weight/", "entropy"), {"Tokens at the bounds of v", "Entropy of the policy"}),
    ],
)
def test_what_was_not_logged_has_no_panel(tmp_path: Path, drawn, prefixes, gone):
    plot_run(without(*prefixes), tmp_path / "run.png", aggregation="lambda")
    assert set(drawn) == {panel.title for panel in PANELS} - set(gone)


def test_no_panel_is_empty_and_every_axis_has_its_unit(tmp_path: Path, drawn):
    for history in (HISTORY, HISTORY[:2], HISTORY[:1], without("loss", "reward")):
        drawn.clear()
        plot_run(history, tmp_path / "run.png", aggregation="lambda")
        assert drawn
        for title, axes in drawn.items():
            data = [line for line in axes.lines if len(line.get_xdata()) and not line.get_label().startswith("λ = 0:")]
            assert data or axes.collections or axes.patches, title
            assert axes.get_xlabel() and axes.get_ylabel()


def test_nothing_overlaps(tmp_path: Path, drawn):
    """Titles and legends of the whole picture, in pixels: apart from each other, from all axes, and inside."""
    named = [
        {key.replace("exact", "a_reward_function_with_a_long_name"): value for key, value in row.items()}
        for row in HISTORY
    ]
    plot_run(named, tmp_path / "run.png", aggregation="lambda", title="a run: aggregation=lambda")
    figure = drawn["Reward"].figure
    boxes = []
    for axes in drawn.values():
        boxes += [axes.title.get_window_extent(), axes.get_window_extent()]
        if axes.get_legend():
            boxes.append(axes.get_legend().get_window_extent())
        boxes += [axes.xaxis.label.get_window_extent(), axes.yaxis.label.get_window_extent()]
    assert len(boxes) > 50
    for i, box in enumerate(boxes):
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 and box.y1 <= figure.bbox.y1
        for other in boxes[i + 1 :]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            along = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across < 1.5 or along < 1.5, (box, other)
    assert figure.bbox.x1 <= 1600  # a laptop's screen


# ---- Several held-out data sets ----


def evaluated(step: int, name: str, reward: float, length: float) -> dict:
    """What Trainer and TRL log for one of several: the former's figures carry the name, the latter's do not."""
    own = {f"eval_{name}_loss": 0.0, f"eval_{name}_runtime": 1.0}
    theirs = {"eval_reward": reward, "eval_rewards/exact/mean": reward, "eval_completions/mean_length": length}
    return {"step": step, **own, **theirs}


TWO_SETS = [
    evaluated(0, "easy", 0.5, 10.0),
    evaluated(0, "hard_ones", 0.125, 30.0),
    *map(entry, range(1, 5)),
    evaluated(4, "easy", 0.75, 12.0),
    evaluated(4, "hard_ones", 0.25, 40.0),
]


@pytest.mark.parametrize("prefixed", [False, True], ids=["as TRL logs", "every key with the name"])
def test_held_out_data_sets_are_drawn_apart(tmp_path: Path, drawn, prefixed):
    history = TWO_SETS
    if prefixed:
        history = [
            {
                key.replace("eval_", f"eval_{name}_") if "_reward" in key or "/" in key else key: x
                for key, x in row.items()
            }
            if (name := next((n for n in ("easy", "hard_ones") if f"eval_{n}_loss" in row), ""))
            else row
            for row in TWO_SETS
        ]
        assert "eval_hard_ones_reward" in history[1]
    page = plot_run(history, tmp_path / "run.html").read_text(encoding="utf-8")
    for title, easy, hard in (
        ("Reward: exact", (0.5, 0.75), (0.125, 0.25)),
        ("Completion length", (10, 12), (30, 40)),
    ):
        axes = next(axes for axes in drawn.values() if axes.get_title(loc="left").startswith(title.split(":")[0]))
        lines = {line.get_label(): line for line in axes.lines if str(line.get_label()).startswith("held-out")}
        assert list(lines) == ["held-out: easy", "held-out: hard_ones"]
        assert points(lines["held-out: easy"]) == [(0, easy[0]), (4, easy[1])]
        assert points(lines["held-out: hard_ones"]) == [(0, hard[0]), (4, hard[1])]
        assert len({line.get_marker() for line in lines.values()}) == 2
        shown = [text.get_text() for text in axes.get_legend().get_texts()]
        assert {"held-out: easy", "held-out: hard_ones"} <= set(shown)
    assert '<td>eval_easy_reward</td><td class="number">0.75</td>' in page
    assert '<td>eval_hard_ones_reward</td><td class="number">0.25</td>' in page
    assert "<td>eval_reward</td>" not in page and "eval_easy_easy" not in page
    assert summarize_run(history) == [
        ("held-out reward exact (easy)", "0.500 -> 0.750 (step 0 -> 4)"),
        ("held-out mean length (easy)", "10.000 -> 12.000 tokens (step 0 -> 4)"),
        ("held-out reward exact (hard_ones)", "0.125 -> 0.250 (step 0 -> 4)"),
        ("held-out mean length (hard_ones)", "30.000 -> 40.000 tokens (step 0 -> 4)"),
    ]


def test_a_metric_of_ones_own_that_ends_in_reward_is_no_data_set(tmp_path: Path, drawn):
    history = [{"step": 1, "reward": 0.5, "eval_reward": 0.5, "eval_format_reward": 0.1}]
    plot_run(history, tmp_path / "run.png")
    assert labels(drawn["Reward"]) == ["training", "held-out"]


def test_held_out_data_sets_of_a_real_run_are_told_apart_in_its_log_and_in_its_event_files(tmp_path: Path, drawn):
    pytest.importorskip("tensorboard", reason="tensorboard is in the dev extra")
    easy, hard = Batch(), Batch()
    args = config(LambdaGRPOConfig, easy, max_steps=2, eval_strategy="steps", eval_steps=1, report_to="tensorboard",
                  output_dir=str(tmp_path / "run"), per_device_eval_batch_size=12)  # fmt: skip
    sets = {"easy": easy.dataset(), "hard": hard.dataset().select([1])}
    trainer = build(LambdaGRPOTrainer, args, easy, eval_dataset=sets)
    trainer.train()
    logged = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert len(logged) == 4 and len(set(logged)) > 1
    for run in (trainer.state.log_history, tmp_path / "run"):
        drawn.clear()
        plot_run(run, tmp_path / "run.png")
        lines = [line for line in drawn["Reward"].lines if str(line.get_label()).startswith("held-out")]
        assert [line.get_label() for line in lines] == ["held-out: easy", "held-out: hard"]
        assert [y for line in lines for _, y in points(line)] == pytest.approx([logged[i] for i in (0, 2, 1, 3)])


# ---- Reward functions ----


def with_functions(names: list[str]) -> list[dict]:
    return [
        {key: value for key, value in row.items() if not key.startswith("rewards/")}
        | {f"rewards/{name}/mean": 0.1 * number for number, name in enumerate(names)}
        for row in map(entry, range(1, 31))
    ]


@pytest.mark.parametrize("logs", [30, 1])
@pytest.mark.parametrize("count", [2, 5, 9, 24])
def test_every_reward_function_has_an_entry_that_can_be_told_apart_in_grey(tmp_path: Path, drawn, count, logs):
    names = [f"reward_number_{number}" for number in range(count - 1)] + ["_private"]
    plot_run(with_functions(names)[:logs], tmp_path / "run.png")
    axes = drawn["Reward by function"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == names
    assert len(axes.lines) == count
    styles = {(line.get_linestyle() if logs > 1 else "", line.get_marker()) for line in axes.lines}
    assert len(styles) == count  # without a look at the colour
    assert all(len(line.get_xdata()) == logs for line in axes.lines)
    figure = axes.figure
    box, legend, title = axes.get_window_extent(), axes.get_legend().get_window_extent(), axes._left_title
    assert box.height > 0.35 * 2.75 * figure.dpi  # the legend does not eat the panel
    assert legend.x1 <= figure.bbox.x1 and legend.y0 >= box.y1 - 1.5
    assert title.get_window_extent().y0 >= legend.y1 - 4 and title.get_window_extent().y1 <= figure.bbox.y1


# ---- f for any legal r ----


@pytest.mark.parametrize(("scale", "rows"), [(1 / 9, 33), (0.176, 33), (0.18, 31), (0.3, 12), (0.5, 4), (0.99, 2)])
def test_the_length_weight_is_drawn_for_every_legal_r(tmp_path: Path, drawn, scale, rows):
    plot_run(HISTORY, tmp_path / "run.png", aggregation="lambda", length_scale=scale)
    axes = drawn["Length weight f over the run's lengths"]
    lengths, weights = map(torch.tensor, axes.lines[-1].get_data())
    assert len(lengths) == rows and (lengths[0], lengths[-1]) == (4, 44)
    expected = length_weights(lengths.unsqueeze(0), 1.5, aggregation="lambda", length_scale=scale)[0]
    torch.testing.assert_close(weights, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
    more = "" if rows == 33 else f", {rows} in a group"
    assert axes.get_xlabel() == f"response length (tokens){more}"


@pytest.mark.parametrize("scale", [0.0, -0.1, 1.0, float("nan")])
def test_an_r_that_no_group_allows_is_refused(tmp_path: Path, scale):
    with pytest.raises(ValueError, match=r"length_scale=\S+ must be in \(0, 1\)"):
        plot_run(HISTORY, tmp_path / "run.png", aggregation="lambda", length_scale=scale)


def test_missing_values_are_skipped(tmp_path: Path, drawn):
    history = [{"step": 1, "reward": None}, {"step": 2, "reward": float("nan")}, {"step": 3, "reward": 0.5}]
    plot_run(history, tmp_path / "run.png")
    assert points(drawn["Reward"].lines[0]) == [(3, 0.5)]


def test_the_quarters_are_told_apart_in_grey(tmp_path: Path, drawn):
    plot_run(HISTORY, tmp_path / "run.png")
    grounds = [area.get_facecolor()[0][:3] for area in drawn["Share of the loss by response length"].collections]
    grey = [0.299 * red + 0.587 * green + 0.114 * blue for red, green, blue in grounds]
    assert grey == sorted(grey, reverse=True) and min(a - b for a, b in zip(grey, grey[1:], strict=False)) > 0.1
    pixels = np.asarray(Image.open(tmp_path / "run.png").convert("L"))
    assert pixels.min() < 60 and (pixels < 128).mean() > 0.005  # and something is drawn


# ---- One page ----


def test_the_page_holds_everything_itself(tmp_path: Path):
    path = plot_run(HISTORY, tmp_path / "run.html", title="arm <1>")
    page = path.read_text(encoding="utf-8")
    assert "<h1>arm &lt;1&gt;</h1>" in page and "<td>0.250 -&gt; 0.500 (step 0 -&gt; 30)</td>" not in page
    assert "<th>held-out mean length</th><td>12.000 -&gt; 15.000 tokens (step 0 -&gt; 30)</td>" in page
    assert '<td>lambda/value</td><td class="number">1.5</td><td class="number">30</td>' in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    png = base64.b64decode(re.search(r"base64,([^\"]+)", page).group(1))
    assert Image.open(BytesIO(png)).size[0] > 900


# ---- From a folder ----


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


def test_a_resumed_run_is_read_where_it_has_come_furthest(tmp_path: Path):
    write_state(tmp_path / "run", HISTORY[:4])
    write_state(tmp_path / "run" / "checkpoint-20", HISTORY[:21])
    assert read_log_history(tmp_path / "run") == HISTORY[:21]


def write_lambda(folder: Path, text: str) -> None:
    (folder / "lambda.json").write_text(text)


def test_the_member_of_f_is_read_from_lambda_json(tmp_path: Path, drawn, caplog):
    write_state(tmp_path / "run" / "checkpoint-30", HISTORY)
    plot_run(tmp_path / "run", tmp_path / "run.png")
    assert "Length weight f over the run's lengths" not in drawn
    content = {"lambda": 1.5, "skipped": 0, "aggregation": "power", "length_scale": 1 / 9}
    write_lambda(tmp_path / "run" / "checkpoint-30", json.dumps(content))
    plot_run(tmp_path / "run", tmp_path / "run.png")
    axes = drawn["Length weight f over the run's lengths"]
    assert axes.figure.get_suptitle() == "run: aggregation=power" and not caplog.messages
    drawn.clear()
    write_lambda(tmp_path / "run" / "checkpoint-30", "{")
    plot_run(tmp_path / "run", tmp_path / "run.png")
    assert "Reward" in drawn and "Length weight f over the run's lengths" not in drawn
    assert len(caplog.messages) == 1 and "lambda.json is damaged" in caplog.messages[0]


@pytest.mark.parametrize("scale", ["1e400", "9" * 400, "-1", '"x"', "[1]"])
def test_a_bad_r_in_lambda_json_costs_one_panel(tmp_path: Path, drawn, caplog, scale):
    write_state(tmp_path / "run", HISTORY)
    content = f'{{"lambda": 1.5, "skipped": 0, "aggregation": "lambda", "length_scale": {scale}}}'
    write_lambda(tmp_path / "run", content)
    plot_run(tmp_path / "run", tmp_path / "run.png")
    assert "Reward" in drawn and "Length weight f over the run's lengths" not in drawn
    assert len(caplog.messages) == 1 and "no picture of the length weight" in caplog.messages[0]


@pytest.mark.parametrize("torn", [b"", b'{"log_history": [{"step": 1', b"[" * 100_000, b"{}", b'{"log_history": [1]}'])
@pytest.mark.parametrize("where", ["newest checkpoint", "the folder's own"])
def test_a_torn_state_beside_a_good_checkpoint_costs_a_word(tmp_path: Path, caplog, torn, where):
    run = tmp_path / "run"
    write_state(run / "checkpoint-8", HISTORY[:3])
    write_state(run / "checkpoint-9", HISTORY[:4])
    folder = run if where == "the folder's own" else run / "checkpoint-10"
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_bytes(torn)
    assert read_log_history(run) == HISTORY[:4]
    assert len(caplog.messages) == 1 and str(folder / "trainer_state.json") in caplog.messages[0]
    assert "\n" not in caplog.messages[0]
    assert plot_run(run, tmp_path / "run.png").is_file()
    for number in (8, 9):
        (run / f"checkpoint-{number}" / "trainer_state.json").write_bytes(torn)
    with pytest.raises(ValueError, match="trainer_state.json"):
        read_log_history(run)


# ---- Two runs ----


def write_events(folder: Path, steps: range, reward: float = 0.5) -> None:
    """TensorBoard's event file of one session of a run."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is in the dev extra")
    with tensorboard.SummaryWriter(str(folder)) as writer:
        for step in steps:
            writer.add_scalar("train/reward", reward, step)


@pytest.mark.parametrize("kind", ["events", "events of Trainer", "state", "checkpoint"])
def test_a_folder_above_two_runs_is_refused_and_lists_them(tmp_path: Path, kind):
    for name in ("arm_b", "arm_a"):
        folder = tmp_path / "runs" / name
        if kind.startswith("events"):
            write_events(folder / "runs" / "Nov20_13-37-00_host" if "Trainer" in kind else folder, range(1, 4))
        else:
            write_state(folder / "checkpoint-3" if kind == "checkpoint" else folder, HISTORY[:4])
    for run in (tmp_path, tmp_path / "runs"):
        names = [str((tmp_path / "runs" / name).relative_to(run)) for name in ("arm_a", "arm_b")]
        with pytest.raises(ValueError, match="below which there are 2 runs: .*; accepted: the folder of one") as error:
            plot_run(run, tmp_path / "run.png")
        assert f"2 runs: {', '.join(names)};" in str(error.value)
    assert plot_run(tmp_path / "runs" / "arm_a", tmp_path / "run.png").is_file()


def test_the_sessions_of_a_resumed_run_are_one_run(tmp_path: Path):
    write_events(tmp_path / "run" / "runs" / "Nov20_13-37-00_host", range(1, 4), 0.25)
    write_events(tmp_path / "run" / "runs" / "Nov21_09-00-00_host", range(3, 6), 0.5)
    history = read_log_history(tmp_path / "run")
    assert [(row["step"], row["reward"]) for row in history] == [(1, 0.25), (2, 0.25), (3, 0.5), (4, 0.5), (5, 0.5)]
    assert read_log_history(tmp_path / "run" / "runs") == history


def test_a_run_that_has_another_below_it_is_read_alone(tmp_path: Path):
    write_state(tmp_path / "run", HISTORY[:3])
    write_events(tmp_path / "run" / "another", range(1, 100))
    write_state(tmp_path / "run" / "another" / "checkpoint-99", HISTORY)
    assert read_log_history(tmp_path / "run") == HISTORY[:3]
    write_events(tmp_path / "run" / "tensorboard", range(1, 50))
    assert read_log_history(tmp_path / "run")[-1]["step"] == 49  # its own event files, wherever they are in it


def test_lambda_has_a_line_where_it_was_logged():
    history = [{"step": 1, "lambda/value": 0.0}, {"step": 5, "lambda/value": 0.2}]
    assert lambda_change(history) == [("lambda", "0.000 -> 0.200 (step 1 -> 5)")]
    assert lambda_change([{"step": 1, "reward": 0.0}]) == []


# ---- Names of what is written ----


@pytest.mark.parametrize("name", ["run.htm", "run.HTML", "run.Htm"])
def test_a_page_may_end_in_htm(tmp_path: Path, name):
    assert plot_run(HISTORY, tmp_path / name).read_bytes().startswith(b"<!DOCTYPE html>")


@pytest.mark.parametrize("name", ["run.pdf", "run", "run.xhtml", "run.jpg"])
def test_any_other_ending_is_refused(tmp_path: Path, name):
    with pytest.raises(ValueError, match=r"path is '.*'; accepted: a name that ends in \.html or \.png"):
        plot_run(HISTORY, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--png", "a.html"], "error: --png is 'a.html'; accepted: a name that ends in .png."),
        (["--html", "a.png"], "error: --html is 'a.png'; accepted: a name that ends in .html (.htm is a page too)."),
    ],
)
def test_the_command_refuses_other_endings_before_it_reads(tmp_path: Path, monkeypatch, options, message):
    write_state(tmp_path / "run", HISTORY)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["run", *options])
    assert stopped.value.code == message
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["trainer_state.json"]


# ---- Hostile states ----

NINES = b"9" * 400


@pytest.mark.parametrize(
    "content",
    [
        b'{"log_history": [{"step": ' + NINES + b', "reward": 0.5}]}',
        b'{"log_history": [{"step": -1, "reward": 0.5}]}',
        b'{"log_history": ' + b"[" * 100_000,
        b'{"log_history": [{"step": ' + b"9" * 5000 + b"}]}",
    ],
    ids=["step of 400 digits", "negative step", "nested", "5000 digits"],
)
def test_a_hostile_state_is_a_value_error(tmp_path: Path, content):
    (tmp_path / "trainer_state.json").write_bytes(content)
    with pytest.raises(ValueError, match="trainer_state.json is damaged") as error:
        plot_run(tmp_path, tmp_path / "run.png")
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_values_that_no_picture_holds_are_left_out(tmp_path: Path, drawn):
    values = [NINES.decode(), "-" + NINES.decode(), "1e308", "1e400", "NaN", "[[1]]", '"x"', "true"]
    rows = [f'{{"step": {step}, "reward": {value}}}' for step, value in enumerate([*values, "0.5"])]
    (tmp_path / "trainer_state.json").write_text('{"log_history": [' + ",".join(rows) + "]}")
    plot_run(tmp_path, tmp_path / "run.png")
    assert points(drawn["Reward"].lines[0])[-1] == (8, 0.5) and len(drawn["Reward"].lines[0].get_xdata()) <= 2


@pytest.mark.filterwarnings("error")
def test_lone_surrogates_are_written_out(tmp_path: Path, drawn, capsys):
    """In names of metrics and of folders: a name that UTF-8 cannot hold must not end the report."""
    run = tmp_path / "r\udcffn"
    try:
        run.mkdir()
    except (OSError, UnicodeError):  # a file system that takes UTF-8 names only
        run = tmp_path
    row = {"step": 1, "reward": 0.5, "rewards/a\ud800/mean": 0.5, "rewards/b/mean": 0.1, "\udfff": 1.0}
    (run / "trainer_state.json").write_text(json.dumps({"log_history": [row, row | {"step": 2}]}))
    main([str(run), "--html"])
    assert "training reward a\\ud800" in capsys.readouterr().out
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "\\udfff" in page
    assert [text.get_text() for text in drawn["Reward by function"].get_legend().get_texts()] == ["a\\ud800", "b"]
    plot_run([row], tmp_path / "run.html", title="\ud800")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ([], "run has logged nothing yet"),
        ([{"step": 1, "loss": 0.1}], "run has 1 entries and nothing to draw; needed is at least one of: reward, "),
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


# ---- The command ----


def test_the_command_writes_both_and_leaves_pyplot_alone(tmp_path: Path):
    write_state(tmp_path / "run", HISTORY)
    code = """
import runpy, sys
import trl_lambda
assert "matplotlib" not in sys.modules
runpy.run_module("trl_lambda.report", run_name="__main__")
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "run"), "--html"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / "run" / "report.png").is_file() and (tmp_path / "run" / "report.html").is_file()
    assert "held-out mean length" in done.stdout and str(tmp_path / "run" / "report.html") in done.stdout


def test_the_command_writes_where_it_is_told(tmp_path: Path, capsys):
    write_state(tmp_path / "run", HISTORY)
    main([str(tmp_path / "run"), "--png", str(tmp_path / "a.png"), "--html", str(tmp_path / "b.html"), "--title", "x"])
    assert (tmp_path / "a.png").is_file() and "<h1>x</h1>" in (tmp_path / "b.html").read_text(encoding="utf-8")
    assert "report" not in capsys.readouterr().out


BAD_STATES = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[]",
    b'{"log_history": []}',
    b'{"log_history": [1]}',
    b'{"log_history": [{"a": 1}]}',
    b'{"log_history": [{"step": 1, "reward": "x"}]}',
]


@pytest.mark.parametrize("content", [None, *BAD_STATES])
def test_a_bad_folder_is_one_line_and_no_traceback(tmp_path: Path, content, capsys):
    if content is not None:
        (tmp_path / "trainer_state.json").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code.startswith("error: ") and "\n" not in stopped.value.code  # printed, and exit code 1
    assert capsys.readouterr().out == "" and not list(tmp_path.glob("*report*"))


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "nowhere")])
    assert stopped.value.code == (
        f"error: {str(tmp_path / 'nowhere')!r} is no folder; accepted: the output_dir of a run."
    )


# ---- The callback ----


def arguments(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(output_dir=str(folder), aggregation="lambda", token_regulation=None, length_scale=0.1)


def test_the_callback_writes_every_so_many_logs_and_at_the_end(tmp_path: Path, monkeypatch):
    written = []
    monkeypatch.setattr(run_report, "_write_report", lambda log, paths: written.append((len(log.history), log, paths)))
    callback, state, control = ReportCallback(every=3, html=True), TrainerState(), TrainerControl()
    for step in range(1, 8):
        state.log_history.append(entry(step))
        callback.on_log(arguments(tmp_path), state, control, logs=entry(step))
        callback.on_log(arguments(tmp_path), state, control, logs={"eval_reward": 1.0})  # not a log of training
    assert [logs for logs, _, _ in written] == [3, 6]
    callback.on_train_end(arguments(tmp_path), state, control)
    logs, log, paths = written[-1]
    assert logs == 7 and paths == [tmp_path / "report.png", tmp_path / "report.html"]
    assert log.title == f"{tmp_path.name}: aggregation=lambda, token_regulation=None"
    assert (log.aggregation, log.length_scale) == ("lambda", 0.1)
    state.is_world_process_zero = False
    callback.on_train_end(arguments(tmp_path), state, control)
    assert len(written) == 3


def test_the_callback_in_a_run(tmp_path: Path):
    batch = Batch()
    args = config(LambdaGRPOConfig, batch, max_steps=2, output_dir=str(tmp_path / "arm"))
    trainer = build(LambdaGRPOTrainer, args, batch, callbacks=[ReportCallback(every=2, html=True)])
    trainer.train()
    assert {path.name for path in (tmp_path / "arm").glob("*report*")} == {"report.png", "report.html"}
    page = (tmp_path / "arm" / "report.html").read_text(encoding="utf-8")
    assert "<h1>arm: aggregation=lambda, token_regulation=None</h1>" in page
    assert "Length weight f over the run&#x27;s lengths" in page


def test_a_picture_that_cannot_be_written_does_not_end_the_training(tmp_path: Path, caplog):
    (tmp_path / "file").write_text("")
    callback, state = ReportCallback(every=1), TrainerState()
    state.log_history.append(entry(1))
    for _ in range(2):
        callback.on_log(arguments(tmp_path / "file" / "folder"), state, TrainerControl(), logs=entry(1))
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("no report: ")


@pytest.mark.parametrize("every", [0, -1])
def test_every_is_checked(every):
    with pytest.raises(ValueError, match=f"every={every} must be >= 1"):
        ReportCallback(every=every)


def test_the_callback_needs_the_extra_before_training_begins(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "trl-lambda\[plots\]"'):
        ReportCallback()


def test_a_run_without_the_extras_trains_as_before(tmp_path: Path):
    """In a process of its own, in which matplotlib, tensorboard, trackio and wandb cannot be imported."""
    code = """
import sys
for name in ("matplotlib", "tensorboard", "trackio", "wandb"):
    sys.modules[name] = None
import offline
from support import train
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
result = train(LambdaGRPOTrainer, LambdaGRPOConfig, max_steps=2)
assert "advantage/length_correlation" in result.logs[0]
print(result.losses)
"""
    here = Path(__file__).parent
    environment = {"PYTHONPATH": f"{here / 'tools'}:{here.parent}", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
