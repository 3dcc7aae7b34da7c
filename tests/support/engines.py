"""
λ under every engine: the same training on one process, DDP, FSDP2 and DeepSpeed ZeRO-2 and ZeRO-3, one and two ranks.

    python tests/support/engines.py              # needs deepspeed importable: `make engines` sees to that
    python tests/support/engines.py --only fsdp2
    python tests/support/engines.py --only optimizers   # λ beside 8-bit Adam, GaLore, APOLLO, LOMO and others

Each run asserts the wrapper class it ran under and is compared with the plain single-process run: losses, λ after
every step, model at the end. λ must be the same to the last bit on all ranks, and a run resumed in the same engine the
same to the last bit as one without a break. In another engine it is refused.
"""

import argparse
import importlib.util
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import offline  # noqa: F401
import torch
from launch import launch

# fp32 on other kernels, sums over two ranks, and ZeRO's own flattened Adam: λ and losses agree to rounding.
TOLERANCE = 2e-5

OPTIONS = {"lambda_init": 0.7, "lambda_learning_rate": 0.5, "token_weight": "tr_grpo", "lr_scheduler_type": "linear"}
OPTIONS |= {"max_grad_norm": 0.5, "max_steps": 3, "steps_per_generation": 2, "gradient_accumulation_steps": 2}
# At 1e-8 Adam turns the rounding of a gradient near 0 into a whole step.
OPTIONS |= {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-3}
JOB = {"trainer": "lambda", "noise": 0.2, "options": OPTIONS}


@dataclass
class Engine:
    """How to launch, and what must have wrapped the model."""

    wrapper: str
    processes: int
    own_optimizer: bool  # λ is in one, beside the engine's
    command: tuple[str, ...] | None = None
    job: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)


def zero(stage: int, processes: int) -> Engine:
    command = (
        f"-m accelerate.commands.launch --use_deepspeed --zero_stage {stage} --num_processes {processes} "
        "--num_machines 1 --mixed_precision no --dynamo_backend no --gradient_accumulation_steps 2 "
        "--zero3_save_16bit_model true --main_process_port 0"
    ).split()
    job, env = {"deepspeed": True}, {"DS_ACCELERATOR": "cpu"}
    return Engine("DeepSpeedEngine", processes, True, (sys.executable, *command), job, env)


ENGINES = {"ddp ×2": Engine("DistributedDataParallel", 2, False)}
for n in (1, 2):
    ENGINES[f"fsdp2 ×{n}"] = Engine("FSDPQwen2ForCausalLM", n, True, job={"engine": "fsdp2"})
    ENGINES |= {f"zero2 ×{n}": zero(2, n), f"zero3 ×{n}": zero(3, n)}


def make_job(processes: int, changes: dict, **options) -> dict:
    """Twelve rows per two micro-batches, whatever the number of ranks."""
    own = JOB["options"] | {"per_device_train_batch_size": 6 // processes} | options
    return JOB | {"options": own} | changes


def launch_engine(name: str, folder: Path, options: dict, env: dict | None = None, **changes) -> list[dict]:
    engine = ENGINES[name]
    job = make_job(engine.processes, engine.job, **options) | changes
    command = list(engine.command) if engine.command else None
    (ranks,) = launch([job], folder, engine.processes, command=command, env=engine.env | (env or {}))
    for rank in ranks:
        assert "error" in rank or rank["wrapper"] == engine.wrapper, f"{name} ran under {rank['wrapper']}"
    return ranks


def run_engine(name: str, folder: Path, single: dict) -> dict[str, float]:
    """Largest relative deviation of losses, λ and model from the single-process run."""
    ranks = launch_engine(name, folder, {})
    for rank in ranks:
        assert rank["own_optimizer"] == ENGINES[name].own_optimizer
        assert rank["lambdas"] == ranks[0]["lambdas"], f"{name}: λ differs between ranks"
    losses, expected = step_losses(ranks), step_losses([single])
    lambdas, true = torch.tensor(ranks[0]["lambdas"]), torch.tensor(single["lambdas"])
    model = {key.removeprefix("module."): value for key, value in ranks[0]["model"].items()}
    assert model.keys() == single["model"].keys()
    relative = lambda a, b: ((a - b).abs().max() / b.abs().max()).item()  # noqa: E731
    of_model = max(relative(model[key], value) for key, value in single["model"].items())
    return {"losses": relative(losses, expected), "λ": worst_of(lambdas, true), "model": of_model}


def worst_of(lambdas: torch.Tensor, true: torch.Tensor) -> float:
    return ((lambdas - true).abs() / true.abs()).max().item()


RESUMED = {
    "fsdp2 ×2": {"TEST_FSDP_STATE_DICT": "FULL_STATE_DICT"},
    "fsdp2 ×2, sharded checkpoint": {"TEST_FSDP_STATE_DICT": "SHARDED_STATE_DICT"},
    "zero2 ×2": {},
    "zero3 ×2": {},
}


def run_resume(name: str, folder: Path) -> int:
    """How many tensors of two runs, one resumed after two of four steps, were equal bit for bit."""
    engine, output = name.split(",")[0], str(folder / "output")
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "output_dir": output}
    through = launch_engine(engine, folder / "through", options, RESUMED[name])
    resumed = launch_engine(engine, folder / "resumed", options, RESUMED[name], resume=f"{output}/checkpoint-2")
    for mine, theirs in zip(resumed, through, strict=True):
        assert mine["lambdas"] == theirs["lambdas"][2:], f"{name}: λ differs after resuming"
        for kind in ("lambda_state", "model"):
            assert mine[kind].keys() == theirs[kind].keys()
            assert all(torch.equal(mine[kind][key], value) for key, value in theirs[kind].items()), f"{name}: {kind}"
    return len(resumed[0]["lambdas"]) + len(resumed[0]["lambda_state"]) + len(resumed[0]["model"])


# Engine of the checkpoint, engine that it must not be resumed in, and a part of what that one says.
REFUSED = (
    ("fsdp2 ×2", "ddp ×2", "to a new trainer"),
    ("ddp ×2", "fsdp2 ×2", "to a new trainer"),
    ("ddp ×2", "zero2 ×2", "valid checkpoint"),  # DeepSpeed's own words: it reads its files first
    ("zero3 ×2", "ddp ×2", "to a new trainer"),
)


def run_refusal(saved: str, other: str, remedy: str, folder: Path) -> None:
    """A checkpoint of one engine is refused in another, on every rank, and the error says what to do instead."""
    output = str(folder / "output")
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "output_dir": output}
    launch_engine(saved, folder / saved, options)
    for rank in launch_engine(other, folder / other, options, resume=f"{output}/checkpoint-1", is_refused=True):
        assert remedy in rank["error"], f"{saved} in {other}: {rank['error']}"


# name -> (options, whether λ gets an optimizer of its own)
OPTIMIZERS = {"adamw_8bit": ({}, False), "paged_adamw_8bit": ({}, False), "schedule_free_adamw": ({}, True)}
OPTIMIZERS["lomo"] = ({"max_grad_norm": 0.0}, True)
for name in ("galore_adamw", "galore_adamw_layerwise", "apollo_adamw"):
    OPTIMIZERS[name] = ({"optim_target_modules": ["mlp", "self_attn"]}, True)


def run_optimizers(folder: Path) -> dict[str, float]:
    """
    λ beside optimizers of other kinds takes the steps that it takes beside AdamW.

    The model's tensors are large enough (4096 elements) for 8-bit Adam to have 8-bit state, while λ's stays fp32. One
    micro-batch: layer-wise GaLore cannot accumulate.
    """
    model = {"build": {"hidden": 72, "std": 0.2}}
    one = {"gradient_accumulation_steps": 1, "steps_per_generation": 1, "per_device_train_batch_size": 12}
    jobs = [
        make_job(1, model, **one | {"optim": optim, "learning_rate": 0.0, "lr_scheduler_type": "constant"} | options)
        for optim, (options, _) in {"adamw_torch": ({}, False), **OPTIMIZERS}.items()
    ]
    exact, *others = [ranks[0] for ranks in launch(jobs, folder, 1, command=[sys.executable])]
    true, deviations = torch.tensor(exact["lambdas"]), {}
    for (optim, (_, own_optimizer)), result in zip(OPTIMIZERS.items(), others, strict=True):
        assert result["own_optimizer"] == own_optimizer, optim
        assert all(value.dtype == torch.float32 for value in result["lambda_state"].values() if torch.is_tensor(value))
        if "8bit" in optim:
            assert "torch.uint8" in result["state_dtypes"], f"{optim} has no 8-bit state"
        deviations[optim] = worst_of(torch.tensor(result["lambdas"]), true)
    return deviations


def step_losses(ranks: list[dict]) -> torch.Tensor:
    """Loss of each optimizer step: the sum over its two micro-batches, the mean over ranks."""
    losses = torch.tensor([rank["losses"] for rank in ranks], dtype=torch.float64)
    return losses.view(len(ranks), -1, 2).sum(dim=2).mean(dim=0)


def run_engines(names, folder: Path) -> dict[str, dict[str, float]]:
    ((single,),) = launch([make_job(1, {})], folder / "single", 1, command=[sys.executable])
    assert not single["own_optimizer"] and len(set(single["lambdas"])) == 3
    results = {}
    for number, name in enumerate(names):
        print(f"{name} …", file=sys.stderr, flush=True)
        results[name] = run_engine(name, folder / str(number), single)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", help="what has a name that begins with this; or `resume`, `refused` or `optimizers`")
    args = parser.parse_args()
    names = [name for name in ENGINES if not args.only or name.startswith(args.only)]
    if any(name.startswith("zero") for name in names) and importlib.util.find_spec("deepspeed") is None:
        sys.exit("deepspeed is not importable: run `make engines`, or choose others with --only")
    with tempfile.TemporaryDirectory() as folder:
        results, equal = run_engines(names, Path(folder)) if names else {}, 0
        for number, name in enumerate(RESUMED if not args.only or "resume".startswith(args.only) else ()):
            print(f"{name}, resumed …", file=sys.stderr, flush=True)
            equal += run_resume(name, Path(folder) / f"resume{number}")
        for number, names in enumerate(REFUSED if not args.only or "refused".startswith(args.only) else ()):
            print(f"{names[0]} resumed in {names[1]} …", file=sys.stderr, flush=True)
            run_refusal(*names, Path(folder) / f"refused{number}")
        if not args.only or "optimizers".startswith(args.only):
            print("optimizers …", file=sys.stderr, flush=True)
            for optim, value in run_optimizers(Path(folder) / "optimizers").items():
                results[f"{optim} ×1"] = {"λ": value}
    print("| engine | losses | λ | model |\n|---|---|---|---|")
    for name, quantities in results.items():
        cells = [f"{quantities[q]:.1e}" if q in quantities else "–" for q in ("losses", "λ", "model")]
        print(f"| {name} | {' | '.join(cells)} |")
    found = [(v, f"{n}, {q}") for n, quantities in results.items() for q, v in quantities.items()]
    largest, where = max(found, default=(0.0, "none"))
    if equal:
        print(f"resumed in the same engine: {equal} comparisons, all bit-equal")
    print(f"engines: {len(found)} comparisons, largest deviation {largest:.1e} ({where}), tolerance {TOLERANCE:.0e}")
    sys.exit(largest > TOLERANCE)


if __name__ == "__main__":
    main()
