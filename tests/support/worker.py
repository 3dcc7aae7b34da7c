"""
Run prepared trainings in this process, one of several ranks or not, and write what each did to a file per rank.

    torchrun --standalone --nproc_per_node 2 tests/support/worker.py JOBS.json FOLDER

JOBS.json is a list of {"trainer": "lambda" or "tr" or "grpo", "options": {...}} and what `run_job` reads besides. Jobs
with a "kill" (`kills.py`) come before all others; under torchrun there is only one, which ends every rank. A job with
`"engine": "fsdp2"` is the only one of its process; DeepSpeed comes from `accelerate launch`.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import offline  # noqa: F401
import torch
from harness import Batch, build, build_model, config, watch
from kills import kill_at
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer, TRGRPOConfig, TRGRPOTrainer
from trl_lambda.weights.weighing import import_path

CLASSES = {
    "lambda": (LambdaGRPOTrainer, LambdaGRPOConfig),
    "tr": (TRGRPOTrainer, TRGRPOConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
}


def use_fsdp2() -> None:
    """Let accelerate shard on a CPU: it leaves MULTI_CPU out of its FSDP branch, so the engine is set afterwards."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    make = AcceleratorState.__init__

    def patched(self, *args, **kwargs):
        make(self, *args, **kwargs)
        options = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False}
        options["state_dict_type"] = os.environ.get("TEST_FSDP_STATE_DICT", "FULL_STATE_DICT")
        options["transformer_cls_names_to_wrap"] = ["Qwen2DecoderLayer"]
        self.fsdp_plugin = FullyShardedDataParallelPlugin(**options)
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched


def log_on_rank_0(trainer) -> TrainerCallback:
    callback = TrainerCallback()
    callback.on_step_begin = lambda a, state, c, **_: trainer.log({"mine": 1}) if state.is_world_process_zero else None
    return callback


def not_finite_at(trainer_class: type, rank: int, step: int) -> type:
    """A trainer whose dL/dλ is NaN on one rank in one step."""

    class NotFinite(trainer_class):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.accelerator.process_index == rank and self.state.global_step == step:
                loss = loss + self._lambda.tensor.sum() * float("nan")
            return loss

    return NotFinite


def run_job(job: dict) -> dict:
    """Train as the job says; what it did, as plain lists and tensors."""
    trainer_class, config_class = CLASSES[job["trainer"]]
    batch = Batch(**job.get("batch", {}))
    trainer_options = dict(job.get("trainer_options", {}))
    if "peft" in trainer_options:
        from peft import LoraConfig

        trainer_options["peft_config"] = LoraConfig(**trainer_options.pop("peft"))
    for name in ("length_weight", "token_weight"):
        if name in job:
            trainer_options[name] = import_path(job[name], name)
    if job.get("eval"):
        trainer_options["eval_dataset"] = batch.dataset()
    model = job.get("model") or build_model(**job.get("build", {}))
    if job.get("own_optimizer"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=job["options"]["learning_rate"])
        trainer_options["optimizers"] = (optimizer, None)
    args = config(config_class, batch, **job["options"], **({"ddp_backend": "gloo"} if job.get("deepspeed") else {}))
    if "not_finite" in job:
        trainer_class = not_finite_at(trainer_class, **job["not_finite"])
    trainer = build(trainer_class, args, batch, model, noise=job.get("noise", 0.0), **trainer_options)
    if job.get("log_on_rank_0"):
        trainer.add_callback(log_on_rank_0(trainer))
    run = watch(trainer)
    if "kill" in job:
        kill_at(trainer, **job["kill"])
    try:
        trainer.train(resume_from_checkpoint=job.get("resume"))
    except ValueError as error:
        if not job.get("is_refused"):
            raise
        return {"error": str(error)}
    parameter, step = getattr(trainer, "_lambda", None), getattr(trainer, "_lambda_step", None)
    own_optimizer = step and step._own  # where an engine or the user owns the trainer's
    optimizer_state, states = None, {}
    if parameter is not None and parameter.learning.is_learnable:
        holder = own_optimizer or trainer.optimizer
        while hasattr(holder, "optimizer"):
            holder = holder.optimizer
        states = holder.state
        optimizer_state = dict(states[parameter.tensor])
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # whole on rank 0, maybe nothing elsewhere
    return {
        **{name: getattr(run, name) for name in ("losses", "grads", "lambda_grads", "lambdas")},
        "lambda_state": optimizer_state,
        "state_dtypes": {str(x.dtype) for slot in states.values() for x in slot.values() if torch.is_tensor(x)},
        "model": {name: value.clone() for name, value in (state or {}).items()},
        "wrapper": type(trainer.model_wrapped).__name__,
        "own_optimizer": own_optimizer is not None,
        "history": trainer.state.log_history,
    }


def exit_code(job: dict) -> dict:
    """Run a job that kills its process in a fork of this one, which has imported everything and trained nothing."""
    process = multiprocessing.get_context("fork").Process(target=run_job, args=(job,))
    process.start()
    process.join()
    return {"exit_code": process.exitcode}


def work(run) -> None:
    """Call `run` with each job of the file that the command line names, and write what it returns."""
    jobs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    rank = int(os.environ.get("RANK", "0"))
    if jobs[0].get("engine") == "fsdp2":
        use_fsdp2()
    for number, job in enumerate(jobs):
        is_alone = "WORLD_SIZE" not in os.environ  # a rank dies itself, and its launcher ends the others
        result = exit_code(job) if "kill" in job and is_alone else run(job)
        temporary = folder / f"job{number}-rank{rank}.tmp"
        torch.save(result, temporary)
        temporary.rename(folder / f"job{number}-rank{rank}.pt")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(run_job)
