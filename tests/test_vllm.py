"""
Training on the completions of a real vLLM, on a CPU: `make vllm`.

vLLM changes its process (environment, threads, process groups), so that every training is in a process of its own
(`vllm_worker.py`), and this one never imports vLLM.
"""

import itertools
import json
import math
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import reference
import torch
from harness import build_model
from launch import HANG, launch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM
from vllm_expected import Weights, deviation, mean_difference, merge_adapter, own_model, step

from recipes.playground.vllm_cpu import ENVIRONMENT

ROOT = Path(__file__).parent.parent
BASE = ROOT / "recipes" / "playground" / "base_model"


def of_lengths(*member):
    return lambda lengths, advantages, lam: reference.length_weights(lengths, lam, *member)


def favoured(lengths, advantages, lam):
    return reference.favour_positive(reference.balanced_weights(lengths, advantages), lengths, advantages, 3.0)


def positive(lengths, advantages, lam):
    return reference.side_weights(lengths, advantages, [0.8], "power", "positive")


# f and v to be tested, as options and in plain loops. A row may be any function of the batch's lengths, advantages, λ.
SIDE = {"length_weight": "power", "lambda_side": "positive", "lambda_init": 0.8, "lambda_learnable": False}
PROMPT = {"length_weight": "power", "length_weight_scope": "prompt", "lambda_init": -0.5, "token_weight": "tr_grpo"}
MASKED = {"length_weight": "lambda_grpo", "lambda_init": 2.0, "mask_truncated_completions": True}
WEIGHTS = {
    "lambda_grpo": Weights({"length_weight": "lambda_grpo", "lambda_init": 0.7}, of_lengths("lambda_grpo")),
    "power and tr_grpo": Weights(PROMPT, of_lengths("power", "prompt"), {"regulation": "tr_grpo"}),
    "power, positive": Weights(SIDE, positive),
    "balanced, positive weight": Weights({"length_weight": "balanced", "positive_weight": 3.0}, favoured),
    "lambda_grpo, truncated masked": Weights(MASKED, of_lengths("lambda_grpo")),
}
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
SURROGATES = ["dapo", "cispo", "sapo", "vespo"]
CASES = [
    (name, mode, surrogate)
    for name, mode, surrogate in itertools.product(WEIGHTS, MODES, SURROGATES)
    if surrogate != "vespo" or mode.startswith("token")  # TRL refuses the others
]
# Of the ratio of model to sampler, by level: TRL's own, none and 3, would cut off nothing here.
BOUNDS = {"token": (0.9, 1.1), "sequence": (0.7, 1.4)}
# Twelve rows in two micro-batches, shuffled by TRL; every generation batch serves two optimizer steps.
OPTIONS = {
    **{"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 4},
    **{"max_completion_length": 16, "optim": "adamw_torch", "learning_rate": 2e-4},
}
# A generation batch for every optimizer step, with TRL's own choice of correction.
FOLLOWING = OPTIONS | WEIGHTS["lambda_grpo"].options | {"num_iterations": 1, "learning_rate": 2e-3}
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
JOBS = {"following": {"options": FOLLOWING}, "lora": {"options": FOLLOWING, "peft": LORA}}
# VESPO's φ = e^λ w^k e^(-λw) magnifies the rounding of a sum of log ratios: up to 1.0e-5 was seen, elsewhere 5e-6.
TOLERANCE = {"dapo": 1e-5, "cispo": 1e-5, "sapo": 1e-5, "vespo": 2e-5}


def is_installed() -> bool:
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


needs_vllm = pytest.mark.skipif(not is_installed(), reason="vLLM cannot be imported here: run `make vllm`")


def case_job(case: tuple[str, str, str]) -> dict:
    """The second sync is left out: the corrections of the second generation batch are far from 1."""
    name, mode, surrogate = case
    low, high = BOUNDS[mode.split("_")[0]]
    clip = {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}
    options = {"loss_type": surrogate, "vllm_importance_sampling_mode": mode, "seed": CASES.index(case), **clip}
    return {"options": OPTIONS | WEIGHTS[name].options | options, "skip_syncs": [1]}


def launch_vllm(jobs: list[dict], model_folder: Path, folder: Path, processes: int = 1) -> list[list[dict]]:
    command = [sys.executable] if processes == 1 else None
    jobs = [job | {"model": str(model_folder)} for job in jobs]
    return launch(jobs, folder, processes, command=command, env=ENVIRONMENT, worker="vllm_worker.py")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A tiny Qwen2 with tied embeddings: a sync that forgets the LM head would show."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    config = build_model(hidden=64, std=0.1).config  # heads of 32: vLLM's attention on a CPU takes no smaller ones
    config.vocab_size, config.tie_word_embeddings = len(tokenizer), True
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(model_folder, tmp_path_factory, request):
    """What every job did, with the cases of selected tests only; in one process and on one engine."""
    selected = {item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")}
    jobs = JOBS | {case: case_job(case) for case in CASES if case in selected}
    done = launch_vllm(list(jobs.values()), model_folder, tmp_path_factory.mktemp("results"))
    return {name: ranks[0] for name, ranks in zip(jobs, done, strict=True)}


@needs_vllm
def test_the_sampler_follows_the_model_after_every_optimizer_step(results, model_folder):
    result = results["following"]
    assert [generation["step"] for generation in result["generations"]] == [0, 1, 2, 3]
    models = [own_model(model_folder, policy) for policy in result["policies"]]
    for number, generation in enumerate(result["generations"]):
        assert mean_difference(models[number], generation) < 1e-5
        if number:  # and the step was large enough for the sync to matter
            assert mean_difference(models[number - 1], generation) > 1e-2


@needs_vllm
def test_the_sampler_follows_merged_adapters_and_lambda_learns(results, model_folder):
    result, lam = results["lora"], 0.7
    base = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    for number, (policy, generation) in enumerate(zip(result["policies"], result["generations"], strict=True)):
        merged = merge_adapter(base, policy, scale=16 / 4)
        assert mean_difference(own_model(model_folder, merged), generation) < 1e-5
        # The first merge adds nothing: B begins at zero.
        assert (mean_difference(own_model(model_folder, base), generation) > 1e-3) == (number > 0)
        options = {"mode": "sequence_mask", "bounds": (0, math.inf), "surrogate": "dapo"}
        theirs = step(model_folder, generation, merged, merged, lam, WEIGHTS["lambda_grpo"], **options)
        losses = result["losses"][2 * number : 2 * number + 2]
        assert abs(sum(losses) - theirs.loss) < TOLERANCE["dapo"] * theirs.loss_scale
        assert abs(result["lambda_grads"][number] - theirs.slope) < TOLERANCE["dapo"] * theirs.slope_scale
        lam = result["lambdas"][number]
    assert len({0.7, *result["lambdas"]}) == 5


def of_all_ranks(ranks: list[dict], number: int) -> dict:
    parts = [rank["generations"][number] for rank in ranks]
    rows = ("prompts", "completions", "sampled_logps", "rewards")
    return {key: list(itertools.chain(*(part[key] for part in parts))) for key in rows}


def assert_equals_reference(model_folder: Path, ranks: list[dict], case: tuple[str, str, str]) -> list[float]:
    """Every optimizer step, the first two with corrections near 1; the corrections of the last."""
    name, mode, surrogate = case
    weights, first = WEIGHTS[name], ranks[0]
    assert [generation["step"] for generation in first["generations"]] == [0, 2]
    losses = torch.tensor([rank["losses"] for rank in ranks]).view(len(ranks), 4, -1).sum(dim=2).mean(dim=0).tolist()
    lambdas = [weights.options.get("lambda_init"), *first["lambdas"]]
    if not weights.options.get("lambda_learnable", True):  # no gradient to compare
        lambdas = [None] * len(lambdas)
    options = {"mode": mode, "bounds": BOUNDS[mode.split("_")[0]], "surrogate": surrogate}
    tolerance = TOLERANCE[surrogate]
    slopes = first["lambda_grads"] or [None] * 4
    for number in range(4):
        old_policy, policy = first["policies"][2 * (number // 2)], first["policies"][number]
        generation = of_all_ranks(ranks, number // 2)
        theirs = step(model_folder, generation, old_policy, policy, lambdas[number], weights, **options)
        assert abs(losses[number] - theirs.loss) <= tolerance * theirs.loss_scale
        assert deviation(first["grads"][number], theirs.grads) < tolerance
        assert (slopes[number] is None) == (theirs.slope is None)
        if theirs.slope is not None:
            assert abs(slopes[number] - theirs.slope) <= tolerance * theirs.slope_scale
        furthest = max(abs(correction - 1) for correction in theirs.corrections)
        assert furthest > 0.05 if number > 1 else furthest < 1e-4
    return theirs.corrections


@needs_vllm
@pytest.mark.parametrize("case", CASES, ids=" · ".join)
def test_every_step_is_the_references(results, model_folder, case):
    corrections = assert_equals_reference(model_folder, [results[case]], case)
    if case[::2] == ("power and tr_grpo", "dapo"):  # the bounds of the correction bite on some
        bounds = (0.0, *BOUNDS[case[1].split("_")[0]])
        assert 0 < sum(correction in bounds for correction in corrections) < len(corrections)


@needs_vllm
@pytest.mark.parametrize("case", [("power and tr_grpo", "token_mask", "dapo")], ids=" · ".join)
def test_two_processes_keep_one_lambda_and_take_the_references_steps(model_folder, tmp_path, case):
    """Three rows at a time: the groups of four are spread over processes and micro-batches."""
    jobs = [case_job(case), JOBS["following"]]
    jobs = [job | {"options": job["options"] | {"per_device_train_batch_size": 3}} for job in jobs]
    stale, following = launch_vllm(jobs, model_folder, tmp_path, processes=2)
    for ranks in (stale, following):
        assert ranks[0]["lambdas"] == ranks[1]["lambdas"] and len(set(ranks[0]["lambdas"])) == 4
        for name, value in ranks[0]["policies"][-1].items():
            assert torch.equal(value, ranks[1]["policies"][-1][name])
    assert_equals_reference(model_folder, stale, case)
    for number, policy in enumerate(following[0]["policies"]):
        model = own_model(model_folder, policy)
        assert all(mean_difference(model, rank["generations"][number]) < 1e-5 for rank in following)


@needs_vllm
def test_the_playground_runs_with_vllm_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "recipes.playground.vllm_cpu", "--config", "recipes/configs/playground/demo.yaml"]
    command += ["--use_vllm", "--vllm_mode", "colocate", "--output_dir", str(tmp_path)]
    command += ["--max_steps", "3", "--plot", "false"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert "eval_reward" in history[0]
    steps = [entry for entry in history if "reward" in entry]
    assert len(steps) == 3 and len({entry["lambda/value"] for entry in steps}) == 3
    assert all(0 < entry["sampling/sampling_logp_difference/mean"] < 1e-5 for entry in steps)


def test_the_launcher_says_what_is_missing():
    code = "import sys; sys.modules['vllm'] = None; from recipes.playground.vllm_cpu import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "make .vllm/.installed" in done.stderr
