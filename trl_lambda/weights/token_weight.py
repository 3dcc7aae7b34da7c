"""v: how much a token counts. One small class per member, in one table."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .rows import TokenRows, strictly_positive


class TokenWeight(ABC):
    """
    One member v of the unified loss: a weight of each token, >= 0 and a constant to autograd.

    A subclass implements `__call__(self, rows)`, `rows` a [`~trl_lambda.weights.TokenRows`], and returns weights,
    (B, T). A weight of 0 takes the token out of the policy loss. The token stays in the denominator, and the KL term
    and the entropy bonus keep it.

    Instead, `__call__` may name any of these arguments, as a function passed to the trainer may; all broadcast to
    (B, T):

        probs        (B, T): π, the current policy's probability of each sampled token
        advantages   (B, 1), or (B, T) where the trainer has one per token: A, unweighted
        entropies    (B, T): entropy of the current policy's distribution, nats
        old_logps    (B, T): log-probabilities of the sampling policy; `None` on policy
        mask         (B, T): 1 for the policy's own tokens
        lengths      (B, 1): own tokens of the response
        step         optimizer steps so far

    Class attributes:
        name: as in `token_weight`.
        formula, source: for the model card.
    """

    name = ""
    formula = ""
    source = "the user's"
    arxiv = ""
    bounds: tuple[float, float] | None = None  # the least and largest weight of a member that is clipped to them

    def check(self) -> None:  # noqa: B027  a member may have nothing to check
        """Raise a `ValueError` if a parameter is out of its range."""

    @abstractmethod
    def __call__(self, rows: TokenRows) -> Tensor: ...


@dataclass(frozen=True)
class TRGRPO(TokenWeight):
    """v = clip(α·σ(k·(π - p0)), L, U): TR-GRPO, arXiv 2511.00066, as this project reads its constants."""

    alpha: float = field(default=2.0, metadata={"symbol": "α"})
    slope: float = field(default=9.0, metadata={"symbol": "k"})
    center: float = field(default=0.25, metadata={"symbol": "p0"})
    min: float = field(default=1.0, metadata={"symbol": "L"})
    max: float = field(default=1.4, metadata={"symbol": "U"})

    name = "tr_grpo"
    formula = "TR-GRPO: clip(α·σ(k·(π - p0)), L, U)"
    source = "arXiv 2511.00066"
    arxiv = "2511.00066"

    @property
    def bounds(self) -> tuple[float, float]:  # type: ignore[override]
        return self.min, self.max

    def check(self) -> None:
        is_positive = 0 < self.alpha < math.inf and 0 < self.slope < math.inf
        if not (is_positive and 0 <= self.center <= 1 and 0 < self.min <= self.max < math.inf):
            raise ValueError(f"{self} needs finite alpha, slope > 0, center in [0, 1] and 0 < min <= max.")

    def __call__(self, rows: TokenRows) -> Tensor:
        return (self.alpha * torch.sigmoid(self.slope * (rows.probs - self.center))).clamp(min=self.min, max=self.max)


@dataclass(frozen=True)
class AR(TokenWeight):
    """v = α·π + 1 - α: Advantage Reweighting, arXiv 2505.12929, with the current policy's π."""

    alpha: float = field(default=0.2, metadata={"symbol": "α"})

    name = "ar"
    formula = "AR: α·π + 1 - α"
    source = "arXiv 2505.12929"
    arxiv = "2505.12929"

    def check(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"{self} needs alpha in [0, 1].")

    def __call__(self, rows: TokenRows) -> Tensor:
        return strictly_positive(self.alpha * rows.probs + (1 - self.alpha), rows.probs.dtype)


# The one table: a member is added here.
TOKEN_WEIGHTS: dict[str, type[TokenWeight]] = {member.name: member for member in (TRGRPO, AR)}
