"""
Which weights point along the policy gradient at the base model? Question 6 of `PLAN.md`.

    python -m recipes.studies.smollm2.alignment [TASK ...]

Batches of the model's own replies are differentiated by the adapters' parameters, as `recipes/studies/alignment` does
for small models. One row per weight goes to `results/alignment.csv`. A task whose rows are there is not run again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.playground.smollm2 import model_path
from recipes.studies.alignment.batches import own_tokens
from recipes.studies.alignment.measure import measure
from recipes.studies.alignment.policy_gradient import Batch
from recipes.studies.alignment.weights import BASE, all_weights
from recipes.studies.shared.ledger import Ledger
from recipes.studies.shared.run import environment
from recipes.studies.smollm2.arms import find_arm
from recipes.studies.smollm2.run import GENERATIONS, LORA, PROMPTS, TASKS, questions
from recipes.studies.smollm2.study import RESULTS

KEY = ("task", "seed", "batches", "weight")
ARMS = (BASE, "softmax", "tr", "softmax_tr", "ar", "positive_weight_3", "positive", "positive3")
BATCHES, SEED, BUDGET = 16, 950, 24


def sample_batches(model: Any, tokenizer: Any, task: str, seed: int, count: int) -> list[Batch]:
    """Batches of `PROMPTS` × `GENERATIONS` replies to training questions, at temperature 1."""
    rows = questions(task, seed)["train"].select(range(count * PROMPTS))
    repeated = [i for i in range(len(rows)) for _ in range(GENERATIONS)]
    model.eval()
    batches = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in torch.tensor(repeated).split(PROMPTS * GENERATIONS):
            chosen = rows.select(part.tolist())
            prompts = tokenizer.apply_chat_template(
                list(chosen["prompt"]), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            with torch.autocast("cpu", torch.bfloat16):
                output = model.generate(**prompts, max_new_tokens=BUDGET, do_sample=True, top_k=0, top_p=1.0)
            tokens = output[:, prompts["input_ids"].size(1) :]
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            replies = [[{"role": "assistant", "content": text}] for text in texts]
            rewards = torch.tensor(TASKS[task][2](replies, metadata=list(chosen["metadata"])))
            inputs = {"prompt_ids": prompts["input_ids"], "prompt_mask": prompts["attention_mask"]}
            inputs["completion_ids"] = tokens
            own = own_tokens(tokens, tokenizer.eos_token_id)
            batches.append(Batch(inputs, own, rewards.view(-1, GENERATIONS)))
    return batches


def align(task: str, results: Path, seed: int = SEED, count: int = BATCHES, model_name: str | None = None) -> None:
    """Measure one task and append its rows, unless they are there."""
    ledger = Ledger(results / "alignment.csv", KEY)
    weights = all_weights({name: find_arm(name) for name in ARMS}, beside=False)
    key = {"task": task, "seed": seed, "batches": count}
    if ledger.done() >= {ledger.key_of({**key, "weight": weight.name}) for weight in weights}:
        return
    start = time.perf_counter()
    name = model_name or model_path()
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), LoraConfig(**LORA))
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    batches = sample_batches(model, tokenizer, task, seed, count)
    columns = measure(model, batches, weights=weights)
    for weight in weights:
        seconds = round(time.perf_counter() - start, 1)
        ledger.append({**key, "weight": weight.name, **columns[weight.name], "seconds": seconds, **environment()})


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    args = parser.parse_args()
    for task in args.tasks:
        align(task, args.results)


if __name__ == "__main__":
    main()
