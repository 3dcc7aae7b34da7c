"""What the weights cost: each bench in its smallest form, and bounds on what is counted rather than timed."""

import math
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

from recipes.studies.cost import gpu, head_memory, import_time, overhead, table, two_processes, weights_alone
from recipes.studies.cost.gpu_parts import probe, smollm2
from recipes.studies.cost.gpu_parts.correctness import Deviation, OutOfBounds, check
from recipes.studies.cost.gpu_parts.schedule import Context, Part, run_part
from recipes.studies.cost.measure.counters import counting
from recipes.studies.cost.measure.memory import buffered_bytes, loss_bytes, run_child
from recipes.studies.cost.measure.rows import CIRCUMSTANCES, COLUMNS, append, quartiles, read, row
from recipes.studies.cost.measure.traffic import count_parts
from recipes.studies.cost.measure.trainers import BASELINE, build_trainer, measured_arms
from recipes.studies.cost.measure.workload import Workload
from recipes.studies.shared.machine import ROOT
from trl_lambda.generation_batch import GenerationBatch
from trl_lambda.lambda_parameter import Descent, LambdaParameter
from trl_lambda.metrics.loss_metrics import LossMetrics
from trl_lambda.trl_seam.weighted_inputs import WeightedInputs

SMALL = Workload(rows=4, group=4, completion=8)
WEIGHTED = ("lambda_grpo", "tr_grpo", "unified")


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    return {arm: build_trainer(arm, SMALL, str(tmp_path_factory.mktemp("out"))) for arm in (BASELINE, *WEIGHTED)}


@pytest.fixture(scope="module")
def counts(trainers):
    return {arm: count_parts(trainer) for arm, trainer in trainers.items()}


def well_formed(path) -> list[dict]:
    rows = read(path)
    assert rows and tuple(rows[0]) == COLUMNS
    for measured in rows:
        assert None not in measured and None not in measured.values()
        assert all(measured[name] for name in ("bench", "arm", "setting", "metric", "value", *CIRCUMSTANCES[:-1]))
        if measured["low"]:
            assert float(measured["low"]) <= float(measured["value"]) <= float(measured["high"])
    return rows


@pytest.fixture
def run_bench(monkeypatch, tmp_path):
    """Runs a bench's command line in this process and returns value by (arm, metric) of the rows that it appended."""

    def run(module, *arguments) -> dict[tuple[str, str], float]:
        monkeypatch.setattr(sys, "argv", [module.__name__, "--smoke", "--out", str(tmp_path / "x.csv"), *arguments])
        module.main()
        return {(row["arm"], row["metric"]): float(row["value"]) for row in well_formed(tmp_path / "x.csv")}

    return run


def test_the_counter_sees_each_kind_of_transfer():
    x = torch.arange(6.0)
    with counting() as counts:
        x.sum().item(), float(x[0]), bool(x[0] > 0), int(x[1])  # four reads
        x.tolist(), x.cpu(), x.numpy(), x.to("cpu")  # four more, of memory that is here already
        x[x > 2], x.nonzero(), torch.masked_select(x, x > 2)  # three whose shape the host waits for
        torch.tensor(1.0, device=x.device), torch.as_tensor([1, 2], device=x.device)  # two writes
        (x * 2 + 1).exp().sum(), x[torch.tensor([0, 1])], x.to(torch.float64)  # none
        torch.tensor(1.0), torch.as_tensor(x, device=x.device)
    x.sum().item()  # beyond the block
    assert counts.reads.total() == 11 and counts.writes.total() == 2
    assert {place[1] for place in counts.reads} == {"test_the_counter_sees_each_kind_of_transfer"}


@pytest.mark.parametrize("arm", WEIGHTED)
def test_loss_step_log_and_generation_cost_what_the_page_says(counts, arm):
    """No read, write or collective more in the loss; one number reduced a step; one gather a log and a batch."""
    mine, base = counts[arm], counts[BASELINE]
    assert mine["loss"].reads.total() - mine["loss"].argument_checks == base["loss"].reads.total()
    assert mine["loss"].writes.total() == base["loss"].writes.total()
    assert mine["loss"].collectives == base["loss"].collectives
    reduction = [] if arm == "tr_grpo" else [("reduce", 1)]
    assert mine["step"].collectives == [*base["step"].collectives, *reduction]
    methods = [[method for method, _ in mine[part].collectives] for part in ("step", "step with log")]
    assert methods[1] == [*methods[0], "gather"]
    ours, theirs = (Counter(method for method, _ in part["generation"].collectives) for part in (mine, base))
    assert ours - theirs == {"gather": 1}
    for kind in ("reads", "writes"):
        assert getattr(mine["generation"], kind).total() == getattr(base["generation"], kind).total()


def test_off_the_cpu_the_weights_read_nothing(trainers, monkeypatch):
    """On tensors without memory a read raises: the hooks in the loss get by without any, metrics among them."""
    trainer, device = trainers["unified"], torch.device("meta")
    inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in trainer._buffered_inputs[0].items()}
    known = trainer._scoring.batches["train"]
    tensors = (known.numbers, known.lengths, known.token_count, known.advantages)
    batch = GenerationBatch(*(tensor.to(device) for tensor in tensors))
    places = torch.zeros(SMALL.rows, dtype=torch.long, device=device)
    monkeypatch.setattr(trainer._scoring, "places_of", lambda inputs, mode: (batch, places))
    monkeypatch.setattr(trainer, "_observe", lambda *a: None)  # λ's learning looks at a batch on the host
    monkeypatch.setattr(trainer, "_loss_metrics", {"train": LossMetrics()})
    parameter = LambdaParameter(0.5, Descent("dapo"), bounds=None, device=device, features=("length",))
    monkeypatch.setattr(trainer, "_lambda", parameter)
    weighted = WeightedInputs(inputs, has_gradient=True)
    logps = torch.empty(inputs["completion_ids"].shape, device=device, requires_grad=True)
    trainer._weigh(weighted, logps, None)
    trainer._loss_metrics["train"].add_generation_batch(batch)
    trainer._loss_metrics["train"]._do_work()  # what a log does before its one transfer
    assert weighted["advantages"].device == device
    with pytest.raises(RuntimeError, match="meta"):
        weighted["advantages"].sum().item()


def test_the_buffer_holds_row_numbers_more_and_a_weighed_loss_leaves_no_gradient(trainers):
    more = buffered_bytes(trainers["lambda_grpo"]) - buffered_bytes(trainers[BASELINE])
    assert more == SMALL.rows * 8  # lengths and advantages are held once, beside the buffer
    trainer = trainers["unified"]
    assert loss_bytes(trainer) > 0
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in trainer.model.parameters())


def test_overhead(run_bench, tmp_path):
    metrics = {metric for arm, metric in run_bench(overhead, "--arms", "lambda_grpo", "--device", "cpu")}
    assert {"loss forward", "backward", "loss and backward", "optimizer", "whole step", "peak memory"} <= metrics
    text = table.markdown(tmp_path / "x.csv")
    assert "| lambda_grpo |" in text and "GRPOTrainer" in text and "| nan" not in text


def test_head_memory(run_bench, monkeypatch):
    assert min(run_bench(head_memory, "--dtype", "float32", "--device", "cpu").values()) > 0
    # What cannot fit is said and not tried.
    monkeypatch.setattr(head_memory, "available_bytes", lambda device: 10**9)
    monkeypatch.setattr(head_memory, "run_child", lambda *a: pytest.fail("was tried"))
    rows = head_memory.measure(head_memory.FULL, Workload("head", dtype="float32"), "32k", 32768, repeats=1)
    assert rows[0]["value"] == "does not fit" and rows[1]["value"] == pytest.approx(2 * 32768 * 151936 * 4 / 2**20)
    with pytest.raises(RuntimeError, match="No module named"):
        run_child("recipes.studies.cost.no_such_bench", [])


def test_weights_alone(run_bench):
    value = run_bench(weights_alone, "--no-compile", "--device", "cpu")
    assert min(value[key] for key in value if key[1].startswith("bytes beside the floor")) >= 1
    x = torch.zeros(1000)
    assert weights_alone.eager_bytes(lambda x: (x.view(10, 100).exp() + x.view(10, 100)).view(-1), x) == 8000 + 12000


def test_gather_at_two_processes(run_bench):
    value = run_bench(two_processes)
    for part, more in (("loss", 0), ("step", 1), ("step with log", 2), ("generation", 1)):
        metric = f"{part}: calls of torch.distributed"
        assert value["lambda_grpo", metric] == value[BASELINE, metric] + more, part


def test_import_time(run_bench):
    value = run_bench(import_time)
    assert value["trl_lambda", "modules"] < 40  # its own, and nothing heavy that TRL has not imported already


def test_rows_keep_median_and_quartiles_and_tables_the_last_of_equal_rows(tmp_path):
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0) and quartiles([7.0]) == (7.0, 7.0, 7.0)
    path = tmp_path / "results.csv"
    append(path, [row("overhead", BASELINE, "tiny", "whole step", [300.0], "ms")], "cpu")
    ratios = [row("overhead", "lambda_grpo", "tiny", "whole step", [value], "ratio") for value in (1.5, 1.01)]
    append(path, [*ratios, row("head", "full logits", "32k", "peak of the loss", "does not fit", "")], "cpu")
    well_formed(path)
    text = table.markdown(path)
    assert "1.010 (1.010 – 1.010)" in text and "1.500" not in text and "| full logits | does not fit |" in text
    page = table.RESULTS.with_name("README.md").read_text(encoding="utf-8")
    assert f"<!-- bench: begin -->\n{table.markdown()}<!-- bench: end -->" in page
    assert f"<!-- gpu: begin -->\n{table.gpu_markdown(table.GPU_RESULTS)}<!-- gpu: end -->" in page


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
    assert {m["arm"] for m in seen if m["metric"] == "optimizer steps" and m["value"] == "2"} == set(smollm2.MAIN)
    text = table.gpu_markdown(out)
    assert "| lambda_grpo |" in text and "LoRA" in text and "nan" not in text


def broken(given):
    yield [row("part", "arm", "", "before", 1.0, "s")]
    raise RuntimeError("on\npurpose")


def test_the_command_says_that_there_is_no_gpu_and_fails_with_a_step(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no GPU is visible" in capsys.readouterr().err
    monkeypatch.setitem(gpu.PARTS, "cost", Part("part", 1, (("step", broken),)))
    assert gpu.main(["--tiny", "--parts", "cost", "--out", str(tmp_path / "gpu.csv")]) == 1
    assert "cost: step" in capsys.readouterr().err


def test_a_step_that_fails_and_a_part_out_of_time_leave_a_row_each(tmp_path):
    here, out = Context("cpu", True, tmp_path, tmp_path), tmp_path / "gpu.csv"

    def long(given):
        given.ends = time.monotonic()
        yield [row("part", "arm", "", "last", 1.0, "s")]

    steps = (("broken", broken), ("long", long), ("never", lambda given: pytest.fail("was begun")))
    assert run_part(Part("part", 1, steps), here, out) == ["broken"]
    seen = read(out)
    metrics = "before, failed, time of the step, last, time of the step, stopped, time of the part"
    assert ", ".join(measured["metric"] for measured in seen) == metrics
    value = {measured["metric"]: measured["value"] for measured in seen}
    assert value["failed"] == "RuntimeError: on purpose"
    assert value["stopped"] == "after 1 minutes, without the rest of long, never"


def test_a_deviation_beyond_its_bound_raises_and_a_launched_process_says_why_it_failed(tmp_path):
    for value in (2.0, math.nan):
        with pytest.raises(OutOfBounds, match="lambda_grpo, fp32, loss"):
            check([Deviation("lambda_grpo", "fp32", "loss", x, 1.0) for x in (0.5, value)])
    with pytest.raises(RuntimeError, match="KeyError"):
        probe.launch([{"arm": "no such arm", "workload": {}}], tmp_path, "cpu")
