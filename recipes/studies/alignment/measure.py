"""The alignment of every weight at one model, and what λ's own learning rule would do there."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from recipes.studies.alignment.batches import token_logps
from recipes.studies.alignment.policy_gradient import (
    METRICS,
    Batch,
    cosine_ratios,
    cosines,
    group_advantages,
    inner_products,
    jackknife_error,
    without_each,
)
from recipes.studies.alignment.settled import settled_lambdas
from recipes.studies.alignment.weights import Weight, all_weights, lambda_gradient, same_direction, slope_sides

RULE_COLUMNS = ("lambda_gradient", "lambda_gradient_se", "slope_raw", "slope_raw_se", "slope_adam", "slope_adam_se")


def measure(
    model: PreTrainedModel,
    batches: list[Batch],
    on_batch: Callable[[], object] = lambda: None,
    weights: list[Weight] | None = None,
) -> dict[str, dict[str, Any]]:
    """
    Align every weight at one model.

    Args:
        model (`PreTrainedModel`): the policy that the batches were sampled from.
        batches (`list[Batch]`): K of them, K >= 3.
        on_batch (`Callable`): called 2 · K times.
        weights (`list[Weight]`, *optional*): `BASE` first; all of them by default.

    Returns:
        `dict[str, dict[str, Any]]`: by weight, the columns from `same_as` to `RULE_COLUMNS`, empty where λ is
        not learned by descent.
    """
    weights = all_weights() if weights is None else weights
    same = same_direction(weights)
    distinct = [weight for weight in weights if same[weight.name] == weight.name]
    place = {name: [weight.name for weight in distinct].index(first) for name, first in same.items()}

    with torch.no_grad():
        known = [token_logps(model, batch) for batch in batches]
    lambdas = {weight.name: settled_lambdas(weight, batches, known) for weight in distinct if weight.settled}

    def weights_of(batch: Batch, logps: torch.Tensor) -> torch.Tensor:
        advantages = group_advantages(batch.rewards)
        k = next(k for k, other in enumerate(batches) if other is batch)
        lams = (lambdas[weight.name][k] if weight.settled else None for weight in distinct)
        rows = [weight(batch.lengths, logps, advantages, lam) for weight, lam in zip(distinct, lams, strict=True)]
        return torch.stack([row.to(logps.dtype) for row in rows])

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    products = inner_products(batches, lambda batch: token_logps(model, batch), weights_of, parameters, on_batch)
    columns: dict[str, dict[str, Any]] = {n: {"same_as": first if first != n else ""} for n, first in same.items()}
    ratios, deleted = {}, {}
    for metric in METRICS:
        mean_cosines = cosines(products[metric]).mean(dim=1)
        ratios[metric] = cosine_ratios(products[metric])
        deleted[metric] = without_each(products[metric], cosine_ratios)
        errors = jackknife_error(deleted[metric])
        for name, i in place.items():
            columns[name][f"cosine_{metric}"] = mean_cosines[i].item()
            columns[name][f"ratio_{metric}"] = ratios[metric][i].item()
            columns[name][f"ratio_{metric}_se"] = errors[i].item()

    for weight in weights:
        columns[weight.name] |= dict.fromkeys(RULE_COLUMNS, "")
        if weight.learnable:
            gradients = [lambda_gradient(weight, *pair) for pair in zip(batches, known, strict=True)]
            columns[weight.name]["lambda_gradient"] = statistics.fmean(gradients)
            columns[weight.name]["lambda_gradient_se"] = statistics.stdev(gradients) / len(gradients) ** 0.5
            columns[weight.name] |= slopes(ratios, deleted, *slope_sides(weight, weights), place)
    return columns


def slopes(
    ratios: dict[str, torch.Tensor],
    deleted: dict[str, torch.Tensor],
    below: Weight,
    above: Weight,
    place: dict[str, int],
) -> dict[str, float]:
    """
    By how much the ratio grows per unit of λ, from two weights that differ in λ only, in every metric.

    Args:
        ratios (`dict[str, torch.Tensor]`): by metric, (W,).
        deleted (`dict[str, torch.Tensor]`): the same without each batch, (K, W).
        below (`Weight`), above (`Weight`): with the smaller and the larger λ.
        place (`dict[str, int]`): of a weight among the W, by name.

    Returns:
        `dict[str, float]`: `slope_*` with `slope_*_se`, a jackknife's.
    """
    distance = above.options["lambda_init"] - below.options["lambda_init"]
    columns = {}
    for metric in METRICS:
        slope, slope_deleted = (
            (x[..., place[above.name]] - x[..., place[below.name]]) / distance
            for x in (ratios[metric], deleted[metric])
        )
        columns[f"slope_{metric}"] = slope.item()
        columns[f"slope_{metric}_se"] = jackknife_error(slope_deleted).item()
    return columns
