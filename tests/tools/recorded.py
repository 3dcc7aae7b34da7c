"""
Every member × v × surrogate for five optimizer steps: losses, λ after each, a digest of the parameters at the end.

    python tests/tools/recorded.py --write tests/recorded_runs.json

The recording was made on the commit before the package was rebuilt into rooms, and holds that the rebuilding changed
no bit. Bits of a matrix product differ between processors: a run of TRL's own trainer is recorded too, and where that
one comes out otherwise, the rest is compared to rounding.
"""

import argparse
import contextlib
import io
import itertools
import json
import tempfile
import warnings
from pathlib import Path

import offline  # noqa: F401
from worker import run_job

F = {
    "lambda": {"aggregation": "lambda", "lambda_init": 0.8},
    "lambda, prompt": {"aggregation": "lambda", "lambda_init": 0.8, "aggregation_scope": "prompt"},
    "power": {"aggregation": "power", "lambda_init": -0.6},
    "power, prompt": {"aggregation": "power", "lambda_init": -0.6, "aggregation_scope": "prompt"},
    "grpo": {"aggregation": "grpo"},
    "dapo": {"aggregation": "dapo"},
    "dapo, prompt": {"aggregation": "dapo", "aggregation_scope": "prompt"},
    "dr_grpo": {"aggregation": "dr_grpo"},
    "TRL's": {"aggregation": None},
}
V = {
    "none": {},
    "sigmoid": {"token_regulation": "sigmoid"},
    "linear": {"token_regulation": "linear", "regulation_alpha": 0.6},
    "sigmoid inside": {"token_regulation": "sigmoid", "regulation_inside_clip": True},
}
SURROGATES = ("dapo", "cispo", "sapo", "vespo")
CONTROL = "TRL's trainer"


def cases() -> dict[str, dict]:
    """Name -> job of `run_job`."""
    options = {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "max_steps": 5,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1.0,
    }
    jobs = {CONTROL: {"trainer": "grpo", "noise": 0.2, "options": dict(options)}}
    for (f, length), (v, token), surrogate in itertools.product(F.items(), V.items(), SURROGATES):
        if v == "sigmoid inside" and surrogate != "dapo":
            continue
        learned = {"lambda_learning_rate": 0.5} if "lambda_init" in length else {}
        chosen = options | length | token | learned | {"loss_type": surrogate}
        jobs[f"{f} × {v} × {surrogate}"] = {"trainer": "lambda", "noise": 0.2, "options": chosen}
    return jobs


def record(job: dict) -> dict:
    """Train and return what is compared; floats as they are, so that JSON keeps every bit."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            job = job | {"options": job["options"] | {"output_dir": folder}}
            result = run_job(job)
    return {
        "losses": result["losses"],
        "lambdas": result["lambdas"],
        "parameters": [value.double().sum().item() for value in result["model"].values()],
        "squares": [value.double().square().sum().item() for value in result["model"].values()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--write", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    recorded = {name: record(job) for name, job in cases().items()}
    args.write.write_text(json.dumps(recorded, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(recorded)} runs -> {args.write}")


if __name__ == "__main__":
    main()
