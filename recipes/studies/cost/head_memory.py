"""
Peak memory of the loss against length: full logits, TRL's fused head, and λ and TR on that head.

    python -m recipes.studies.cost.head_memory  # a CPU, next to no model, 2k and 8k
    python -m recipes.studies.cost.head_memory --device cuda --shape qwen2.5-1.5b  # one GPU

Each figure is the peak of one loss and its backward pass over what was held before, in a process of its own, so that
one that takes too much ends alone. `full
logits` is the way of trainers that take (B, T, V) logits from the model, the log-probability of each chosen token from
a log-softmax of a row at a time, and the entropy without gradient. Where its logits and their gradient alone are more
than the memory there is, the row says so and how many bytes they are.
"""

import argparse
import dataclasses
import json
import tempfile
from typing import Any

import torch

from recipes.studies.cost.measure.memory import available_bytes, limit_address_space, peak_during, run_child
from recipes.studies.cost.measure.rows import append, bench_parser, row
from recipes.studies.cost.measure.trainers import ARMS, BASELINE, Completions, build_trainer
from recipes.studies.cost.measure.workload import MODELS, Workload

BENCH = "head"
FULL, ROWS = "full logits", 4
MEASURED = (FULL, BASELINE, "lambda_grpo", "tr_grpo", "unified")
LENGTHS = {"2k": 2048, "8k": 8192, "32k": 32768}


def full_logits(
    trainer: Any, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Log-probabilities and entropies of the completion from logits of every token, as the trainer's own hook."""
    kept = slice(-logits_to_keep - 1, -1)
    with trainer.accelerator.autocast():
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, kept]
    chosen = input_ids[:, -logits_to_keep:]
    logps, entropies = [], []
    for row_logits, row_chosen in zip(logits.unbind(), chosen.unbind(), strict=True):
        log_softmax = (row_logits / trainer.temperature).log_softmax(dim=-1)
        logps.append(log_softmax.gather(1, row_chosen.unsqueeze(1)).squeeze(1))
        with torch.no_grad():
            # A few hundred tokens at a time: the entropy is a metric here and should not set the peak.
            entropies.append(torch.cat([-(part.exp() * part).sum(dim=-1) for part in log_softmax.split(256)]))
    return torch.stack(logps).float(), torch.stack(entropies).float(), None


def least_bytes(shape: str, tokens: int, dtype: str) -> int:
    """What full logits need at the very least: themselves and their gradient."""
    return 2 * tokens * MODELS[shape]["vocab_size"] * getattr(torch, dtype).itemsize


def measure_here(arm: str, workload: Workload, tokens: int) -> dict[str, int]:
    """Peak bytes over what was held of one loss and its backward pass on `tokens` tokens."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(BASELINE if arm == FULL else arm, workload, folder)
    longer = dataclasses.replace(workload, completion=tokens // ROWS)
    longer_rows = Completions(longer, all_longest=True)
    trainer.rollout_func = longer_rows.rollout
    prompt = longer_rows.dataset()["prompt"][0]
    inputs = trainer._generate_and_score_completions([{"prompt": prompt}] * ROWS)
    if arm == FULL:
        trainer._get_per_token_logps_and_entropies = lambda model, *a, **k: full_logits(trainer, model, *a, **k)
    try:
        peak = peak_during(lambda: trainer.compute_loss(trainer.model_wrapped, inputs).backward(), workload.device)
    except (RuntimeError, MemoryError) as error:  # torch's CPU allocator raises a plain RuntimeError
        if "memory" not in str(error).lower():
            raise
        return {"peak": 0}
    return {"peak": peak}


def measure(arm: str, workload: Workload, length: str, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of one arm at one length."""
    vocabulary = MODELS[workload.shape]["vocab_size"]
    setting = f"{length} tokens, {workload.shape}, vocabulary {vocabulary}, {workload.dtype}"
    least = least_bytes(workload.shape, tokens, workload.dtype)
    too_much = [
        row(BENCH, arm, setting, "peak of the loss", "does not fit", ""),
        row(BENCH, arm, setting, "logits and their gradient", least / 2**20, "MiB"),
    ]
    if arm == FULL and least > 0.9 * available_bytes(workload.device):
        return too_much
    options = ["--workload", json.dumps(dataclasses.asdict(workload)), "--tokens", str(tokens), "--child", arm]
    options += ["--threads", str(torch.get_num_threads()), "--device", workload.device]
    seen = [run_child("recipes.studies.cost.head_memory", options) for _ in range(repeats)]
    if not all(one["peak"] for one in seen):
        return too_much
    return [row(BENCH, arm, setting, "peak of the loss", [one["peak"] / 2**20 for one in seen], "MiB")]


def main() -> None:
    """Measure every arm at every length and append the rows."""
    parser = bench_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=MODELS, default="head")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=["2k", "8k"])
    parser.add_argument("--repeats", type=int, default=1, help="processes of each figure, which hardly scatters")
    parser.add_argument("--child", choices=(FULL, *ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--workload", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.child:
        if args.device == "cpu":
            limit_address_space(available_bytes("cpu") * 9 // 10)
        print(json.dumps(measure_here(args.child, Workload(**json.loads(args.workload)), args.tokens)))
        return
    workload = Workload("tiny" if args.smoke else args.shape, rows=ROWS, group=ROWS, completion=8, dtype=args.dtype)
    workload = dataclasses.replace(workload, device=args.device, checkpointing=args.shape != "head" and not args.smoke)
    lengths = {"64": 64} if args.smoke else {name: LENGTHS[name] for name in args.lengths}
    for length, tokens in lengths.items():
        for arm in (FULL,) if args.smoke else MEASURED:
            rows = measure(arm, workload, length, tokens, 1 if args.smoke else args.repeats)
            append(args.out, rows, args.device)


if __name__ == "__main__":
    main()
