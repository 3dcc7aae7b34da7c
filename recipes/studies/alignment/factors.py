"""f and v of a configuration at ρ = 1: its options, lengths, log-probabilities and advantages in, weights out."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from trl_lambda import weights
from trl_lambda.weights import LENGTH_WEIGHTS, ResponseRows, weigh_responses, weight_from_name
from trl_lambda.weights.rows import SCORED_STATISTICS

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
    """f_i(λ), (P, G), float64, differentiable in λ; arguments as for `Weight`."""
    name = options["length_weight"] or REDUCTIONS[options["loss_type"]]
    features = tuple(options["lambda_features"])
    fields = {"side": options["lambda_side"] or "both", "features": features, "max_completion_length": 1}
    member = weight_from_name(name, options["length_weight_kwargs"], fields, LENGTH_WEIGHTS, "length_weight")
    rows = response_rows(features, lengths, logps, advantages, options["length_weight_scope"])
    lam = torch.as_tensor(lam, dtype=torch.float64)
    return weigh_responses(member, rows, lam, positive_weight=options["positive_weight"], dtype=torch.float64)


def response_rows(
    features: Iterable[str],
    lengths: torch.Tensor,
    logps: torch.Tensor,
    advantages: torch.Tensor,
    scope: str = "batch",
) -> ResponseRows:
    """A batch as length weights see it, from lengths and advantages (P, G) and log π (P · G, T)."""
    own = torch.arange(logps.size(1)) < lengths.view(-1, 1)
    statistics = {
        name: SCORED_STATISTICS[name](logps, None, own).view(lengths.shape).double()
        for name in features
        if name != "length"
    }
    tokens = lengths.double()
    return ResponseRows(tokens, tokens.sum(), (0, 1) if scope == "batch" else (1,), advantages.double(), statistics)


def token_weights(options: Mapping[str, Any], logps: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """v_it, (B, T) from log π (B, T) and A (B, 1); 0 where v inside the clip takes the token out of it."""
    if options["token_weight"] is None:
        return torch.ones_like(logps)
    kwargs = options["token_weight_kwargs"] or {}
    v = weights.token_weights(logps, token_weight=options["token_weight"], **kwargs)
    if options["token_weight_inside_clip"]:
        low, high = options["epsilon"], options["epsilon_high"]
        above = v > 1 + (low if high is None else high)
        v = v.masked_fill((above & (advantages > 0)) | ((v < 1 - low) & (advantages < 0)), 0.0)
    return v
