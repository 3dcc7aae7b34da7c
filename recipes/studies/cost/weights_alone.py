"""
`trl_lambda.weights` alone: time and bytes moved from 10^3 to 10^8 tokens, beside the floor.

    python -m recipes.studies.cost.weights_alone                     # a CPU, eager and compiled
    python -m recipes.studies.cost.weights_alone --device cuda

The floor reads every input once and writes every output once; its time is that of copying input to output, which moves
just these bytes. Bytes moved are counted and not timed: eager, the inputs and outputs of every operator that touches
memory; compiled, what the compiler says its kernels read and write. Counted eagerly on an accelerator, they leave out
the look at the arguments' values, which only a CPU takes.
"""

import contextlib
import logging
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.studies.cost.measure.clock import seconds_of
from recipes.studies.cost.measure.rows import append, bench_parser, row
from trl_lambda.weights import length_weights, token_weights

BENCH = "weights"
Function = Callable[[torch.Tensor], torch.Tensor]
GROUP = 8
# Operators that make a view, and move nothing.
_VIEWS = {
    "view",
    "_unsafe_view",
    "expand",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
    "t",
    "transpose",
    "select",
    "slice",
}


def lengths_of(tokens: int, device: str) -> torch.Tensor:
    """Lengths of completions of a hundred tokens, (P, G): as many tokens have a hundredth as many lengths."""
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, tokens // (100 * GROUP)), GROUP)
    return torch.randint(1, 200, shape, generator=generator, dtype=torch.int32).to(device)


def logps_of(tokens: int, device: str) -> torch.Tensor:
    """Log-probabilities of as many tokens."""
    # On the meta device there is no generator; values do not matter there.
    if device == "meta":
        return torch.empty(tokens, device=device)
    return torch.rand(tokens, generator=torch.Generator(device).manual_seed(0), device=device).log()


def cases(device: str) -> dict[str, tuple[Function, Callable[[int, str], torch.Tensor]]]:
    """Name -> the function measured and what makes its input of a size."""
    lam = torch.full((1,), 0.5, device=device)
    return {
        "tr_grpo, per token": (lambda x: token_weights(x, token_weight="tr_grpo"), logps_of),
        "ar, per token": (lambda x: token_weights(x, token_weight="ar"), logps_of),
        "lambda_grpo, per completion": (lambda x: length_weights(x, lam, length_weight="lambda_grpo"), lengths_of),
    }


class _Bytes(TorchDispatchMode):
    """Adds up the inputs and outputs of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") not in _VIEWS:
            self.total += sum(x.numel() * x.element_size() for x in (*args, result) if torch.is_tensor(x))
        return result


def eager_bytes(function: Function, x: torch.Tensor) -> int:
    """Bytes that the eager operators read and write."""
    with torch.no_grad(), _Bytes() as moved:
        function(x)
    return moved.total


@contextlib.contextmanager
def compiler_counts_bytes() -> Iterator[Any]:
    """Let the compiler count the bytes of its kernels, which it does while its metrics are logged."""
    from torch._inductor import compile_fx, metrics

    logger = compile_fx.inductor_metrics_log
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    metrics.reset()
    try:
        yield metrics
    finally:
        logger.setLevel(level)
        logger.propagate = propagate


def compiled(function: Function, x: torch.Tensor) -> tuple[Function | None, int, str]:
    """
    The compiled function, the bytes that its kernels move for `x`, and one line that says why there is none.
    """
    import torch._inductor.config as settings

    torch._dynamo.reset()
    try:
        with settings.patch(force_disable_caches=True), compiler_counts_bytes() as metrics, torch.no_grad():
            fast = torch.compile(function, dynamic=False)
            fast(x)
            return fast, metrics.num_bytes_accessed, ""
    except Exception as error:  # a missing compiler shows in many ways
        return None, 0, f"torch.compile is unavailable: {type(error).__name__}"


def seconds(function: Function, x: torch.Tensor, repeats: int) -> list[float]:
    """Seconds of each call; calls that take microseconds are timed many at a time."""
    device = x.device.type
    with torch.no_grad():
        function(x)
        (once,) = seconds_of(lambda: function(x), 1, device)
        calls = max(1, min(1000, int(2e-3 / max(once, 1e-7))))
        return seconds_of(lambda: function(x), repeats, device, calls=calls)


def measure(name: str, tokens: int, device: str, repeats: int, compile_too: bool) -> list[dict[str, Any]]:
    """Rows of one function on as many tokens."""
    function, made = cases(device)[name]
    x, setting = made(tokens, device), f"1e{round(math.log10(tokens))} tokens"
    output = torch.empty(x.shape, device=device)
    floor_bytes = x.numel() * (x.element_size() + output.element_size())
    floor = seconds(lambda y: output.copy_(y), x, repeats)
    rows = [row(BENCH, f"{name}, floor", setting, "time", floor, "s")]
    rows.append(row(BENCH, f"{name}, floor", setting, "bytes moved", floor_bytes, "bytes"))
    ways: dict[str, tuple[Function | None, int, str]] = {"eager": (function, eager_bytes(function, x), "")}
    if compile_too:
        ways["compiled"] = compiled(function, x)
    for way, (called, moved, missing) in ways.items():
        arm = f"{name}, {way}"
        if called is None:
            rows.append(row(BENCH, arm, setting, "time", missing, ""))
            continue
        taken = seconds(called, x, repeats)
        rows.append(row(BENCH, arm, setting, "time", taken, "s"))
        beside = statistics.median(taken) / statistics.median(floor)
        rows.append(row(BENCH, arm, setting, "time beside the floor", beside, "ratio"))
        if moved:
            rows.append(row(BENCH, arm, setting, "bytes beside the floor", moved / floor_bytes, "ratio"))
    return rows


def accelerator_rows(name: str, function: Function, x: torch.Tensor) -> list[dict[str, Any]]:
    """Rows of the bytes that the eager operators move on an accelerator: counted on tensors without memory."""
    floor_bytes = x.numel() * (x.element_size() + 4)
    moved = eager_bytes(function, x) / floor_bytes
    return [row(BENCH, f"{name}, eager", "any", "bytes beside the floor, on an accelerator", moved, "ratio")]


def main() -> None:
    """Measure every size and append the rows."""
    parser = bench_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--largest", type=float, default=1e8, help="most tokens")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes = [10**3, 10**4] if args.smoke else [10**n for n in range(3, 9) if 10**n <= args.largest]
    repeats = 3 if args.smoke else args.repeats
    for name in cases(args.device):
        for tokens in sizes:
            append(args.out, measure(name, tokens, args.device, repeats, not args.no_compile), args.device)
    for name, (function, made) in cases("meta").items():
        append(args.out, accelerator_rows(name, function, made(10**6, "meta")), args.device)


if __name__ == "__main__":
    main()
