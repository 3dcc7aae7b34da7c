"""Bytes that a trainer holds beyond TRL's: in its buffer, in the loss until backward, and at the step's peak."""

import torch
from torch.profiler import ProfilerActivity, profile

from ._arms import BASELINE
from ._rows import row
from ._shapes import Workload
from ._stepping import Stepper, stepping


def storage_bytes(tensors) -> dict[int, int]:
    """Address -> bytes of the distinct storages behind tensors: a view counts for what it keeps alive."""
    storages = (tensor.untyped_storage() for tensor in tensors if torch.is_tensor(tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def buffered_bytes(trainer) -> int:
    """Bytes of the generation batch that the trainer holds, cut into micro-batches."""
    return sum(storage_bytes(t for batch in trainer._buffered_inputs for t in batch.values()).values())


def loss_bytes(trainer) -> int:
    """Bytes kept for backward by the loss of one micro-batch, beyond parameters and inputs."""
    inputs = trainer._buffered_inputs[0]
    known = storage_bytes([*trainer.model.parameters(), *inputs.values()])
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.update({address: n for address, n in storage_bytes([tensor]).items() if address not in known})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model_wrapped, inputs)
    total = sum(kept.values())
    loss.backward()
    trainer.model.zero_grad()
    if getattr(trainer, "_lambda", None) is not None:
        trainer._lambda.finish_step()
    return total


def step_peak(stepper: Stepper) -> int:
    """
    Most bytes that tensors on the CPU take in one optimizer step: those held between steps, and, from the allocator's
    own record, those of the step. Unlike resident memory it is the same in every run, and counts what is allocated and
    never touched.
    """
    trainer = stepper.trainer
    moments = [value for slots in trainer.optimizer.optimizer.state.values() for value in slots.values()]
    held = sum(storage_bytes([*trainer.model.parameters(), *moments]).values()) + buffered_bytes(trainer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        stepper.step()
    records = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for record in sorted(records, key=lambda event: event.start_ns()):
        live += record.nbytes()
        peak = max(peak, live)
    return held + peak


def held_rows(bench: str, trainers: dict[str, object], workload: Workload) -> list[dict]:
    """
    Rows of the bytes held beyond the baseline's, per completion token of the generation batch (buffer) and of the
    micro-batch (loss), and, on a CPU, of the step's peak.
    """
    base, rows, setting = trainers[BASELINE], [], workload.describe()
    tokens = [int(batch["completion_mask"].sum()) for batch in base._buffered_inputs]
    before = buffered_bytes(base), loss_bytes(base)
    peaks = {}
    for arm, trainer in trainers.items():
        if workload.device == "cpu":
            with stepping(trainer) as stepper:
                stepper.step()  # warm: what is made once is not the step's
                peaks[arm] = step_peak(stepper)
            rows.append(row(bench, arm, setting, "peak of tensors", peaks[arm] / 2**20, "MiB"))
        if arm == BASELINE:
            continue
        buffer = (buffered_bytes(trainer) - before[0]) / sum(tokens)
        loss = (loss_bytes(trainer) - before[1]) / tokens[0]
        rows.append(row(bench, arm, setting, "held in the buffer beyond TRL's", buffer, "bytes/token"))
        rows.append(row(bench, arm, setting, "held for backward beyond TRL's", loss, "bytes/token"))
        if peaks:
            rows.append(row(bench, arm, setting, "peak of tensors", peaks[arm] / peaks[BASELINE], "ratio"))
    return rows
