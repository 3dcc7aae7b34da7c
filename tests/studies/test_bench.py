"""`recipes/studies/cost/`: each bench runs in its smallest form, and what is counted rather than timed holds its bound."""

import csv
import sys
from collections import Counter

import pytest
import torch
from trl_lambda.preference.lambda_parameter import LambdaParameter
from trl_lambda.trl_seam.generation_batch import GenerationBatch

from recipes.studies.cost import head_memory, import_time, overhead, table, two_processes, weights_alone
from recipes.studies.cost.measure.counters import counting
from recipes.studies.cost.measure.memory import buffered_bytes, loss_bytes, peak_during, run_child, storage_bytes
from recipes.studies.cost.measure.rows import CIRCUMSTANCES, COLUMNS, append, quartiles, read, row
from recipes.studies.cost.measure.stepping import PHASES, REST, WHOLE, Stepper, time_pairs
from recipes.studies.cost.measure.traffic import count_parts
from recipes.studies.cost.measure.trainers import BASELINE, build_trainer
from recipes.studies.cost.measure.workload import MODELS, Workload
from trl_lambda.metrics.loss_metrics import LossMetrics, Surrogate
from trl_lambda.trl_seam.weighted_inputs import WeightedInputs

SMALL = Workload(rows=4, group=4, completion=8)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """One trainer of each kind on the same completions."""
    arms = (BASELINE, "lambda_grpo", "tr_grpo", "unified")
    return {arm: build_trainer(arm, SMALL, str(tmp_path_factory.mktemp("out"))) for arm in arms}


@pytest.fixture(scope="module")
def counts(trainers):
    return {arm: count_parts(trainer) for arm, trainer in trainers.items()}


def run_main(module, monkeypatch, path, *arguments) -> list[dict]:
    """Run a bench's command line in this process and return the rows that it appended."""
    monkeypatch.setattr(sys, "argv", [module.__name__, "--smoke", "--out", str(path), *arguments])
    module.main()
    return well_formed(path)


def well_formed(path) -> list[dict]:
    with open(path, newline="") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    rows = read(path)
    assert rows
    for measured in rows:
        assert None not in measured and None not in measured.values()
        assert all(measured[name] for name in ("bench", "arm", "setting", "metric", "value", *CIRCUMSTANCES[:-1]))
        if measured["unit"]:
            float(measured["value"])
        if measured["low"]:
            assert float(measured["low"]) <= float(measured["value"]) <= float(measured["high"])
            assert int(measured["pairs"]) >= 1
    return rows


# ---- What is counted ----


def test_the_counter_sees_each_kind_of_transfer():
    x = torch.arange(6.0)
    with counting() as counts:
        x.sum().item(), float(x[0]), bool(x[0] > 0), int(x[1])  # four reads
        x.tolist(), x.cpu(), x.numpy(), x.to("cpu")  # four more, of memory that is here already
        x[x > 2], x.nonzero(), torch.masked_select(x, x > 2)  # three whose shape the host waits for
        torch.tensor(1.0, device=x.device), torch.as_tensor([1, 2], device=x.device)  # two writes
        (x * 2 + 1).exp().sum(), x[torch.tensor([0, 1])], x.to(torch.float64)  # none
        torch.tensor(1.0), torch.as_tensor(x, device=x.device)
    assert counts.reads.total() == 11
    assert counts.writes.total() == 2
    assert {place[1] for place in counts.reads} == {"test_the_counter_sees_each_kind_of_transfer"}
    x.sum().item()
    assert counts.reads.total() == 11  # not beyond the block


def test_the_counter_leaves_out_what_an_optimizer_keeps_on_the_host():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], foreach=False)
    for _ in range(2):
        parameter.grad = torch.ones(3)
        with counting() as counts:
            optimizer.step()
        assert counts.reads.total() == 0


def test_the_counter_sees_the_accelerators_collectives(trainers):
    accelerator = trainers[BASELINE].accelerator
    with counting() as counts:
        accelerator.gather(torch.ones(5))
        accelerator.reduce(torch.ones(1), reduction="mean")
    assert counts.collectives == [("gather", 5), ("reduce", 1)]
    assert counts.calls == []  # one process: nothing goes out


@pytest.mark.parametrize("arm", ["lambda_grpo", "tr_grpo", "unified"])
def test_the_loss_waits_for_the_device_no_more_than_trls(counts, arm):
    mine, base = counts[arm]["loss"], counts[BASELINE]["loss"]
    assert mine.reads.total() - mine.argument_checks == base.reads.total()
    assert mine.writes.total() == base.writes.total()
    assert mine.collectives == base.collectives


def test_a_step_has_one_reduction_of_one_number_more(counts):
    base = counts[BASELINE]["step"].collectives
    assert counts["lambda_grpo"]["step"].collectives == counts["unified"]["step"].collectives == [*base, ("reduce", 1)]
    assert counts["tr_grpo"]["step"].collectives == base


@pytest.mark.parametrize("arm", ["lambda_grpo", "tr_grpo", "unified"])
def test_a_log_has_one_gather_more(counts, arm):
    step, logged = (counts[arm][part].collectives for part in ("step", "step with log"))
    assert [method for method, _ in logged] == [*(method for method, _ in step), "gather"]


@pytest.mark.parametrize("arm", ["lambda_grpo", "tr_grpo", "unified"])
def test_a_generation_batch_has_one_gather_more(counts, arm):
    mine, base = counts[arm]["generation"], counts[BASELINE]["generation"]
    (extra,) = (Counter(mine.collectives) - Counter(base.collectives)).elements()
    # A length and an advantage for each row, and its number of turns, as prepared completions come by `rollout_func`.
    assert extra == ("gather", 3 * SMALL.rows)
    assert mine.reads.total() == base.reads.total()
    assert mine.writes.total() == base.writes.total()


@pytest.mark.parametrize("arm", ["lambda_grpo", "tr_grpo", "unified"])
def test_off_the_cpu_the_weights_read_nothing(trainers, arm, monkeypatch):
    """On tensors without memory a read raises: the hooks in the loss get by without any, metrics among them."""
    trainer = trainers[arm]
    device = torch.device("meta")
    inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in trainer._buffered_inputs[0].items()}
    known = trainer._scoring.batches["train"]
    batch = GenerationBatch(known.lengths.to(device), known.advantages.to(device))
    monkeypatch.setitem(trainer._scoring.batches, "train", batch)
    monkeypatch.setattr(trainer, "_loss_metrics", LossMetrics(Surrogate.of(trainer.args), None))
    if trainer._lambda is not None:
        parameter = LambdaParameter(0.5, learnable=True, bounds=None, max_grad_norm=1.0, device=device)
        monkeypatch.setattr(trainer._response_weights, "_parameter", parameter)
    weighted = WeightedInputs(inputs)
    trainer._weigh(weighted, torch.empty(inputs["completion_ids"].shape, device=device))
    trainer._loss_metrics._count("train")  # what a log does before its one transfer
    assert weighted["advantages"].device == device
    with pytest.raises(RuntimeError, match="meta"):
        weighted["advantages"].sum().item()


# ---- What is held ----


def test_a_view_counts_for_the_storage_it_keeps():
    x = torch.zeros(4, 8)
    assert sum(storage_bytes([x, x[:1], x.view(-1), None, "text"]).values()) == 4 * 8 * 4
    assert sum(storage_bytes([torch.zeros(1).expand(100)]).values()) == 4


def test_the_buffer_holds_lengths_and_rows_more(trainers):
    rows = SMALL.rows
    more = buffered_bytes(trainers["lambda_grpo"]) - buffered_bytes(trainers[BASELINE])
    assert more == rows * 8  # row numbers; lengths and advantages are held once, beside the buffer


def test_the_peak_is_of_what_lives_at_the_same_time():
    mib = 2**20

    def run():
        one = torch.empty(4 * mib, dtype=torch.uint8)
        del one
        two, three = torch.empty(2 * mib, dtype=torch.uint8), torch.empty(3 * mib, dtype=torch.uint8)
        return two, three

    assert 5 * mib <= peak_during(run, "cpu") < 5.1 * mib


def test_a_loss_that_is_weighed_leaves_no_gradient(trainers):
    trainer = trainers["unified"]
    assert loss_bytes(trainer) > 0
    leaves = [*trainer.model.parameters(), *trainer.optimizer.param_groups[-1]["params"]]
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves)


def test_a_child_that_fails_says_why():
    with pytest.raises(RuntimeError, match="No module named"):
        run_child("recipes.studies.cost.no_such_bench", [])


# ---- Pairs and rows ----


def test_pairs_alternate_and_every_phase_is_timed(trainers):
    base, ours = (Stepper(trainers[arm]) for arm in (BASELINE, "lambda_grpo"))
    order = []
    for name, stepper in (("base", base), ("ours", ours)):
        stepper.run = lambda steps, name=name, run=stepper.run: (order.append(name), run(steps))
    taken = time_pairs(base, {"lambda_grpo": ours}, pairs=3, steps=2)["lambda_grpo"]
    assert order[2:] == ["ours", "base"] * 2 + ["base", "ours"] * 2 + ["ours", "base"] * 2
    for side in (0, 1):
        for seconds in (pair[side] for pair in taken):
            assert all(seconds[phase] > 0 for phase in (*PHASES, WHOLE))
            assert sum(seconds[phase] for phase in (*PHASES, REST)) == pytest.approx(seconds[WHOLE])


def test_rows_keep_median_and_quartiles(tmp_path):
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)
    path = tmp_path / "results.csv"
    append(path, [row("b", "a", "s", "m", [3.0, 1.0, 2.0], "ms")], "cpu")
    append(path, [row("b", "a", "s", "m", "does not fit", "")], "cpu")
    first, second = well_formed(path)
    assert (first["value"], first["low"], first["high"], first["pairs"]) == ("2", "1.5", "2.5", "3")
    assert (second["value"], second["low"], second["pairs"]) == ("does not fit", "", "")


# ---- Each bench in its smallest form ----


def test_overhead(monkeypatch, tmp_path, capsys):
    rows = run_main(overhead, monkeypatch, tmp_path / "results.csv", "--arms", "lambda_grpo", "--device", "cpu")
    metrics = {measured["metric"] for measured in rows if measured["arm"] == "lambda_grpo"}
    assert {"loss forward", "backward", "loss and backward", "optimizer", "whole step", "peak memory"} <= metrics
    text = table.markdown(tmp_path / "results.csv")
    assert "| lambda |" in text and "GRPOTrainer" in text
    assert "| nan" not in text


def test_the_shape_of_qwen_is_that_of_the_model():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        assert Qwen2ForCausalLM(Qwen2Config(**MODELS["qwen2.5-1.5b"])).num_parameters() == 1_543_714_304


def test_full_logits_are_the_same_loss(trainers):
    trainer = trainers[BASELINE]
    inputs = trainer._buffered_inputs[0]
    fused = trainer.compute_loss(trainer.model, inputs).item()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    kept = inputs["completion_ids"].size(1)
    own = inputs["completion_mask"].bool()
    expected = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, kept, compute_entropy=True)
    logits = head_memory.full_logits(trainer, trainer.model, ids, mask, kept)
    for mine, theirs in zip(logits[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine[own], theirs[own], rtol=1e-5, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        hook = lambda model, *a, **k: head_memory.full_logits(trainer, model, *a, **k)  # noqa: E731
        patch.setattr(trainer, "_get_per_token_logps_and_entropies", hook)
        assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(fused, rel=1e-5, abs=1e-7)


def test_head_memory(monkeypatch, tmp_path):
    rows = run_main(head_memory, monkeypatch, tmp_path / "results.csv", "--dtype", "float32", "--device", "cpu")
    assert float(rows[0]["value"]) > 0 and rows[0]["unit"] == "MiB"


def test_what_cannot_fit_is_said_and_not_tried(monkeypatch):
    monkeypatch.setattr(head_memory, "available_bytes", lambda device: 10**9)
    monkeypatch.setattr(head_memory, "run_child", lambda *a: pytest.fail("was tried"))
    rows = head_memory.measure(head_memory.FULL, Workload("head", dtype="float32"), "32k", 32768, repeats=1)
    assert rows[0]["value"] == "does not fit"
    assert rows[1]["value"] == pytest.approx(2 * 32768 * 151936 * 4 / 2**20)


def test_weights_alone(monkeypatch, tmp_path):
    rows = run_main(weights_alone, monkeypatch, tmp_path / "results.csv", "--no-compile", "--device", "cpu")
    beside = [float(r["value"]) for r in rows if r["metric"].startswith("bytes beside the floor")]
    assert beside and min(beside) >= 1


def test_bytes_of_operators_are_counted():
    x = torch.zeros(1000)
    assert weights_alone.eager_bytes(lambda x: x.exp(), x) == 8000
    assert weights_alone.eager_bytes(lambda x: (x.view(10, 100).exp() + x.view(10, 100)).view(-1), x) == 8000 + 12000


def test_gather_at_two_processes(monkeypatch, tmp_path):
    rows = run_main(two_processes, monkeypatch, tmp_path / "results.csv")
    value = {(r["arm"], r["metric"]): float(r["value"]) for r in rows}
    for part, more in (("loss", 0), ("step", 1), ("step with log", 2), ("generation", 1)):
        metric = f"{part}: calls of torch.distributed"
        assert value["lambda_grpo", metric] == value[BASELINE, metric] + more, part


def test_import_time(monkeypatch, tmp_path):
    rows = run_main(import_time, monkeypatch, tmp_path / "results.csv")
    value = {(r["arm"], r["metric"]): float(r["value"]) for r in rows}
    assert all(seconds > 0 for (_, metric), seconds in value.items() if metric != "modules")
    # Its own modules and nothing else: nothing heavy that TRL has not imported already.
    assert value["trl_lambda", "modules"] < 40


# ---- The table ----


def test_the_table_takes_the_last_figure_and_is_written_between_its_marks(monkeypatch, tmp_path):
    path, readme = tmp_path / "results.csv", tmp_path / "README.md"
    ratios = [row("overhead", "lambda_grpo", "tiny", "whole step", [value, value], "ratio") for value in (1.5, 1.01)]
    base = row("overhead", BASELINE, "tiny", "whole step", [300.0, 300.0], "ms")
    head = [
        row("head", "full logits", "2k", "peak of the loss", [2048.0], "MiB"),
        row("head", "full logits", "32k", "peak of the loss", "does not fit", ""),
        row("head", "lambda_grpo", "32k", "peak of the loss", [1024.0], "MiB"),
    ]
    append(path, [base, *ratios, *head], "cpu")
    readme.write_text("before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n")
    arguments = ["table", "--results", str(path), "--write", str(readme)]
    monkeypatch.setattr(sys, "argv", arguments)
    table.main()
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "1.010 (1.010 – 1.010)" in text and "1.500" not in text and "takes 300 ms" in text
    assert "| full logits | 2 | does not fit |" in text
    assert "| lambda | – | 1 |" in text
    table.main()
    assert readme.read_text() == text
    readme.write_text("no marks")
    with pytest.raises(SystemExit):
        table.main()
