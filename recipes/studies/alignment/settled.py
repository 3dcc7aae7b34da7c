"""Where a λ that follows a regression stands: the λ of `*_settled` weights."""

from collections.abc import Sequence

import torch

from recipes.studies.alignment.factors import response_rows
from recipes.studies.alignment.policy_gradient import Batch, group_advantages
from recipes.studies.alignment.weights import Weight
from trl_lambda.generation_batch import GenerationBatch
from trl_lambda.lambda_parameter.learning import Regression


def settled_lambda(weight: Weight, batches: Sequence[Batch], logps: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    κ·w after the trainer's own rule has seen these batches, in their order: where λ is drawn to.

    Args:
        weight (`Weight`): one whose λ follows a regression.
        batches (`Sequence[Batch]`): K of them.
        logps (`Sequence[torch.Tensor]`): log π of their tokens, (B, T) each.

    Returns:
        `torch.Tensor`: λ, one per feature, float64; 0 where no group has a signal.
    """
    features = tuple(weight.options["lambda_features"])
    return -_rule_after(weight, batches, logps).gradient(torch.zeros(len(features), dtype=torch.float64))


def critic_r2(weight: Weight, batches: Sequence[Batch], logps: Sequence[torch.Tensor]) -> float:
    """R² of the critic after these batches: what the trainer logs as `lambda/r2`; arguments as `settled_lambda`."""
    return _rule_after(weight, batches, logps).metrics()["lambda/r2"]


def _rule_after(weight: Weight, batches: Sequence[Batch], logps: Sequence[torch.Tensor]) -> Regression:
    features = tuple(weight.options["lambda_features"])
    rule = Regression(features, weight.options["lambda_gain"], weight.options["lambda_side"])
    for batch, of_tokens in zip(batches, logps, strict=True):
        advantages = group_advantages(batch.rewards)
        rows = response_rows(features, batch.lengths, of_tokens, advantages)
        numbers = torch.arange(batch.lengths.numel())
        seen = GenerationBatch(numbers, batch.lengths, rows.token_count, advantages, rows.statistics)
        rule.observe(seen, float(batch.lengths.float().mean()))
    return rule


def settled_lambdas(weight: Weight, batches: Sequence[Batch], logps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """
    For each batch, λ from all others: a batch's own noise would pass for what right answers look like.

    The references of the cosines share those other batches. λ is a few numbers from hundreds of rows, and what noise
    it has is not in the jackknife's error.
    """
    kept = [[j for j in range(len(batches)) if j != k] for k in range(len(batches))]
    return [settled_lambda(weight, [batches[j] for j in js], [logps[j] for j in js]) for js in kept]
