"""
What the diagnostics cost: loss and backward pass on the playground with metrics on and off, in pairs in one process.

    python -m recipes.bench.metrics_cost --pairs 60

One generation batch of 64 completions is sampled once. Each pair runs the same loss, its backward pass and the
reduction for a log twice, with the metrics and without, in an order that alternates. The difference is set against a
whole step, which also samples and steps the optimizer and is timed first.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import load_dataset

from recipes.playground.rewards import exact_answer
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

PLAYGROUND = Path(__file__).resolve().parent.parent / "playground"


class _NoTally:
    """Takes in nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: {}


def make_trainer(folder: str) -> LambdaGRPOTrainer:
    """The demo's trainer: λ and token weight on, 64 completions, logging every step."""
    args = LambdaGRPOConfig(
        folder,
        token_regulation="sigmoid",
        per_device_train_batch_size=64,
        max_completion_length=48,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-4,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    dataset = load_dataset(str(PLAYGROUND / "data" / "running_sum"), split="train")
    return LambdaGRPOTrainer(str(PLAYGROUND / "base_model"), exact_answer, args, dataset)


def make_loss(trainer: LambdaGRPOTrainer) -> Callable[[bool], None]:
    """
    Loss, backward pass and the reduction for a log on the batch that a trainer has trained on last.

    Args:
        trainer (`LambdaGRPOTrainer`): after `train()`.

    Returns:
        `Callable`: does it, with or without the metrics as its argument says.
    """
    trainer.model.train()
    inputs = trainer._buffered_inputs[0]
    on, off = trainer._tally, {"train": _NoTally(), "eval": _NoTally()}

    def run(metrics: bool) -> None:
        trainer._tally, trainer.args.token_metrics = (on, True) if metrics else (off, False)
        trainer.compute_loss(trainer.model, inputs).backward()
        trainer.reduce_metrics("train")

    return run


def measure(pairs: int) -> dict[str, float]:
    """
    Time `pairs` pairs.

    Returns:
        `dict[str, float]`: medians in seconds of a whole step, of the loss with and without metrics and of their
        difference within a pair, the quartiles of that difference, and the difference as a part of a step.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder)
        trainer.train()
        step = statistics.median(e["step_time"] for e in trainer.state.log_history[1:] if "step_time" in e)
        run = make_loss(trainer)

        run(True), run(False)
        times: dict[bool, list[float]] = {True: [], False: []}
        for pair in range(pairs):
            for metrics in (True, False) if pair % 2 else (False, True):
                start = time.perf_counter()
                run(metrics)
                times[metrics].append(time.perf_counter() - start)
    differences = [a - b for a, b in zip(times[True], times[False], strict=True)]
    low, middle, high = statistics.quantiles(differences, n=4)
    return {
        "step": step,
        "loss with metrics": statistics.median(times[True]),
        "loss without": statistics.median(times[False]),
        "difference": middle,
        "difference, lower quartile": low,
        "difference, upper quartile": high,
        "part of a step": middle / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, value in measure(args.pairs).items():
        print(f"{name:<28} {value:.2%}" if name == "part of a step" else f"{name:<28} {value * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
