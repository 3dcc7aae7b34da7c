"""
Train as each job says, with a real vLLM generating in this very process, and write down what it was given and gave.

    PYTHONPATH=.vllm torchrun --standalone --nproc_per_node 2 tests/support/vllm_worker.py JOBS.json FOLDER

A job is {"model": folder, "options": {...}}, and may have `"skip_syncs"`, the numbers of weight syncs to leave out,
from 0, and `"peft"`, options of `LoraConfig`.
"""

import functools

import offline  # noqa: F401
from datasets import Dataset
from harness import Batch, config, watch
from transformers import TrainerCallback
from trl.generation import vllm_generation
from worker import work

from recipes.playground.vllm_cpu import let_vllm_train_on_cpu
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

PROMPTS = ["A47+86=", "A12+35+71=", "A98+64+20+33="]


class Recording(LambdaGRPOTrainer):
    def __init__(self, *args, **kwargs):
        self.seen_losses = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.seen_losses.append(loss.item())
        return loss


class KeepPolicies(TrainerCallback):
    """The model's weights at the beginning of every optimizer step, before anything is generated for it."""

    def __init__(self):
        self.policies = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        named = getattr(model, "module", model).named_parameters()
        self.policies.append({name: value.detach().clone() for name, value in named})


def reward(completion_ids, **kwargs):
    """Any number that differs within a group: what is tested is the loss."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def record_generations(trainer, skip_syncs: list[int]) -> list[dict]:
    """A list that fills with what vLLM was asked and what it answered, before TRL pads or shuffles it."""
    generation, generations, syncs = trainer.vllm_generation, [], []
    generate, sync = generation.generate, generation.sync_weights

    def recorded(*args, prompts, **kwargs):
        outputs = generate(*args, prompts=prompts, **kwargs)
        completions, logprobs = outputs[1], [[token[0] for token in row] for row in outputs[2]]
        answer = {"step": trainer.state.global_step, "prompts": prompts, "completions": completions}
        generations.append(answer | {"sampled_logps": logprobs, "rewards": reward(completions)})
        return outputs

    def sync_unless_skipped():
        syncs.append(trainer.state.global_step)
        if len(syncs) - 1 not in skip_syncs:
            sync()

    generation.generate, generation.sync_weights = recorded, sync_unless_skipped
    return generations


def run_job(job: dict) -> dict:
    batch = Batch(lengths=[[1] * 4 for _ in PROMPTS])  # for its shape alone: the completions are vLLM's
    args = config(LambdaGRPOConfig, batch, use_vllm=True, vllm_mode="colocate", **job["options"])
    peft_config = None
    if "peft" in job:
        from peft import LoraConfig

        peft_config = LoraConfig(**job["peft"])
    dataset = Dataset.from_dict({"prompt": PROMPTS * 8})
    trainer = Recording(job["model"], reward, args, dataset, peft_config=peft_config)
    run, keep = watch(trainer), KeepPolicies()
    trainer.add_callback(keep)
    generations = record_generations(trainer, job.get("skip_syncs", []))
    trainer.train()
    done = {name: getattr(run, name) for name in ("losses", "grads", "lambda_grads", "lambdas")}
    return done | {"generations": generations, "policies": keep.policies, "history": trainer.state.log_history}


if __name__ == "__main__":
    let_vllm_train_on_cpu()
    # One engine for all jobs of a model: each trainer's first sync replaces all of its weights.
    vllm_generation.LLM = functools.cache(vllm_generation.LLM)
    work(run_job)
