"""The responses of one generation batch, as every process knows them: plain data by group."""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
