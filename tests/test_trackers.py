"""What reaches a user's trackers: metrics in their own files, and the table of completions with its weights."""

import json
import linecache
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import reference
import torch
from launch import HANG, launch
from support import LENGTHS, Batch, train
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer, TRGRPOConfig, TRGRPOTrainer
from trl_lambda.metrics.loss_tally import LossTally
from trl_lambda.report import plot_run, read_log_history

ON = {"lambda_init": 2.0, "token_regulation": "sigmoid", "lambda_learnable": False}
EXPECTED = {
    "length_weight/ess",
    "token_weight/at_max",
    "share/length_q4",
    "share/probability_q1",
    "advantage/length_correlation",
    "clipped/advantage_positive",
}
CUT = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}


def run(**options):
    return train(LambdaGRPOTrainer, LambdaGRPOConfig, **options)


# ---- The table of completions ----


def tables(folder) -> dict[int, pd.DataFrame]:
    files = sorted((folder / "completions").glob("*.parquet"))
    return {int(file.stem.removeprefix("completions_")): pd.read_parquet(file) for file in files}


def check_rows(table: pd.DataFrame, lam: float = 2.0) -> None:
    """Each row's weights are those of its own completion: TRL trains on them in another order."""
    batch, f = Batch(), sum(reference.length_weights(LENGTHS, lam, "lambda"), [])
    # Lengths alone tell most rows of `LENGTHS` apart; rewards tell them all.
    assert table["reward"].tolist() == pytest.approx(batch.rewards)
    assert table["length_weight"].tolist() == pytest.approx(f, rel=1e-5)


def test_rows_line_up_with_their_completions(tmp_path):
    run(output_dir=str(tmp_path), log_completions=True, max_steps=2, **ON, **CUT)
    written = tables(tmp_path)
    assert list(written) == [1, 2]
    for table in written.values():
        check_rows(table)


def test_rows_line_up_on_two_processes(tmp_path):
    options = {**ON, "log_completions": True, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    launch([{"trainer": "lambda", "options": {**options, "output_dir": str(tmp_path / "out")}}], tmp_path, processes=2)
    check_rows(tables(tmp_path / "out")[1])


def test_rows_whose_loss_is_not_computed_yet_have_their_weight(tmp_path):
    options = {**ON, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
    run(output_dir=str(tmp_path), log_completions=True, max_steps=4, **options)
    for table in tables(tmp_path).values():
        check_rows(table)


class EvaluateOnce(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step == 1


def test_an_evaluation_between_the_steps_of_a_generation_batch(tmp_path):
    """It pushes completions of training out of TRL's table, and their weights with them."""
    options = {**ON, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
    evaluation = {"eval_dataset": Batch().dataset(repeats=2).select(range(4)), "callbacks": [EvaluateOnce()]}
    options |= {"per_device_eval_batch_size": 8, "trainer_options": evaluation}  # two batches of two groups
    run(output_dir=str(tmp_path), log_completions=True, max_steps=2, **options)
    shown = [1, 0, 1]  # the table holds the last three groups
    expected = sum((reference.length_weights(LENGTHS, 2.0, "lambda")[group] for group in shown), [])
    for table in tables(tmp_path).values():
        assert table["length_weight"].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_weight_is_that_of_lambda_at_scoring(tmp_path):
    result = run(output_dir=str(tmp_path), log_completions=True, max_steps=2, lambda_learning_rate=50.0)
    first, second = tables(tmp_path).values()
    assert first["length_weight"].tolist() == pytest.approx([1.0] * 12)
    expected = sum(reference.length_weights(LENGTHS, result.lambdas[0], "lambda"), [])
    assert second["length_weight"].tolist() == pytest.approx(expected, rel=1e-4) and max(expected) > 1.05


def test_no_length_weight_no_column(tmp_path):
    train(TRGRPOTrainer, TRGRPOConfig, output_dir=str(tmp_path), log_completions=True, token_metrics=False)
    assert "length_weight" not in tables(tmp_path)[1]


# ---- No synchronisation of our own ----


class Syncs(TorchDispatchMode):
    """Where operations were called that make a host wait for its device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "equal")

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        indices = args[1] if name.startswith(("index", "_index")) and isinstance(args[1], (list, tuple)) else ()
        by_mask = any(torch.is_tensor(index) and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if (name in self.WAITS or by_mask) and not self.only_on_a_cpu():
            self.places.append(name)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def only_on_a_cpu() -> bool:
        """Whether `weights/` is looking at values, which it does on a CPU only."""
        frame = sys._getframe(2)
        while frame is not None and "trl_lambda/weights/" not in frame.f_code.co_filename:
            frame = frame.f_back
        line = "" if frame is None else linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        return 'device.type == "cpu"' in line or "if on_host" in line


def syncs_of(trainer_class, config_class, **options) -> Counter:
    """Synchronising operations inside `compute_loss`, over two steps of four micro-batches."""
    syncs = Syncs()

    class Watched(trainer_class):
        def compute_loss(self, *args, **kwargs):
            with syncs:
                return super().compute_loss(*args, **kwargs)

    Watched.__name__ = trainer_class.__name__
    train(Watched, config_class, max_steps=2, **CUT, **options)
    return Counter(syncs.places)


@pytest.mark.parametrize(
    "options",
    [{}, {"token_regulation": "sigmoid", "regulation_inside_clip": True, "log_completions": True}],
    ids=["f", "f and v inside the clip, with the table"],
)
def test_the_loss_waits_for_the_device_as_often_as_trls(options, tmp_path):
    theirs = syncs_of(GRPOTrainer, GRPOConfig, loss_type="dapo")
    assert sum(theirs.values()) > 8  # the watch does see TRL's own
    assert syncs_of(LambdaGRPOTrainer, LambdaGRPOConfig, output_dir=str(tmp_path), **options) == theirs


def test_one_transfer_per_log():
    """All sums and extremes of an interval leave the device together."""
    trainer, tally = run(max_steps=1).trainer, LossTally()
    tally.add_responses(torch.tensor([[3, 5]]), torch.tensor([[1.0, -1.0]]))
    tally.add_token_weights(torch.rand(2, 5) + 1, torch.ones(2, 5), (1.0, 1.4))
    tally.add_shares(torch.rand(2, 5), torch.tensor([0, 3]), -torch.rand(2, 5), torch.ones(2, 5))
    calls, tolist = [], torch.Tensor.tolist
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda self: (calls.append(self.shape), tolist(self))[1])
        with Syncs() as syncs:
            assert len(tally.flush(trainer.accelerator)) > 10
    assert len(calls) == 1 and syncs.places == []


# ---- Trackers ----


def test_tensorboard(tmp_path):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is in the dev extra"
    )
    result = run(report_to="tensorboard", output_dir=str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1,
                 trainer_options={"eval_dataset": Batch().dataset()}, **ON)  # fmt: skip
    log = events.EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent)).Reload()
    assert {f"{split}/{name}" for name in EXPECTED for split in ("train", "eval")} <= set(log.Tags()["scalars"])
    for name in EXPECTED:
        logged = [event.value for event in log.Scalars(f"train/{name}")]
        assert logged == pytest.approx([entry[name] for entry in result.logs])


def test_a_run_is_drawn_from_its_event_files_alone(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is in the dev extra")
    result = run(report_to="tensorboard", output_dir=str(tmp_path), max_steps=3, eval_strategy="steps", eval_steps=3,
                 trainer_options={"eval_dataset": Batch().dataset()}, **ON)  # fmt: skip
    assert not (tmp_path / "trainer_state.json").exists()
    history = read_log_history(tmp_path)
    for entry in result.trainer.state.log_history:
        if "loss" not in entry and "eval_reward" not in entry:
            continue
        (read,) = (
            x for x in history if x["step"] == entry["step"] and ("eval_reward" in x) == ("eval_reward" in entry)
        )
        for name in EXPECTED & entry.keys():
            assert read[name] == pytest.approx(entry[name])
    assert plot_run(tmp_path, tmp_path / "report.png").is_file()


def test_damaged_event_files_are_one_clear_line(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is in the dev extra")
    (tmp_path / "events.out.tfevents.1.host.1.0").write_bytes(b"no event at all")
    with pytest.raises(ValueError, match="no event file") as error:
        plot_run(tmp_path, tmp_path / "report.png")
    assert "\n" not in str(error.value)


def test_trackio(tmp_path, monkeypatch):
    """Its own database, in a process of its own: trackio keeps its folder and its server from the first use on."""
    pytest.importorskip("trackio", reason="trackio is in the dev extra")
    code = """
import sys
import offline
from support import train
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
import json
result = train(LambdaGRPOTrainer, LambdaGRPOConfig, report_to="trackio", run_name="arm", project="test",
    max_steps=2, output_dir=sys.argv[1], log_completions=True, lambda_init=2.0, lambda_learnable=False,
    token_regulation="sigmoid")
print("LOGS", json.dumps(result.logs))
"""
    done = in_process(code, tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    logs = json.loads(done[done.index("LOGS") + 4 :].splitlines()[0])
    with sqlite3.connect(next((tmp_path / "trackio").glob("test*.db"))) as database:
        rows = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by step")]
    scalars = [row for row in rows if "train/loss" in row]
    assert len(scalars) == 2
    for row, log in zip(scalars, logs, strict=True):
        assert {name: row[f"train/{name}"] for name in EXPECTED} == {
            name: pytest.approx(log[name]) for name in EXPECTED
        }
    f = sum(reference.length_weights(LENGTHS, 2.0, "lambda"), [])
    for table in (row["completions"]["_value"] for row in rows if "completions" in row):
        assert [row["length_weight"] for row in table] == pytest.approx(f, rel=1e-5)
    assert any("completions" in row for row in rows)


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb", reason="wandb is no dependency of any extra")
    code = """
import sys
import offline
from support import train
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
train(LambdaGRPOTrainer, LambdaGRPOConfig, report_to="wandb", run_name="arm", max_steps=2, output_dir=sys.argv[1],
    log_completions=True, lambda_init=2.0, token_regulation="sigmoid")
"""
    in_process(code, tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    written = next(tmp_path.rglob("*.wandb")).read_bytes()
    for name in EXPECTED:
        assert f"train/{name}".encode() in written, name


def in_process(code: str, folder: Path, **environment: str) -> str:
    here = Path(__file__).parent
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(here / "tools"), str(here.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "out")],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths} | environment,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
