"""f and v of a configuration at ρ = 1: its options, lengths, log-probabilities and advantages in, weights out."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from trl_lambda.weights import make_length_weight, probability_weights, weigh_responses
from trl_lambda.weights.features import FEATURES

# The reduction of TRL's loss types in the terms of `length_weights`, at ρ = 1 and up to a constant. sapo's soft gate
# has slope 1 at ρ = 1 whatever its temperatures, vespo's is 1 there; luspo sums |o| times a mean over tokens.
REDUCTIONS = {
    "grpo": "grpo",
    "sapo": "grpo",
    "dapo": "dapo",
    "bnpo": "dapo",
    "cispo": "dapo",
    "luspo": "dapo",
    "vespo": "dapo",
    "dr_grpo": "dapo",
}


def response_weights(
    options: Mapping[str, Any],
    lengths: torch.Tensor,
    logps: torch.Tensor,
    advantages: torch.Tensor,
    lam: torch.Tensor | float,
) -> torch.Tensor:
    """f_i(λ), (P, G), differentiable in λ; arguments as for `Weight`."""
    name = options["aggregation"] or REDUCTIONS[options["loss_type"]]
    parameters = {"length_scale": options["length_scale"], "max_completion_length": int(lengths.max())}
    parameters |= {"side": options["lambda_side"], "features": tuple(options["lambda_features"])}
    return weigh_responses(
        make_length_weight(name, parameters),
        lengths,
        lam,
        scope=options["aggregation_scope"],
        advantages=advantages,
        features=response_features(options["lambda_features"], lengths, logps),
        positive_weight=options["positive_weight"],
    )


def response_features(names: Iterable[str], lengths: torch.Tensor, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """What λ weighs beside length, name -> (P, G), from lengths (P, G) and log π (P · G, T)."""
    own = torch.arange(logps.size(1)) < lengths.view(-1, 1)
    return {name: FEATURES[name](logps, own).view(lengths.shape) for name in names if name != "length"}


def token_weights(options: Mapping[str, Any], logps: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """v_it, (B, T) from log π (B, T) and A (B, 1); 0 where v inside the clip takes the token out of it."""
    if options["token_regulation"] is None:
        return torch.ones_like(logps)
    weights = probability_weights(
        logps,
        regulation=options["token_regulation"],
        alpha=options["regulation_alpha"],
        slope=options["regulation_slope"],
        center=options["regulation_center"],
        min=options["regulation_min"],
        max=options["regulation_max"],
    )
    if options["regulation_inside_clip"]:
        low, high = options["epsilon"], options["epsilon_high"]
        above = weights > 1 + (low if high is None else high)
        clipped = (above & (advantages > 0)) | ((weights < 1 - low) & (advantages < 0))
        weights = weights.masked_fill(clipped, 0.0)
    return weights
