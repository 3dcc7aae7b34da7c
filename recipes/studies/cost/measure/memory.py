"""Bytes: what a trainer holds beyond TRL's, and the most that tensors take at a time."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from recipes.studies.cost.measure.rows import ROOT, row
from recipes.studies.cost.measure.stepping import stepping
from recipes.studies.cost.measure.trainers import BASELINE
from recipes.studies.cost.measure.workload import Workload


def storage_bytes(tensors: Iterable[Any]) -> dict[int, int]:
    """Address -> bytes of the distinct storages behind tensors: a view counts for what it keeps alive."""
    storages = (tensor.untyped_storage() for tensor in tensors if torch.is_tensor(tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def buffered_bytes(trainer: Any) -> int:
    """Bytes of the generation batch that the trainer holds, cut into micro-batches."""
    return sum(storage_bytes(t for batch in trainer._buffered_inputs for t in batch.values()).values())


def loss_bytes(trainer: Any) -> int:
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
    del loss
    return total


def peak_during(run: Callable[[], object], device: str) -> int:
    """
    Most bytes that tensors take while `run` runs, over those that are there before, by the allocator's own record.

    Unlike resident memory it is the same in every run, and counts what is allocated and never touched.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events: Any = profiled.profiler
    records = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for record in sorted(records, key=lambda event: event.start_ns()):
        live += record.nbytes()
        peak = max(peak, live)
    return peak


def step_peak(trainer: Any) -> int:
    """Peak memory of an optimizer step: what stays (weights, optimizer state, buffer), and `peak_during` the step."""
    with stepping(trainer) as stepper:
        stepper.step()  # warm: what is made once is not the step's
        moments = [value for slots in trainer.optimizer.optimizer.state.values() for value in slots.values()]
        held = sum(storage_bytes([*trainer.model.parameters(), *moments]).values()) + buffered_bytes(trainer)
        return held + peak_during(stepper.step, trainer.accelerator.device.type)


def memory_rows(bench: str, trainers: dict[str, Any], workload: Workload) -> list[dict[str, Any]]:
    """
    Rows of each step's peak, and of the bytes held beyond the baseline's, per completion token of the generation batch
    (buffer) and of the micro-batch (loss).
    """
    base, rows, setting = trainers[BASELINE], [], workload.describe()
    tokens = [int(batch["completion_mask"].sum()) for batch in base._buffered_inputs]
    buffered, kept = buffered_bytes(base), loss_bytes(base)
    peaks = {arm: step_peak(trainer) for arm, trainer in trainers.items()}
    for arm, trainer in trainers.items():
        rows.append(row(bench, arm, setting, "peak memory", peaks[arm] / 2**20, "MiB"))
        if arm == BASELINE:
            continue
        rows.append(row(bench, arm, setting, "peak memory", peaks[arm] / peaks[BASELINE], "ratio"))
        buffer, loss = (buffered_bytes(trainer) - buffered) / sum(tokens), (loss_bytes(trainer) - kept) / tokens[0]
        rows.append(row(bench, arm, setting, "held in the buffer beyond TRL's", buffer, "bytes/token"))
        rows.append(row(bench, arm, setting, "held for backward beyond TRL's", loss, "bytes/token"))
    return rows


def available_bytes(device: str) -> int:
    """Memory that could be had now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = meminfo.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def limit_address_space(spare: int) -> None:
    """Let an allocation beyond `spare` more bytes fail in this process, before the system has to end one of many."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        now = int(statm.read_text(encoding="utf-8").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + spare, resource.RLIM_INFINITY))


def run_child(module: str, arguments: list[str], timeout: float = 3600) -> dict[str, Any]:
    """
    Run `python -m module arguments`, a process of its own, and return the JSON object in its last line.

    Raises:
        `RuntimeError`: it printed none; the message has the end of what it said.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])
