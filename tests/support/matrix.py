"""
The equivalence matrix: the same rows, cut differently, give the same loss, gradient, dL/dλ and λ.

    python tests/support/matrix.py                 # everything; prints the table
    python tests/support/matrix.py --write docs/verification.md

Three groups of four, old log-probabilities off the current ones so that clips act. Every cut must agree with the whole
batch in one micro-batch. Where a generation batch feeds two optimizer steps, or a step takes two generation batches,
the mean over them is compared. λ is compared where a cut makes one optimizer step of the whole batch. A regression
counts generation batches and a target optimizer steps: their λ is compared where a generation batch is one step.
"""

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
import warnings
from pathlib import Path

import offline  # noqa: F401
from launch import launch
from worker import run_job

TOLERANCE = 1e-9

# name -> (processes, micro-batch rows, gradient accumulation, steps_per_generation, num_iterations, optimizer steps)
CUTS = {
    "12 × 1": (1, 12, 1, 1, 1, 1),
    "6 × 2": (1, 6, 2, 2, 1, 1),
    "3 × 4": (1, 3, 4, 4, 1, 1),
    "1 × 12": (1, 1, 12, 12, 1, 1),
    "3 × 2, 4 micro-batches per generation": (1, 3, 2, 4, 1, 2),
    "6 × 4, 2 micro-batches per generation": (1, 6, 4, 2, 1, 1),
    "6 × 2, 2 iterations": (1, 6, 2, 2, 2, 2),
    "2 processes, 6 × 1": (2, 6, 1, 1, 1, 1),
    "2 processes, 3 × 2": (2, 3, 2, 2, 1, 1),
    "2 processes, 1 × 3, 6 per generation": (2, 1, 3, 6, 1, 2),
}
WHOLE = "12 × 1"

THREE, PROMPT = {"lambda_features": ["length", "mean_logp", "min_logp"]}, {"length_weight_scope": "prompt"}
TIED = {"drop_tied_groups": True}
F = {
    "lambda_grpo": {"lambda_init": 1.3},
    "lambda_grpo, prompt": {"lambda_init": 1.3} | PROMPT,
    "power": {"lambda_init": -0.6},
    "power, prompt": {"lambda_init": -0.6} | PROMPT,
    "grpo": {},
    "dapo": {},
    "dapo, prompt": PROMPT,
    "dr_grpo": {},
    "lambda_grpo, signed": {"lambda_side": "signed", "lambda_init": 1.3},
    "power, positive": {"lambda_side": "positive", "lambda_init": 0.8} | THREE,
    "power, negative, prompt": {"lambda_side": "negative", "lambda_init": -0.6} | PROMPT,
    "power, target": {"length_target": 4.0, "lambda_init": 0.5},
    "balanced, positive weight": {"positive_weight": 3.0},
    "dapo, tied groups dropped": TIED,
    "dapo, prompt, tied groups dropped": PROMPT | TIED,
}
F = {name: {"length_weight": name.split(",")[0]} | options for name, options in F.items()}
V = {
    "none": {},
    "tr_grpo": {"token_weight": "tr_grpo"},
    "ar": {"token_weight": "ar", "token_weight_kwargs": {"alpha": 0.6}},
    "tr_grpo inside": {"token_weight": "tr_grpo", "token_weight_inside_clip": True},
}
SURROGATES = ("dapo", "cispo", "sapo", "vespo")
TRL_LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo")


def arms(reduced: bool = False) -> dict[str, dict]:
    """name -> job without its cut: every f with every v and surrogate, and TRL's own losses."""
    result = {}
    for f, v, surrogate in itertools.product(F, V, SURROGATES):
        if (v != "tr_grpo inside" or surrogate == "dapo") and (not reduced or (f, v, surrogate) in REDUCED):
            options = F[f] | V[v] | {"loss_type": surrogate}
            result[f"{f} | {v} | {surrogate}"] = {"trainer": "lambda", "options": options}
    for loss_type in ("dapo", "bnpo") if reduced else TRL_LOSSES:
        result[f"TRL {loss_type} | – | –"] = {"trainer": "grpo", "options": {"loss_type": loss_type}}
    return result


REDUCED = {
    ("lambda_grpo", "tr_grpo", "dapo"),
    ("lambda_grpo, prompt", "none", "sapo"),
    ("power", "ar", "cispo"),
    ("grpo", "tr_grpo inside", "dapo"),
    ("lambda_grpo, signed", "none", "vespo"),
    ("power, positive", "tr_grpo", "dapo"),
    ("power, target", "none", "dapo"),
    ("balanced, positive weight", "none", "sapo"),
    ("dapo, tied groups dropped", "none", "sapo"),
}


def job(arm: dict, cut: str) -> dict:
    """`arm` under `cut`: SGD at learning rate 0 for the model, so that steps can be averaged; 0.1 for λ."""
    processes, rows, accumulation, per_generation, iterations, steps = CUTS[cut]
    options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation, "max_steps": steps}
    options |= {"steps_per_generation": per_generation, "num_iterations": iterations}
    own = dict(arm["options"])
    if steps > 1 and own.get("length_weight") in ("lambda_grpo", "power"):
        own["lambda_learning_rate"] = 1e-30  # λ stays, so that the steps are of one loss
    ties = {"batch": {"tied": [1]}} if own.get("drop_tied_groups") else {}
    return arm | {"options": own | options, "noise": 0.3, "build": {"double": True}, **ties}


def summary(ranks: list[dict], steps: int) -> dict:
    """Loss, gradient and dL/dλ of the whole batch: means over ranks (DDP has averaged gradients) and steps."""
    losses = sum(sum(rank["losses"]) for rank in ranks) / len(ranks) / steps
    grads = {name: sum(step[name] for step in ranks[0]["grads"]) / steps for name in ranks[0]["grads"][0]}
    learned = [g for g in ranks[0]["lambda_grads"] if g is not None]
    values = {tuple(rank["lambdas"]) for rank in ranks}
    lambda_grad, lam = sum(learned) / steps if learned else None, ranks[0]["lambdas"][-1] if steps == 1 else None
    assert len(values) == 1, "λ differs between ranks"
    return {"loss": losses, "grads": grads, "lambda_grad": lambda_grad, "lambda": lam}


def deviation(a: dict, b: dict) -> dict[str, float]:
    """Relative deviations of `a` from the whole batch `b`, each measured against the largest entry of its kind."""
    scale = max(g.abs().max().item() for g in b["grads"].values())
    result = {
        "loss": abs(a["loss"] - b["loss"]) / max(abs(b["loss"]), 0.1),
        "gradient": max((a["grads"][n] - g).abs().max().item() for n, g in b["grads"].items()) / scale,
    }
    if b["lambda_grad"] is not None:
        result["dL/dλ"] = abs(a["lambda_grad"] - b["lambda_grad"]) / max(abs(b["lambda_grad"]), 1e-2)
        if a["lambda"] is not None:
            result["λ"] = abs(a["lambda"] - b["lambda"]) / abs(b["lambda"])
    return result


def compares_lambda(arm: dict, cut: str) -> bool:
    _, _, accumulation, per_generation, iterations, _ = CUTS[cut]
    by_descent = not {"lambda_side", "length_target"} & arm["options"].keys()
    return by_descent or accumulation == per_generation * iterations


def run_matrix(reduced: bool = False, progress: bool = False) -> tuple[dict[tuple[str, str], dict[str, float]], int]:
    """(arm, cut) -> deviations from the whole batch, and the number of trainings run."""
    chosen = arms(reduced)
    cuts = [cut for cut in CUTS if not reduced or cut in (WHOLE, "3 × 4", "2 processes, 3 × 2")]
    results: dict[tuple[str, str], dict] = {}
    for count, (name, arm) in enumerate(chosen.items()):
        for cut in cuts:
            if CUTS[cut][0] == 1:
                with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                    warnings.simplefilter("ignore")
                    results[name, cut] = summary([run_job(job(arm, cut))], CUTS[cut][5])
        if progress:
            print(f"\r{count + 1}/{len(chosen)} arms on one process", end="", file=sys.stderr, flush=True)
    two = [cut for cut in cuts if CUTS[cut][0] == 2]
    with tempfile.TemporaryDirectory() as folder:
        for cut in two:
            if progress:
                print(f"\n{len(chosen)} arms: {cut}", end="", file=sys.stderr, flush=True)
            jobs = [job(arm, cut) for arm in chosen.values()]
            outputs = launch(jobs, Path(folder) / str(two.index(cut)), 2)
            for name, ranks in zip(chosen, outputs, strict=True):
                assert all(rank["wrapper"] == "DistributedDataParallel" for rank in ranks)
                results[name, cut] = summary(ranks, CUTS[cut][5])
    deviations = {key: deviation(value, results[key[0], WHOLE]) for key, value in results.items() if key[1] != WHOLE}
    for (name, cut), found in deviations.items():
        if not compares_lambda(chosen[name], cut):
            found.pop("dL/dλ"), found.pop("λ", None)
    return deviations, len(results)


def table(deviations: dict[tuple[str, str], dict[str, float]], trainings: int) -> str:
    """Markdown: one row per f, the largest deviation over v, surrogates and cuts; TRL's own losses below."""
    quantities = ("loss", "gradient", "dL/dλ", "λ")
    lines = [f"| f | v × surrogate × cut | {' | '.join(quantities)} |", "|---|---|" + "---|" * len(quantities)]
    for f in dict.fromkeys(name.split(" | ")[0] for name, _ in deviations):
        rows = [d for (name, _), d in deviations.items() if name.split(" | ")[0] == f]
        cells = []
        for quantity in quantities:
            values = [d[quantity] for d in rows if quantity in d]
            cells.append(f"{max(values):.1e}" if values else "–")
        lines.append(f"| {f} | {len(rows)} | {' | '.join(cells)} |")
    cuts = list(dict.fromkeys(cut for _, cut in deviations))
    lines += [
        "",
        f"Largest relative deviation from one micro-batch ({WHOLE}), float64; {trainings} trainings.",
        f"Cuts, as rows × accumulation: {'; '.join(cuts)}.",
        f"v: {', '.join(V)}. Surrogates: {', '.join(SURROGATES)}. Tolerance {TOLERANCE:.0e}.",
        "TRL's `bnpo` is a mean of micro-batch means and is not invariant by construction.",
    ]
    return "\n".join(lines)


def worst(deviations: dict) -> tuple[float, str]:
    """Largest deviation and where, over everything that is meant to be invariant."""
    return max(
        (value, f"{name}, {cut}, {quantity}")
        for (name, cut), quantities in deviations.items()
        if not name.startswith("TRL bnpo")
        for quantity, value in quantities.items()
    )


def run_seeds(seeds: int) -> tuple[float, str]:
    """The largest deviation over random batches: an arm cut in micro-batches, and a fixed member beside TRL's."""
    several = [name for name in arms(reduced=True) if not name.startswith("TRL")]
    largest = (0.0, "")
    for seed in range(seeds):
        name, member = several[seed % len(several)], ("grpo", "dr_grpo", "dapo")[seed % 3]
        arm, own = arms()[name], {"trainer": "lambda", "options": {"length_weight": member, "token_metrics": False}}
        trls = {"trainer": "grpo", "options": {"loss_type": member}}
        pairs = {name: (job(arm, "3 × 4"), job(arm, WHOLE))}
        pairs[f"TRL {member}"] = job(own, "3 × 4"), job(trls, "3 × 4")
        for label, (mine, theirs) in pairs.items():
            runs = [each | {"batch": each.get("batch", {}) | {"seed": seed}} for each in (mine, theirs)]
            found = deviation(*(summary([run_job(each)], CUTS["3 × 4"][-1]) for each in runs))
            largest = max(largest, *((value, f"{label}, seed {seed}, {kind}") for kind, value in found.items()))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", type=Path, help="file whose block between matrix markers is replaced")
    parser.add_argument("--reduced", action="store_true", help="the part that the tests run")
    parser.add_argument("--seeds", type=int, help="instead: so many random batches, the largest deviation")
    args = parser.parse_args()
    if args.seeds:
        largest, where = run_seeds(args.seeds)
        print(f"seeds: {args.seeds} random batches, largest deviation {largest:.1e} ({where})")
        sys.exit(largest > TOLERANCE)
    deviations, trainings = run_matrix(args.reduced, progress=True)
    text = table(deviations, trainings)
    print(text)
    if args.write:
        begin, end = "<!-- matrix: begin -->", "<!-- matrix: end -->"
        content = args.write.read_text(encoding="utf-8")
        head, rest = content.split(begin)
        args.write.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")
    largest, where = worst(deviations)
    comparisons = sum(len(quantities) for quantities in deviations.values())
    print(f"matrix: {comparisons} comparisons, largest deviation {largest:.1e} ({where}), tolerance {TOLERANCE:.0e}")
    sys.exit(largest > TOLERANCE)


if __name__ == "__main__":
    main()
