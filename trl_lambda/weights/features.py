"""
Statistics of a response beside its length: one function of log-probabilities, entropies and mask each.

    "mean_logp"      1/|o_i| Σ_t ln π_it
    "min_logp"       min_t ln π_it
    "mean_entropy"   1/|o_i| Σ_t H_it

π and H belong to the sampling policy, over its own tokens. λ may weigh the first two (`FEATURES`).
"""

from typing import Any

import torch
from torch import Tensor

from .rows import ResponseRows, group_mean, one_where_zero

FEATURES = ("mean_logp", "min_logp")
# What TRL's scoring pass alone does not give: log-probabilities, and for the last one entropies.
SCORED_STATISTICS = (*FEATURES, "mean_entropy")


def score_statistic(name: str, logps: Tensor, entropies: Any, mask: Tensor) -> Tensor:
    """One of `SCORED_STATISTICS` of every response; (B, T) each -> (B,), 0 for a row without tokens."""
    if name == "min_logp":
        return logps.masked_fill(mask == 0, 0).amin(dim=1)
    values = logps if name == "mean_logp" else entropies
    return values.masked_fill(mask == 0, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def centred_features(names: tuple[str, ...], rows: ResponseRows) -> Tensor:
    """
    x: each feature of each response minus its mean over the group's rows with tokens, (P, G, K); 0 without tokens.

    `names` are `"length"`, which is ln|o|, and names of `rows.statistics`.
    """
    raw = [one_where_zero(rows.lengths).log() if name == "length" else rows.statistic(name) for name in names]
    x, present = torch.stack([values.to(rows.lengths) for values in raw], dim=-1), rows.has_tokens.unsqueeze(-1)
    return (x - group_mean(x, present)) * present
