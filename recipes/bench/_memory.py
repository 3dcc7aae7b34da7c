"""Peak memory of a process: of the CUDA allocator, or what the system says is resident."""

import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from ._rows import ROOT

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_KIB = 1024
# glibc keeps what was freed for later, and raises its threshold as it goes: resident memory then scatters by some
# percent between equal runs. With a fixed threshold it is what is in use.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def parse_status(text: str) -> dict[str, int]:
    """
    Bytes of every size in `/proc/<pid>/status`, such as `VmHWM` (peak resident) and `VmRSS` (resident).

    Raises:
        `ValueError`: a size is not in kB.
    """
    sizes = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.startswith(("Vm", "Rss")):
            number, unit = value.split()
            if unit != "kB":
                raise ValueError(f"{name} is given in {unit!r}, expected kB.")
            sizes[name] = int(number) * _KIB
    return sizes


def peak_bytes(device: str) -> int:
    """Most memory held so far (since `reset_peak`, where the system can)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if _STATUS.is_file():
        return parse_status(_STATUS.read_text(encoding="utf-8"))["VmHWM"]
    # ru_maxrss is in bytes on macOS and in KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else _KIB)


def held_bytes(device: str) -> int:
    """Memory held now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return parse_status(_STATUS.read_text(encoding="utf-8"))["VmRSS"] if _STATUS.is_file() else peak_bytes(device)


def reset_peak(device: str) -> None:
    """Begin a new peak; where the system cannot, the peak stays that of the whole process."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.is_file():
        try:
            _CLEAR.write_text("5")
        except OSError:
            pass  # a sandbox may forbid it


def available_bytes(device: str) -> int:
    """Memory that could be had now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = meminfo.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * _KIB for line in lines if line.startswith("MemAvailable"))


def limit_address_space(spare: int) -> None:
    """Let an allocation beyond `spare` more bytes fail in this process, before the system has to end one of many."""
    if _STATUS.is_file():
        now = parse_status(_STATUS.read_text(encoding="utf-8"))["VmSize"]
        resource.setrlimit(resource.RLIMIT_AS, (now + spare, resource.RLIM_INFINITY))


def run_child(module: str, arguments: list[str], timeout: float = 3600) -> dict:
    """
    Run `python -m module arguments`, a process of its own, and return the JSON object in its last line.

    Raises:
        `RuntimeError`: it printed none; the message has the end of what it said.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | _MALLOC | {"PYTHONHASHSEED": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])
