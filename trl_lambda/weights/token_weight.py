"""v: how much a token counts. One small class per member, in one table."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .tensors import listing, strictly_positive


class TokenWeight(ABC):
    """
    One member v of the unified loss: a positive weight of each token from the policy's own probability of it.

    A subclass is called with `probs`, π of the sampled tokens under the current policy, any shape, a constant to
    autograd, and returns weights like it.

    Class attributes: `name`, as in `token_regulation`; `formula` and `source` for the model card; `bounds`, the least
    and the largest weight of a member that is clipped to them, else None.
    """

    name = ""
    formula = ""
    source = ""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The least and the largest weight of a member that is clipped to them, else None."""
        return None

    def check(self, prefix: str = "") -> None:  # noqa: B027  a member may have nothing to check
        """Raise a `ValueError` if a parameter is out of its range; `prefix` goes before its name."""

    @abstractmethod
    def __call__(self, probs: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Sigmoid(TokenWeight):
    """v = clip(α·σ(k·(π - p0)), L, U): arXiv 2511.00066, as this project reads its constants."""

    alpha: float = field(default=2.0, metadata={"symbol": "α"})
    slope: float = field(default=9.0, metadata={"symbol": "k"})
    center: float = field(default=0.25, metadata={"symbol": "p0"})
    min: float = field(default=1.0, metadata={"symbol": "L"})
    max: float = field(default=1.4, metadata={"symbol": "U"})

    name = "sigmoid"
    formula = "TR-GRPO: clip(α·σ(k·(π - p0)), L, U)"
    source = "arXiv 2511.00066"

    @property
    def bounds(self) -> tuple[float, float]:
        return self.min, self.max

    def check(self, prefix: str = "") -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"{prefix}alpha={self.alpha} must be finite and > 0 for the sigmoid weight.")
        if not (math.isfinite(self.slope) and self.slope > 0):
            raise ValueError(
                f"{prefix}slope={self.slope} must be finite and > 0: the weight increases in the probability."
            )
        if not 0 <= self.center <= 1:
            raise ValueError(f"{prefix}center={self.center} must be a probability in [0, 1].")
        if not (math.isfinite(self.min) and self.min > 0):
            raise ValueError(f"{prefix}min={self.min} must be finite and > 0: a token weight is strictly positive.")
        if not (math.isfinite(self.max) and self.max >= self.min):
            raise ValueError(f"{prefix}max={self.max} must be finite and >= {prefix}min={self.min}.")

    def __call__(self, probs: Tensor) -> Tensor:
        return (self.alpha * torch.sigmoid(self.slope * (probs - self.center))).clamp(min=self.min, max=self.max)


@dataclass(frozen=True)
class Linear(TokenWeight):
    """v = α·π + 1 - α: AR, arXiv 2505.12929, with the current policy's π."""

    alpha: float = field(default=0.2, metadata={"symbol": "α"})

    name = "linear"
    formula = "AR: α·π + 1 - α"
    source = "arXiv 2505.12929"

    def check(self, prefix: str = "") -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"{prefix}alpha={self.alpha} must be in [0, 1] for the linear weight.")

    def __call__(self, probs: Tensor) -> Tensor:
        return strictly_positive(self.alpha * probs + (1 - self.alpha), probs.dtype)


# The one table: a member is added here.
TOKEN_WEIGHTS: dict[str, type[TokenWeight]] = {member.name: member for member in (Sigmoid, Linear)}


def make_token_weight(name: str, options: Mapping[str, Any], prefix: str = "") -> TokenWeight:
    """
    The member of that name with those of `options` that are parameters of it; one that is None is left at its default.

    Raises:
        `ValueError`: unknown name, or a parameter out of its range, named as `prefix` + its name.
    """
    if name not in TOKEN_WEIGHTS:
        option = "token_regulation" if prefix else "regulation"
        raise ValueError(f"{option}={name!r} is unknown; accepted: {listing(TOKEN_WEIGHTS)}.")
    member = TOKEN_WEIGHTS[name]
    given = {f.name: options[f.name] for f in fields(member) if options.get(f.name) is not None}  # type: ignore[arg-type]
    weight = member(**given)
    weight.check(prefix)
    return weight
