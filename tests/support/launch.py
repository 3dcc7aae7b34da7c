"""Run `worker.py`, or another script like it, in processes of its own and read back what each rank wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
# Seconds after which a process counts as hung: far more than any takes, also on a busy core.
HANG = 3600


def launch(jobs: list[dict], folder: Path, processes: int, *, command=None, env=None, worker="worker.py"):
    """
    Run `jobs` in `worker` under torchrun (or `command`) and return, per job, the results of all ranks.

    The per-rank files are what counts: a gloo process can finish its work and still abort on its way out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    if command is None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (env or {})
    given = filter(None, [(env or {}).get("PYTHONPATH"), os.environ.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join([*given, str(HERE), str(HERE.parent.parent)])
    words = [*command, str(HERE / worker), str(folder / "jobs.json"), str(folder)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=HANG)
    results = read_results(folder, len(jobs), processes)
    missing = [name for name, result in results.items() if result is None]
    if missing:
        raise RuntimeError(f"no result of {missing}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return [[results[job, rank] for rank in range(processes)] for job in range(len(jobs))]


def read_results(folder: Path, jobs: int, processes: int) -> dict[tuple[int, int], dict | None]:
    """Result by (job, rank); `None` where a rank wrote none."""
    results = {}
    for job in range(jobs):
        for rank in range(processes):
            path = folder / f"job{job}-rank{rank}.pt"
            # Our own file, written a moment ago: optimizer state and logs are more than weights.
            results[job, rank] = torch.load(path, weights_only=False) if path.exists() else None
    return results
