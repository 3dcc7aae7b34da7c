"""
One training on a device in its own process: `python -m recipes.studies.cost.gpu_parts.probe JOBS.json RESULT.pt`.

A job names an arm, a dtype and perhaps more of the trainer's settings, the device and the engine. What comes back of
each: λ after every step, the weights at the end, and one more loss with its gradient.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from recipes.studies.cost.measure.rows import ROOT
from recipes.studies.cost.measure.trainers import build_trainer
from recipes.studies.cost.measure.workload import Workload

STEPS = 3


class Watch(TrainerCallback):
    """λ after every optimizer step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.lambdas = trainer, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        value = getattr(self.trainer, "lambda_value", None)
        if value is not None:
            self.lambdas.append(value)


def probe(job: dict[str, Any]) -> dict[str, Any]:
    """
    Train `STEPS` steps and take one more loss and its gradient.

    Args:
        job (`dict`): `arm`, `workload` (fields of `Workload`), `settings` of the trainer's configuration, `engine`.

    Returns:
        `dict[str, Any]`: `lambdas`, `weights` by name, `wrapper`, and those of `loss_and_gradient`, which an
        engine keeps where only it knows.
    """
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload(**job["workload"])
        settings = {"max_steps": STEPS, "logging_steps": 1, "learning_rate": 1e-3, "adam_epsilon": 1e-3}
        trainer = build_trainer(job["arm"], workload, folder, settings=settings | job.get("settings", {}), train=False)
        watch = Watch(trainer)
        trainer.add_callback(watch)
        trainer.train()
        result: dict[str, Any] = {"lambdas": watch.lambdas, "wrapper": type(trainer.model_wrapped).__name__}
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
        result["weights"] = {name: value.detach().cpu().float() for name, value in state.items()}
        if not job.get("engine"):
            result |= loss_and_gradient(trainer)
    return result


def loss_and_gradient(trainer: Any) -> dict[str, torch.Tensor]:
    """One loss on the trainer's first micro-batch, and its gradients in the model and in λ."""
    leaves = lambda_parameters(trainer)
    trainer.model.zero_grad()
    for leaf in leaves:
        leaf.grad = None
    loss = trainer.compute_loss(trainer.model_wrapped, trainer._buffered_inputs[0])
    loss.backward()
    parts = [p.grad.detach().cpu().float().flatten() for p in trainer.model.parameters() if p.grad is not None]
    lambda_parts = [p.grad.detach().cpu().float().flatten() for p in leaves if p.grad is not None]
    return {
        "loss": loss.detach().cpu().float().view(1),
        "gradient": torch.cat(parts),
        "lambda_gradient": torch.cat(lambda_parts) if lambda_parts else torch.zeros(0),
    }


def lambda_parameters(trainer: Any) -> list[torch.Tensor]:
    """λ as a parameter, where the trainer's own optimizer holds it."""
    return [p for group in trainer.optimizer.param_groups if group.get("name") == "lambda" for p in group["params"]]


def launch(jobs: list[dict[str, Any]], folder: Path, device: str, engine: str | None = None) -> list[dict[str, Any]]:
    """
    Run the jobs in a process of their own, under an engine if one is named.

    Args:
        jobs (`list[dict]`): for `probe`; an engine takes one.
        folder (`Path`): for files between the two processes.
        device (`str`): `"cpu"` hides every other device from the process.
        engine (`str`, *optional*): `"fsdp2"` or `"zero3"`.

    Raises:
        RuntimeError: if the process leaves no result; the message has the end of what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, result = folder / "jobs.json", folder / "result.pt"
    result.unlink(missing_ok=True)
    path.write_text(json.dumps([job | {"engine": engine} for job in jobs]), encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [*launcher(engine, device), "-m", "recipes.studies.cost.gpu_parts.probe", str(path), str(result)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    if not result.exists():
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}: {done.stderr[-400:]}")
    return torch.load(result)


def launcher(engine: str | None, device: str) -> list[str]:
    """How the process is started: accelerate with the recipes' own file for an engine, on one device."""
    if engine is None:
        return [sys.executable]
    if engine == "fsdp2" and device == "cpu":
        # Accelerate shards on no CPU: `shard_on_cpu` sees to it, and only a process group is needed.
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / "recipes" / "accelerate" / f"{engine}.yaml")),
        *("--num_processes", "1", "--mixed_precision", "no", "--main_process_port", "0"),
    ]


def shard_on_cpu() -> None:
    """
    Let accelerate shard where there is no accelerator: it leaves a CPU out of its FSDP branch, so that the engine is
    set on its state once that is made.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    make = AcceleratorState.__init__

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
            cpu_ram_efficient_loading=True,
            state_dict_type="FULL_STATE_DICT",
        )
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched


def main() -> None:
    """Do the jobs of a file and write what came of them."""
    jobs, result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    if jobs[0]["engine"] == "fsdp2" and jobs[0]["workload"]["device"] == "cpu":
        shard_on_cpu()
    seen = [probe(job) for job in jobs]
    torch.save(seen, result.with_suffix(".tmp"))
    result.with_suffix(".tmp").rename(result)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
