"""Measure a model on playground problems: accuracy, length, style, and how far length goes with being right."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.playground.rewards import exact_answer
from recipes.playground.rollouts import roll_out
from recipes.playground.tasks import Problem

MAX_NEW_TOKENS = 48  # the longest answer taught takes 48 with its end token
BATCH_SIZE = 512  # rows generated at once


def within_group_correlation(rewards: torch.Tensor, lengths: torch.Tensor) -> float:
    """
    Correlate reward and length inside groups: both are centred on their group's mean, then pooled.

    Args:
        rewards (`torch.Tensor`):
            Rewards, (P, G).
        lengths (`torch.Tensor`):
            Completion lengths in tokens, (P, G).

    Returns:
        `float`: between -1 and 1; 0.0 where reward or length never differs within a group.
    """
    rewards = rewards.double() - rewards.double().mean(1, keepdim=True)  # (P, G)
    lengths = lengths.double() - lengths.double().mean(1, keepdim=True)  # (P, G)
    scale = (rewards.square().sum() * lengths.square().sum()).sqrt()
    return float((rewards * lengths).sum() / scale) if scale > 0 else 0.0


@dataclass(frozen=True)
class Samples:
    """
    Completions of some problems.

    Args:
        texts (`list[str]`): completions, (P * G,), the G of a problem one after another.
        rewards (`torch.Tensor`): `exact_answer` of each, (P * G,).
        lengths (`torch.Tensor`): tokens with the end token, (P * G,), float.
    """

    texts: list[str]
    rewards: torch.Tensor
    lengths: torch.Tensor


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    *,
    num_samples: int,
    seed: int,
    greedy: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Samples:
    """
    Sample completions at temperature 1 (or greedily), without disturbing the global random state.

    Args:
        model (`PreTrainedModel`):
            The model; it is left in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`):
            The playground's tokenizer.
        problems (`list[Problem]`):
            P problems.
        num_samples (`int`):
            G, completions per problem.
        seed (`int`):
            Seed of the sampling.
        greedy (`bool`):
            Take the most probable token instead of sampling.
        max_new_tokens (`int`):
            Where a completion is cut.

    Returns:
        `Samples`: P * G completions.
    """
    model.eval()
    prompts = [problem.prompt for problem in problems for _ in range(num_samples)]
    solutions = [problem.solution for problem in problems for _ in range(num_samples)]
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    texts, lengths = [], []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        if problems[0].environment is not None:
            return _converse(model, tokenizer, problems, num_samples, max_new_tokens, sampling)
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = tokenizer(
                prompts[start : start + BATCH_SIZE], padding=True, return_tensors="pt", return_token_type_ids=False
            ).to(model.device)
            output = model.generate(**batch, **sampling, max_new_tokens=max_new_tokens)
            completion = output[:, batch["input_ids"].shape[1] :]  # (B, T)
            lengths += (completion != tokenizer.pad_token_id).sum(1).tolist()
            texts += tokenizer.batch_decode(completion, skip_special_tokens=True)
    rewards = torch.tensor(exact_answer(texts, solutions))
    return Samples(texts, rewards, torch.tensor(lengths, dtype=torch.float32))


def _converse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    num_samples: int,
    limit: int,
    sampling: dict[str, Any],
) -> Samples:
    """`sample` for a task with an environment: texts hold the tool's answers, lengths count the model's own tokens."""
    rows = [problem for problem in problems for _ in range(num_samples)]
    completions, own = roll_out(model, tokenizer, rows, limit=limit, sampling=sampling)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = torch.tensor(exact_answer(texts, [problem.solution for problem in rows]))
    return Samples(texts, rewards, torch.tensor([sum(mask) for mask in own], dtype=torch.float32))


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    *,
    num_samples: int,
    **sampling: Any,
) -> dict[str, float]:
    """
    Sample completions and measure them; the arguments are those of `sample`.

    Returns:
        `dict[str, float]`: `accuracy_sampled`, `mean_length` (tokens, with the end token), `share_long` (completions
        that show their steps), `accuracy_short`, `accuracy_long`, `length_reward_correlation`.
    """
    samples = sample(model, tokenizer, problems, num_samples=num_samples, **sampling)
    rewards, length = samples.rewards, samples.lengths
    long = torch.tensor(["=" in text for text in samples.texts])  # (P * G,)
    figures = {
        "accuracy_sampled": rewards.mean(),
        "mean_length": length.mean(),
        "share_long": long.float().mean(),
        "accuracy_short": rewards[~long].sum() / (~long).sum().clamp(min=1),
        "accuracy_long": rewards[long].sum() / long.sum().clamp(min=1),
        "length_reward_correlation": within_group_correlation(
            rewards.view(-1, num_samples), length.view(-1, num_samples)
        ),
    }
    return {name: round(float(value), 4) for name, value in figures.items()}
