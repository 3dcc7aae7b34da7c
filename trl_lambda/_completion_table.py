"""The weights of single completions, as columns of the table that TRL writes with `log_completions`."""

import math
from collections.abc import Mapping

import torch
from accelerate import Accelerator


class CompletionTable:
    """
    One value per column and row of TRL's table, which holds the last `capacity` completions of all processes.

    TRL appends the rows of a generation batch when it has scored them; their weights are known only when a loss has
    been computed on them, in another order and on several processes. Every row ever appended has a number here, and a
    value is put where that number says: NaN until its loss has been computed.

    Args:
        columns (`tuple[str, ...]`): names of the columns.
        capacity (`int`): how many rows TRL's table holds.
        device (`torch.device`): where the weights are.
    """

    def __init__(self, columns: tuple[str, ...], capacity: int, device: torch.device):
        self._columns = columns
        self._capacity = capacity
        # A ring by row number; the place after it takes what belongs to rows that have left the table.
        self._values = torch.full((len(columns), capacity + 1), torch.nan, device=device)
        self._total = 0
        self._first = {"train": 0, "eval": 0}

    def append_rows(self, mode: str, count: int, extra: Mapping) -> None:
        """
        Append the rows of a generation batch, without values yet.

        Args:
            mode (`str`): `"train"` or `"eval"`: whose losses will bring the values.
            count (`int`): rows of all processes.
            extra (`Mapping`): TRL's own columns, name -> deque; the new ones are kept as long as the others.
        """
        self._first[mode] = self._total
        self._total += count
        new = torch.arange(self._total - min(count, self._capacity), self._total, device=self._values.device)
        self._values[:, new % self._capacity] = torch.nan
        for column in self._columns:
            extra[column].extend([math.nan] * count)

    def fill(self, mode: str, rows: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """
        Put in the values of a micro-batch.

        Args:
            mode (`str`): as in the last `append_rows` of these rows.
            rows (`torch.Tensor`): places of the rows in their generation batch, (B,).
            values (`Mapping[str, torch.Tensor]`): column -> values, (B,).
        """
        number = rows + self._first[mode]
        place = torch.where(number >= self._total - self._capacity, number % self._capacity, self._capacity)
        for column, value in values.items():
            if column in self._columns:
                self._values[self._columns.index(column), place] = value.float()

    def write(self, accelerator: Accelerator, extra: Mapping) -> None:
        """
        Put the values of all processes into TRL's columns. Every process must call it.

        Args:
            accelerator (`Accelerator`): gathers over the processes.
            extra (`Mapping`): TRL's own columns, name -> deque.
        """
        kept = min(self._total, self._capacity)
        order = torch.arange(self._total - kept, self._total, device=self._values.device) % self._capacity
        everywhere = accelerator.gather(self._values[:, order].unsqueeze(0))  # (processes, columns, rows)
        known = everywhere.nan_to_num(nan=-torch.inf).amax(dim=0)  # a row's loss is computed on one process
        known = known.masked_fill(known == -torch.inf, torch.nan).tolist()
        for column, values in zip(self._columns, known, strict=True):
            extra[column].clear()
            extra[column].extend(values)
