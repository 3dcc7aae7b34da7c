"""
What a response may be preferred for beside its length: one function of log-probabilities and mask each.

    "mean_logp"   1/|o_i| Σ_t ln π_it
    "min_logp"    min_t ln π_it

π is the sampling policy's probability of the token, over the policy's own tokens. A feature is added by a function
here and its entry in `FEATURES`.
"""

from collections.abc import Callable

import torch


def mean_logp(logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean log-probability of the own tokens; (B, T), (B, T) -> (B,), 0 for a row without tokens."""
    return (logps * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def min_logp(logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Least log-probability of an own token; (B, T), (B, T) -> (B,), 0 for a row without tokens."""
    return logps.masked_fill(mask == 0, 0).amin(dim=1)


FEATURES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean_logp": mean_logp,
    "min_logp": min_logp,
}
