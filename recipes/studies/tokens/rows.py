"""The rows of `results/budget.csv`, as tables and pictures read them."""

import statistics
from collections import defaultdict

import numpy as np

from recipes.studies.shared.paired_statistics import bootstrap_interval

Rows = list[dict[str, str]]
LAST = 20  # generation batches at the end, over which a length counts as settled
BASELINE = "dapo"


def curve(row: dict[str, str], name: str) -> np.ndarray:
    """A curve of a row."""
    return np.array([float(value) for value in row[name].split()])


def settled_length(row: dict[str, str]) -> float:
    """Mean completion length in training over the last `LAST` generation batches, in tokens."""
    return float(curve(row, "length_curve")[-LAST:].mean())


def split_name(name: str) -> tuple[str, str]:
    """Way and setting of a method: "target signed" and "22" of "target 22 signed", "overlong" and "48 24"."""
    words = name.split()
    numbers = [word for word in words if word.lstrip("-")[0].isdigit()]
    return " ".join(word for word in words if word not in numbers), " ".join(numbers)


def cells(rows: Rows, study: str = "budget") -> dict[tuple[str, str], dict[str, dict[str, str]]]:
    """(task, method) -> seed -> row."""
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        if row["study"] == study:
            found[row["task"], row["arm"]][row["seed"]] = row
    return found


def interval_text(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean and its 95 % interval, as text."""
    mean = f"{scale * statistics.fmean(values):+.{digits}f}"
    if len(values) < 2 or len(set(values)) < 2:
        return mean
    low, high = bootstrap_interval([scale * value for value in values])
    return f"{mean} [{low:+.{digits}f}, {high:+.{digits}f}]"
