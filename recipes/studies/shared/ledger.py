"""A CSV file of runs that survives being killed: whole rows are appended, a torn last line is dropped."""

import csv
import io
import os
from pathlib import Path
from typing import Any


class Ledger:
    """
    Rows on disk, each flushed before the next begins.

    Args:
        path (`Path`): the CSV file; made with its folder when the first row comes.
        key (`tuple[str, ...]`): the columns that say which run a row is.
    """

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self.path, self.key = path, key
        self._drop_torn_line()

    def _drop_torn_line(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            self.path.write_bytes(content[: content.rfind(b"\n") + 1])

    def rows(self) -> list[dict[str, str]]:
        """All rows, as text."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def done(self) -> set[tuple[str, ...]]:
        """The keys of the rows on disk, as text."""
        return {tuple(row[name] for name in self.key) for row in self.rows()}

    def key_of(self, row: dict[str, Any]) -> tuple[str, ...]:
        """The key of a row that may not be on disk yet."""
        return tuple(str(row[name]) for name in self.key)

    def append(self, row: dict[str, Any]) -> None:
        """
        Append a row with one write, and wait until it is on disk.

        Raises:
            ValueError: if its columns are not those of the file.
        """
        empty = not self.path.exists() or self.path.stat().st_size == 0
        if not empty:
            with self.path.open(newline="", encoding="utf-8") as file:
                header = next(csv.reader(file))
            if header != list(row):
                raise ValueError(f"{self.path} has other columns than the new row: {sorted(set(header) ^ set(row))}")
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row), lineterminator="\n")
        if empty:
            writer.writeheader()
        writer.writerow(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
