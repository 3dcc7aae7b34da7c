"""What both factors need of tensors: safe divisors, a range for positive weights, words for error messages."""

from collections.abc import Iterable

import torch


def one_where_zero(x: torch.Tensor) -> torch.Tensor:
    """A divisor that is safe where there are no tokens; what it divides there is masked afterwards."""
    return x.masked_fill(x == 0, 1)


def strictly_positive(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast, held inside the range in which an advantage times the weight neither vanishes nor overflows."""
    info = torch.finfo(dtype)
    return weights.clamp(min=info.tiny**0.75, max=info.max**0.75).to(dtype)


def kind(value: object) -> str:
    """What a wrong argument is, for an error message."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{type(value).__name__}"


def listing(names: Iterable[str]) -> str:
    """Accepted names, for an error message."""
    return ", ".join(repr(name) for name in names)
