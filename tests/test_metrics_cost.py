"""`recipes/bench/metrics_cost.py`: the metrics really are on and off, and are a small part of the loss's work."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.bench.metrics_cost import make_loss, make_trainer, measure


class Traffic(TorchDispatchMode):
    """Counts operators and the bytes of their inputs and outputs: work that is the same on every machine."""

    def __init__(self):
        super().__init__()
        self.operators, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple) else (result,)
        self.operators += 1
        self.bytes += sum(x.nbytes for x in (*args, *outputs) if torch.is_tensor(x))
        return result


def test_the_cost_of_the_metrics_is_small(tmp_path):
    trainer = make_trainer(str(tmp_path))
    trainer.train()
    run = make_loss(trainer)
    run(True), run(False)  # the first one alone finds no gradient to add to
    traffic = {}
    for metrics in (True, False):
        with Traffic() as traffic[metrics]:
            run(metrics)
    extra = traffic[True].operators - traffic[False].operators
    assert 0 < extra < 0.2 * traffic[False].operators  # 121 of 1342
    assert 1 < traffic[True].bytes / traffic[False].bytes < 1.002  # 1.0002


def test_the_bench_times_both():
    result = measure(pairs=2)
    assert len(result) == 7 and all(map(math.isfinite, result.values()))
    assert min(result[name] for name in ("step", "loss with metrics", "loss without")) > 0
