"""
What a response may be preferred for beside its length: one function of log-probabilities and mask each.

    "mean_logp"   1/|o_i| Σ_t ln π_it
    "min_logp"    min_t ln π_it

π is the sampling policy's probability of the token, over the policy's own tokens. A feature is added by a function
here and its entry in `FEATURES`.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .tensors import group_mean, one_where_zero


def mean_logp(logps: Tensor, mask: Tensor) -> Tensor:
    """Mean log-probability of the own tokens; (B, T), (B, T) -> (B,), 0 for a row without tokens."""
    return (logps * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def min_logp(logps: Tensor, mask: Tensor) -> Tensor:
    """Least log-probability of an own token; (B, T), (B, T) -> (B,), 0 for a row without tokens."""
    return logps.masked_fill(mask == 0, 0).amin(dim=1)


FEATURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean_logp": mean_logp, "min_logp": min_logp}


def centred_features(
    names: tuple[str, ...], lengths: Tensor, has_tokens: Tensor, features: Mapping[str, Tensor | None]
) -> Tensor:
    """
    x: each feature of each response, (P, G, K), minus its mean over the group's rows with tokens; 0 for a row without.

    `names` are `"length"`, which is ln|o|, and names in `features`, whose raw values are (P, G), as `lengths` and the
    bool `has_tokens` are. A feature that is not given raises a `ValueError`.
    """
    raw = []
    for name in names:
        values = one_where_zero(lengths).log() if name == "length" else features.get(name)
        if values is None:
            raise ValueError(f"features are required for {name}: the policy's log-probabilities.")
        raw.append(values.to(lengths))
    x, present = torch.stack(raw, dim=-1), has_tokens.unsqueeze(-1)
    return (x - group_mean(x, present)) * present
