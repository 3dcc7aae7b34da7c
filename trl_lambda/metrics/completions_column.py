"""f in the table of completions that TRL writes with `log_completions`."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_COLUMN = "length_weight"


class LengthWeightColumn:
    """A column with f as of scoring, one value per row; a reward function that logs one of that name keeps it."""

    def __init__(self) -> None:
        self._is_taken = False

    def record_column(self, name: str) -> None:
        """Take in the name of a column that a reward function logs; called by TRL's `_log_completion_extra`."""
        if name == _COLUMN and not self._is_taken:
            self._is_taken = True
            warnings.warn(
                f"a reward function logs {name} with log_extra: the table of completions keeps its values, and not "
                "the weights of trl_lambda. Use another name there to have both.",
                UserWarning,
                stacklevel=3,
            )

    def fill(self, table: Mapping[str, Any], weights: Tensor) -> None:
        """Add f of a generation batch, (P, G); NaN for a row without tokens."""
        if not self._is_taken:
            table[_COLUMN].extend(weights.detach().masked_fill(weights == 0, torch.nan).flatten().tolist())
