"""What a step on vLLM's completions should be: plain loops over a model that neither TRL nor vLLM has touched."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import reference
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = 4


@dataclass(frozen=True)
class Weights:
    """Options of `LambdaGRPOConfig`; the same f, of nested lists (P, G), and options of v, for the reference."""

    options: dict
    length_weight: Callable[[list, list, float | None], list]  # lengths, advantages, λ
    token_weight: dict = field(default_factory=dict)


@dataclass
class Step:
    """One optimizer step on a whole generation batch; a scale is the sum of a sum's absolute terms."""

    loss: float
    loss_scale: float
    grads: dict[str, torch.Tensor]
    slope: float | None  # dL/dλ
    slope_scale: float
    corrections: list[float]  # of the own tokens


def flat(groups: Iterable) -> list:
    return list(itertools.chain(*groups))


def nested(rows: list) -> list[list]:
    return [rows[i : i + GROUP] for i in range(0, len(rows), GROUP)]


def own_model(folder: Path, policy: dict[str, torch.Tensor]):
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    missing, unexpected = model.load_state_dict({name: value.double() for name, value in policy.items()}, strict=False)
    assert not unexpected and missing in ([], ["lm_head.weight"])  # tied
    return model


def merge_adapter(base: dict[str, torch.Tensor], policy: dict[str, torch.Tensor], scale: float) -> dict:
    """W + scale·B·A for every module that `policy` has an adapter of."""
    merged = dict(base)
    for name, a in policy.items():
        if ".lora_A." in name:
            target = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
            merged[target] = base[target] + scale * policy[name.replace("lora_A", "lora_B")] @ a
    return merged


def token_logps(model, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logps = torch.log_softmax(model(torch.tensor([[*prompt, *completion]])).logits[0], dim=-1)
        rows.append([logps[len(prompt) + t - 1, token].item() for t, token in enumerate(completion)])
    return rows


def mean_difference(model, generation: dict) -> float:
    """Mean |Δ log p| over the sampled tokens, between what vLLM returned and `model`."""
    own = flat(token_logps(model, generation["prompts"], generation["completions"]))
    return fmean(abs(a - b) for a, b in zip(own, flat(generation["sampled_logps"]), strict=True))


def own_tokens(folder: Path, completions: list[list[int]], weights: Weights) -> list[list[int]]:
    """Mask of the tokens that count. Where truncated rows do not, one that ends in padding has ended, as in TRL."""
    if not weights.options.get("mask_truncated_completions"):
        return [[1] * len(row) for row in completions]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return [[int(row[-1] in ends)] * len(row) for row in completions]


def step(
    folder: Path, generation: dict, old_policy, policy, lam, weights: Weights, *, mode, bounds, surrogate
) -> Step:
    """
    Row by row: advantages from the rewards, f from the lengths, corrections from what vLLM returned.

    `generation`: what `vllm_worker.py` has recorded; `old_policy`: the model's weights when it was scored.
    """
    prompts, completions = generation["prompts"], generation["completions"]
    own = own_tokens(folder, completions, weights)
    lengths = nested([sum(mask) for mask in own])
    advantages = reference.group_advantages(nested(generation["rewards"]))
    old_logps = token_logps(own_model(folder, old_policy), prompts, completions)
    corrections = [
        reference.sampler_correction(old, sampled, mode, *bounds)
        for old, sampled in zip(old_logps, generation["sampled_logps"], strict=True)
    ]
    model = own_model(folder, policy)
    known = {"loss_type": surrogate, "own": own, "correction": corrections, **weights.token_weight}
    terms = reference.policy_terms(model, prompts, completions, old_logps, flat(advantages), **known)
    losses = [f * term for f, term in zip(flat(weights.length_weight(lengths, advantages, lam)), terms, strict=True)]
    sum(losses).backward()
    losses, terms = ([torch.as_tensor(value).item() for value in values] for values in (losses, terms))
    slopes, h = [], 1e-4
    if lam is not None:
        high, low = (flat(weights.length_weight(lengths, advantages, lam + d)) for d in (h, -h))
        slopes = [(a - b) / (2 * h) * term for a, b, term in zip(high, low, terms, strict=True)]
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    slope, slope_scale = math.fsum(slopes) if lam is not None else None, math.fsum(map(abs, slopes))
    counted = flat(row for row, mask in zip(corrections, own, strict=True) if any(mask))
    return Step(math.fsum(losses), math.fsum(map(abs, losses)), grads, slope, slope_scale, counted)


def deviation(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to the largest entry of all of `theirs`."""
    assert mine.keys() == theirs.keys()
    largest = max(value.abs().max().item() for value in theirs.values())
    difference = max((mine[name].double() - value).abs().max().item() for name, value in theirs.items())
    return difference / largest if largest else difference
