"""The plain data that members of f and v are called with, and the tensor helpers that both use."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ResponseRows:
    """
    All responses of a generation batch, as a length weight sees them: P prompts with G responses each.

    `statistics` holds the other numbers of each response that the weight asks for, name -> (P, G).
    """

    lengths: Tensor  # own tokens |o_i|, (P, G), float64; 0 for a row without tokens
    token_count: Tensor  # S, the token count that the loss divides by, 0-d
    dim: tuple[int, ...] = (0, 1)  # sums of the scope go over these: (0, 1) for "batch", (1,) for "prompt"
    advantages: Tensor | None = None  # A_i, unweighted, (P, G)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    step: int = 0  # optimizer steps so far

    @cached_property
    def has_tokens(self) -> Tensor:
        """Which rows have tokens, bool, (P, G)."""
        return self.lengths > 0

    @property
    def mean_length(self) -> Tensor:
        """μ = S/N over all N rows, as TRL counts them, 0-d."""
        return self.token_count / self.lengths.numel()

    def total(self, values: Tensor) -> Tensor:
        """Sum of (P, G) values over the scope, (1, 1) or (P, 1)."""
        return values.sum(dim=self.dim, keepdim=True)

    def statistic(self, name: str) -> Tensor:
        """A statistic by name, (P, G); a `ValueError` if no weight has asked for it in `needs`."""
        if name not in self.statistics:
            raise ValueError(f"{name} is not known: name it in the length weight's class attribute `needs`.")
        return self.statistics[name]


@dataclass(frozen=True)
class TokenRows:
    """
    The sampled tokens of one micro-batch, as a token weight sees them; all constants to autograd.

    Everything but `probs` is `None` where `token_weights` is called with log-probabilities alone.
    """

    probs: Tensor  # π, the current policy's probability of each token, (B, T)
    advantages: Tensor | None = None  # A, unweighted, (B, 1) or (B, T)
    entropies: Tensor | None = None  # of the current policy's distribution, nats, (B, T)
    old_logps: Tensor | None = None  # log-probabilities of the sampling policy, (B, T); `None` on policy
    mask: Tensor | None = None  # 1 for the policy's own tokens, (B, T)
    lengths: Tensor | None = None  # own tokens of the response, (B, 1)
    step: int = 0  # optimizer steps so far


def one_where_zero(x: Tensor) -> Tensor:
    """A divisor that is safe where there are no tokens. The quotient there is masked afterwards."""
    return x.masked_fill(x == 0, 1)


def group_mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of each group's values under a mask, both (P, G, ...), as (P, 1, ...); 0 where the mask is empty."""
    return (values * where).sum(dim=1, keepdim=True) / one_where_zero(where.sum(dim=1, keepdim=True))


def strictly_positive(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Clamp into the range of `dtype` in which an advantage times the weight neither vanishes nor overflows."""
    info = torch.finfo(dtype)
    return weights.clamp(min=info.tiny**0.75, max=info.max**0.75).to(dtype)


def kind(value: object) -> str:
    """Describe a wrong argument for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return type(value).__name__
