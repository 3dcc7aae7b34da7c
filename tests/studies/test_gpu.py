"""`make gpu`: every line with the device set aside, its schedule, and what a bare machine is given."""

import csv
import importlib.metadata
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from recipes.studies.cost import gpu, table
from recipes.studies.cost.gpu_parts import correctness, probe, schedule, syncs
from recipes.studies.cost.gpu_parts.correctness import Deviation, OutOfBounds, check
from recipes.studies.cost.gpu_parts.schedule import Context, Part, run_part
from recipes.studies.cost.measure import clock, memory, rows
from recipes.studies.cost.measure.rows import COLUMNS, append, read, row
from recipes.studies.cost.measure.trainers import ARMS, BASELINE, measured_arms
from recipes.studies.shared import run
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.run import RunSpec

ROOT = Path(__file__).parent.parent


def context(folder: Path) -> Context:
    return Context("cpu", True, folder, folder)


# ---- All of it ----


def test_every_line_runs_on_a_cpu_with_the_device_set_aside(tmp_path):
    out = tmp_path / "gpu.csv"
    command = [sys.executable, "-m", "recipes.studies.cost.gpu", "--tiny", "--out", str(out), "--minutes", "600"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with open(out, newline="") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    seen = read(out)
    metrics = [(measured["bench"], measured["metric"]) for measured in seen]
    assert not [bad for bad in seen if bad["metric"] in ("failed", "stopped")]
    assert [bench for bench, metric in metrics if metric == "time of the part"] == [p.name for p in gpu.PARTS.values()]
    steps = [measured["arm"] for measured in seen if measured["metric"] == "time of the step"]
    assert steps == [name for part in gpu.PARTS.values() for name, _ in part.steps]
    assert all(measured["hardware"] and measured["torch"] and measured["trl"] for measured in seen)
    cost = [m for m in seen if m["bench"] == "gpu b: cost" and (m["metric"], m["unit"]) == ("whole step", "ratio")]
    assert {measured["arm"] for measured in cost} == set(measured_arms()) - {BASELINE}
    assert len({measured["setting"] for measured in cost}) == 2  # all weights, LoRA
    assert (tmp_path / "results_large" / "runs.csv").exists()
    text = table.gpu_markdown(out)
    assert "| lambda |" in text and "LoRA" in text and "nan" not in text and "takes – ms" not in text


# ---- The schedule ----


def test_a_step_that_fails_and_a_part_out_of_time_leave_a_row_each(tmp_path):
    here, out = context(tmp_path), tmp_path / "gpu.csv"

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


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no GPU is visible" in capsys.readouterr().err


def test_a_failed_step_is_the_commands_failure(monkeypatch, tmp_path, capsys):
    def broken(given):
        raise RuntimeError("on purpose")
        yield

    monkeypatch.setitem(gpu.PARTS, "cost", Part("part", 1, (("step", broken),)))
    assert gpu.main(["--tiny", "--parts", "cost", "--out", str(tmp_path / "gpu.csv")]) == 1
    assert "cost: step" in capsys.readouterr().err


def test_a_study_out_of_time_begins_no_run(tmp_path):
    specs = [RunSpec("main", "slippery_chain", "grpo", 0, 3e-4, 4)]
    assert study.execute(specs, Ledger(tmp_path / "runs.csv", study.KEY), 1, lambda: True) == 0
    assert not (tmp_path / "runs.csv").exists()


# ---- Correctness ----


@pytest.mark.parametrize("value", [2.0, math.nan])
def test_a_deviation_beyond_its_bound_raises(value):
    check([Deviation("lambda_grpo", "fp32", "loss", 0.5, 1.0)])
    with pytest.raises(OutOfBounds, match="lambda, fp32, loss"):
        check([Deviation("lambda_grpo", "fp32", "loss", 0.5, 1.0), Deviation("lambda_grpo", "fp32", "loss", value, 1.0)])


def test_deviations_are_relative_and_of_every_weight():
    side = {"lambdas": [0.1, 0.2], "weights": {"a": torch.ones(3), "b": torch.ones(1)}, "loss": torch.tensor([2.0])}
    side |= {"gradient": torch.ones(4), "lambda_gradient": torch.zeros(0)}
    other = side | {"loss": torch.tensor([2.2]), "weights": {"a": torch.ones(3), "b": torch.tensor([3.0])}}
    found = {d.metric: d.value for d in correctness.compared("lambda_grpo", "fp32", other, side, 1.0)}
    expected = {"loss": 0.1, "gradient": 0.0, "λ over steps": 0.0, "weights at the end": 1.0}
    assert found == pytest.approx(expected, abs=1e-6)


def test_waiting_is_an_error_in_the_packages_methods_alone():
    modes = ["default"]

    class Theirs:
        def outer(self):
            seen.append(("theirs", modes[-1]))
            self.hook()
            seen.append(("theirs again", modes[-1]))

        def hook(self):
            seen.append(("their hook", modes[-1]))

    class Ours(Theirs):
        def hook(self):
            seen.append(("ours", modes[-1]))
            super().hook()
            seen.append(("ours again", modes[-1]))

    Ours.hook.__module__ = "trl_lambda.somewhere"
    seen, trainer = [], Ours()
    trainer.accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()
    plain = vars(Ours)["hook"], vars(Theirs)["hook"]
    with syncs.errors_in_ours(trainer, lambda mode, device: modes.append(mode)) as entered:
        trainer.outer()
    assert seen == [
        *(("theirs", "default"), ("ours", "error"), ("their hook", "default"), ("ours again", "error")),
        ("theirs again", "default"),
    ]
    assert entered == {"hook": 1} and modes[-1] == "default"
    assert (vars(Ours)["hook"], vars(Theirs)["hook"]) == plain


def test_a_read_of_ours_in_the_loss_fails_the_step(monkeypatch, tmp_path):
    from trl_lambda import LambdaGRPOTrainer

    inner = LambdaGRPOTrainer.compute_loss

    def reading(self, *args, **kwargs):
        loss = inner(self, *args, **kwargs)
        loss.item()
        return loss

    monkeypatch.setattr(correctness, "measured_arms", lambda: [BASELINE, "lambda_grpo"])
    list(correctness.no_waiting(context(tmp_path)))
    monkeypatch.setattr(LambdaGRPOTrainer, "compute_loss", reading)
    with pytest.raises(OutOfBounds, match="device reads other than GRPOTrainer's"):
        list(correctness.no_waiting(context(tmp_path)))


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_accelerate_takes_the_command_of_an_engine(engine):
    command = probe.launcher(engine, "cuda")
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    args = launch_command_parser().parse_args([*command[3:], "-m", "recipes.studies.cost.gpu_parts.probe"])
    assert Path(args.config_file).is_file() and args.num_processes == 1 and args.mixed_precision == "no"
    assert args.module and args.training_script == "recipes.studies.cost.gpu_parts.probe"


def test_a_probe_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="KeyError"):
        probe.launch([{"arm": "no such arm", "workload": {}}], tmp_path, "cpu")


def test_what_only_a_device_runs(monkeypatch):
    """The branches that nothing on a CPU reaches, on a stand-in for `torch.cuda`."""
    called = []
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: called.append(name))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", called.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 17)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5, 9))
    assert memory.peak_during(lambda: called.append("run"), "cuda") == 7
    assert memory.available_bytes("cuda") == 5
    assert clock.now("cuda") <= clock.now("cuda")
    syncs.set_sync_mode("error", "cuda")
    schedule.free_memory("cuda")
    order = ["reset_peak_memory_stats", "run", "synchronize", "synchronize", "error", "empty_cache"]
    assert called == order


def test_a_machine_without_git_has_rows_too(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert rows.commit() == ""
    assert run.environment.__wrapped__()["commit"] == ""


# ---- Arms, tables, wheels ----


def test_arms_that_the_package_does_not_have_are_left_out(monkeypatch):
    arms = measured_arms()
    assert arms[:5] == [BASELINE, "GRPOTrainer again", "lambda_grpo", "tr_grpo", "unified"]
    assert not [arm for arm in arms if "token_metrics" in arm]
    assert "lambda, token_metrics=False" in measured_arms(token_metrics=False)
    monkeypatch.setitem(ARMS, "of tomorrow", (ARMS["lambda_grpo"][0], {"no_such_field": 1}))
    assert measured_arms() == arms


def test_the_tables_say_that_there_is_no_gpu_row_or_show_them(tmp_path):
    path = tmp_path / "gpu.csv"
    assert table.gpu_markdown(path) == "No GPU row yet: `make gpu` writes them.\n"
    readme = (ROOT / "recipes" / "bench" / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("<!-- gpu: begin -->\n")[2].partition("<!-- gpu: end -->")[0]
    assert shown == table.gpu_markdown(table.GPU_RESULTS)
    append(path, [row("gpu b: cost", BASELINE, "1.5b", "whole step", [900.0], "ms")], "cpu")
    append(path, [row("gpu b: cost", "lambda_grpo", "1.5b", "whole step", [1.002, 1.004], "ratio")], "cpu")
    append(path, [row("gpu a: correctness", "lambda_grpo", "fp32", "loss, bound 0.0001", 1e-6, "relative")], "cpu")
    text = table.gpu_markdown(path)
    assert "| lambda | 1.003 (1.002 – 1.004) | – |" in text and "`GRPOTrainer` takes 900 ms a step" in text
    assert "| lambda | fp32 | loss, bound 0.0001 | 1e-06 relative |" in text


def test_the_measured_memory_replaces_the_estimate(tmp_path):
    path, recipe, readme = tmp_path / "gpu.csv", tmp_path / "gsm8k.yaml", tmp_path / "README.md"
    recipe.write_text("# Memory:   about 11 GB, estimated: 3.1 GB weights,\n#           1 GB more\nseed: 0\n")
    readme.write_text("| `gsm8k.yaml` | GSM8K | one GPU | 11 GB | `x` |\n| `other.yaml` | a | b | 11 GB | `x` |\n")
    append(path, [row("gpu c: LoRA recipe", "lambda_grpo", "", "reserved by the allocator", 12.5, "GiB")], "cpu")
    with pytest.raises(ValueError, match="no GPU row"):
        table.write_recipe_memory(path, recipe, readme)
    path.write_text(path.read_text().replace(",cpu,", ",cuda,"))
    for _ in range(2):  # the second time over the first
        table.write_recipe_memory(path, recipe, readme)
        assert recipe.read_text().startswith("# Memory:   about 14 GB, measured on one ")
        assert recipe.read_text().endswith("in parts: 3.1 GB weights,\n#           1 GB more\nseed: 0\n")
        assert "| one GPU | 14 GB | `x` |" in readme.read_text() and "| b | 11 GB |" in readme.read_text()


def needs(names: list[str], seen: dict[str, str]) -> dict[str, str]:
    """What packages need on the bare machine, themselves included, by what is installed here."""
    machine = {"python_version": "3.12", "sys_platform": "linux", "platform_system": "Linux", "extra": ""}
    machine |= {"platform_machine": "x86_64", "os_name": "posix", "implementation_name": "cpython"}
    for name in map(canonicalize_name, names):
        if name not in seen:
            try:
                requirements = [Requirement(text) for text in importlib.metadata.requires(name) or []]
            except importlib.metadata.PackageNotFoundError:
                continue  # of a GPU alone
            seen[name] = importlib.metadata.version(name)
            needs([r.name for r in requirements if r.marker is None or r.marker.evaluate(machine)], seen)
    return seen


def test_the_wheels_are_what_the_bare_machine_lacks():
    there = needs(["torch", "transformers", "accelerate", "peft"], {})
    # `requests` and `packaging` are the package's own needs beside TRL and datasets.
    wanted = set(needs(["trl", "datasets", "requests", "packaging"], {})) - set(there)
    folder = ROOT / "recipes" / "bench"
    lines, lean = ((folder / f"gpu_wheels{name}.txt").read_text().splitlines() for name in ("", "_lean"))
    assert "-r gpu_wheels_lean.txt" in lines
    pinned = dict(line.split("==") for line in [*lines, *lean] if not line.startswith(("#", "-r")))
    assert set(pinned) == wanted
    there = needs(["pandas", "pyarrow", "requests"], there)
    assert {line.split("==")[0] for line in lean if not line.startswith("#")} == wanted - set(there)
    assert pinned["trl"] == importlib.metadata.version("trl")
    make = (ROOT / "Makefile").read_text()
    assert "--requirement recipes/studies/cost/gpu_wheels$(if $(LEAN),_lean).txt" in make and "--python-version 3.12" in make
    assert "--no-deps --only-binary=:all:" in make
