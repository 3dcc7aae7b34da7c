"""What both factors need of tensors: safe divisors, a range for positive weights, words for error messages."""

from collections.abc import Iterable

import torch
from torch import Tensor


def one_where_zero(x: Tensor) -> Tensor:
    """A divisor that is safe where there are no tokens; what it divides there is masked afterwards."""
    return x.masked_fill(x == 0, 1)


def group_mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of each group's values under a mask, both (P, G, ...), as (P, 1, ...); 0 where the mask is empty."""
    return (values * where).sum(dim=1, keepdim=True) / one_where_zero(where.sum(dim=1, keepdim=True))


def strictly_positive(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast, held inside the range in which an advantage times the weight neither vanishes nor overflows."""
    info = torch.finfo(dtype)
    return weights.clamp(min=info.tiny**0.75, max=info.max**0.75).to(dtype)


def kind(value: object) -> str:
    """What a wrong argument is, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return type(value).__name__


def listing(names: Iterable[str]) -> str:
    """Accepted names, for an error message."""
    return ", ".join(map(repr, names))
