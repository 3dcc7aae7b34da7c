"""Tables in markdown, and how they are put between the markers of a page."""

import math
import re

import numpy as np


def replace_tables(text: str, tables: dict[str, str]) -> str:
    """
    Put each table between its markers, `<!-- table: NAME -->` and the next `<!-- end -->`, instead of what is there.

    Args:
        text (`str`): the page. Markers of other names stay as they are.
        tables (`dict`): name to markdown.

    Returns:
        `str`: the page; the same again if it is put in again.

    Raises:
        ValueError: if a marker of one of the tables is not closed before the next one opens.
    """
    for name, table in tables.items():
        opening = f"<!-- table: {name} -->"
        pattern = re.escape(opening) + r"\n(?:(?!<!-- table: ).)*?<!-- end -->"
        text, count = re.subn(pattern, lambda _, new=f"{opening}\n{table}\n<!-- end -->": new, text, flags=re.DOTALL)
        if count != text.count(opening):
            raise ValueError(f"{opening} is not closed by <!-- end -->")
    return text


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_and_error(values: np.ndarray, factor: float, decimals: int) -> str:
    """Return mean ± standard error, the mean alone of one value, a dash of none."""
    if not len(values):
        return "–"
    mean = f"{factor * values.mean():.{decimals}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {factor * values.std(ddof=1) / math.sqrt(len(values)):.{decimals}f}"
