"""The responses of one generation batch, as every process knows them: plain data by group."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class GenerationBatch:
    """
    Own-token lengths |o| and advantages A of P groups of G responses, the same on every process.

    At the loss a group is spread over micro-batches, optimizer steps and processes. Each row carries its number, and
    finds its place here by it.
    """

    numbers: Tensor  # of the rows, long, ascending, (P·G,)
    lengths: Tensor  # int32, (P, G)
    token_count: Tensor  # S, the token count that TRL's loss divides by, 0-d
    advantages: Tensor | None = None  # (P, G); `None` where a subclass has one per token
    statistics: Mapping[str, Tensor] = field(default_factory=dict)  # what the length weight asks for, name -> (P, G)

    @property
    def mean_length(self) -> float:
        """Mean number of own tokens of the rows that have any; 0 where none has."""
        rows = int((self.lengths > 0).sum())
        return float(self.lengths.sum()) / max(rows, 1)

    def places(self, numbers: Tensor) -> Tensor:
        """Places of rows in the flat table, (B,), from their numbers, (B,)."""
        return torch.searchsorted(self.numbers, numbers).clamp(max=self.numbers.numel() - 1)
