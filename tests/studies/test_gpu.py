"""`make gpu`: every line with the device set aside, its schedule, and what a bare machine is given."""

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser

from recipes.studies.cost import gpu, table
from recipes.studies.cost.gpu_parts import probe, smollm2
from recipes.studies.cost.gpu_parts.correctness import Deviation, OutOfBounds, check
from recipes.studies.cost.gpu_parts.schedule import Context, Part, run_part
from recipes.studies.cost.measure.rows import COLUMNS, append, read, row
from recipes.studies.cost.measure.trainers import BASELINE, measured_arms
from recipes.studies.shared.machine import ROOT


def test_every_line_runs_on_a_cpu_with_the_device_set_aside(tmp_path):
    out = tmp_path / "gpu.csv"
    command = [sys.executable, "-m", "recipes.studies.cost.gpu", "--tiny", "--out", str(out), "--minutes", "600"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = read(out)
    assert tuple(seen[0]) == COLUMNS and not [bad for bad in seen if bad["metric"] in ("failed", "stopped")]
    assert all(measured["hardware"] and measured["torch"] and measured["trl"] for measured in seen)
    parts = [measured["bench"] for measured in seen if measured["metric"] == "time of the part"]
    assert parts == [part.name for part in gpu.PARTS.values()]
    steps = [measured["arm"] for measured in seen if measured["metric"] == "time of the step"]
    assert steps == [name for part in gpu.PARTS.values() for name, _ in part.steps]
    cost = [m for m in seen if m["bench"] == "gpu b: cost" and (m["metric"], m["unit"]) == ("whole step", "ratio")]
    assert {measured["arm"] for measured in cost} == set(measured_arms()) - {BASELINE}
    assert {m["arm"] for m in seen if m["metric"] == "optimizer steps" and m["value"] == "2"} == set(smollm2.ARMS)
    text = table.gpu_markdown(out)
    assert "| lambda_grpo |" in text and "LoRA" in text and "nan" not in text


def test_the_command_says_that_there_is_no_gpu_and_fails_with_a_step(monkeypatch, tmp_path, capsys):
    def broken(given):
        raise RuntimeError("on purpose")
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no GPU is visible" in capsys.readouterr().err
    monkeypatch.setitem(gpu.PARTS, "cost", Part("part", 1, (("step", broken),)))
    assert gpu.main(["--tiny", "--parts", "cost", "--out", str(tmp_path / "gpu.csv")]) == 1
    assert "cost: step" in capsys.readouterr().err


def test_a_step_that_fails_and_a_part_out_of_time_leave_a_row_each(tmp_path):
    here, out = Context("cpu", True, tmp_path, tmp_path), tmp_path / "gpu.csv"

    def fine(given):
        yield [row("part", "arm", "", "first", 1.0, "s")]

    def broken(given):
        yield [row("part", "arm", "", "before", 1.0, "s")]
        raise RuntimeError("on\npurpose")

    def long(given):
        given.ends = time.monotonic()
        yield [row("part", "arm", "", "last", 1.0, "s")]

    steps = (("fine", fine), ("broken", broken), ("long", long), ("never", lambda given: pytest.fail("was begun")))
    assert run_part(Part("part", 1, steps), here, out) == ["broken"]
    seen = read(out)
    assert [measured["metric"] for measured in seen] == [
        *("first", "time of the step", "before", "failed", "time of the step", "last", "time of the step"),
        *("stopped", "time of the part"),
    ]
    value = {measured["metric"]: measured["value"] for measured in seen}
    assert value["failed"] == "RuntimeError: on purpose"
    assert value["stopped"] == "after 1 minutes, without the rest of long, never"


def test_a_deviation_beyond_its_bound_raises_and_a_launched_process_says_why_it_failed(tmp_path):
    for value in (2.0, math.nan):
        with pytest.raises(OutOfBounds, match="lambda_grpo, fp32, loss"):
            check([Deviation("lambda_grpo", "fp32", "loss", x, 1.0) for x in (0.5, value)])
    for engine in ("fsdp2", "zero3"):
        command = probe.launcher(engine, "cuda")
        assert command[1:3] == ["-m", "accelerate.commands.launch"]
        args = launch_command_parser().parse_args([*command[3:], "-m", "recipes.studies.cost.gpu_parts.probe"])
        assert Path(args.config_file).is_file() and args.num_processes == 1 and args.mixed_precision == "no"
    with pytest.raises(RuntimeError, match="KeyError"):
        probe.launch([{"arm": "no such arm", "workload": {}}], tmp_path, "cpu")


def test_the_tables_say_that_there_is_no_gpu_row_or_show_them(tmp_path):
    path = tmp_path / "gpu.csv"
    assert table.gpu_markdown(path) == "No GPU row yet: `make gpu` writes them.\n"
    readme = table.RESULTS.with_name("README.md").read_text(encoding="utf-8")
    assert f"<!-- gpu: begin -->\n{table.gpu_markdown(table.GPU_RESULTS)}<!-- gpu: end -->" in readme
    append(path, [row("gpu b: cost", BASELINE, "1.5b", "whole step", [900.0], "ms")], "cpu")
    append(path, [row("gpu b: cost", "lambda_grpo", "1.5b", "whole step", [1.002, 1.004], "ratio")], "cpu")
    text = table.gpu_markdown(path)
    assert "| lambda_grpo | 1.003 (1.002 – 1.004) | – |" in text and "`GRPOTrainer` takes 900 ms a step" in text
