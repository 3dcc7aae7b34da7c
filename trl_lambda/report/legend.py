"""The legend above a panel: every line has its entry, however many there are and whatever they are called."""

import math
from typing import Any

_WIDTH = 74  # characters of a legend's line, each entry's mark counted as six
_LINE = 0.176  # inches
_MARKERS = ("o", "s", "^", "D", "v", "x", "+", "*", "P", "<", ">", "h")
_GUARD = " "  # before a label that matplotlib would hide for its underscore; taken away again in the legend


def shown(name: str) -> str:
    """Return `name` as a label that matplotlib does not hide."""
    return _GUARD + name if name.startswith("_") else name


def marker_of(number: int) -> dict[str, Any]:
    """Return the style of a shape for the nth of several, beyond the shapes its number."""
    if number < len(_MARKERS):
        return {"marker": _MARKERS[number], "markerfacecolor": "white", "markersize": 5}
    return {"marker": f"${number + 1}$", "markersize": 9, "markeredgewidth": 0.3}


def draw_legend(axes: Any) -> None:
    """Name what has a label, between the panel and its title, so that no data is covered."""
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        return
    style = {"frameon": False, "fontsize": 8, "handlelength": 1.6, "columnspacing": 1.1, "borderaxespad": 0.1}
    legend = axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=_columns(labels), **style)
    for text in legend.get_texts():
        text.set(text=text.get_text().removeprefix(_GUARD), parse_math=False)


def legend_height(axes: Any) -> float:
    """Return by how many inches the legend above a panel is higher than one of a single line."""
    labels = axes.get_legend_handles_labels()[1]
    return _LINE * (math.ceil(len(labels) / _columns(labels)) - 1) if labels else 0.0


def title_pad(axes: Any) -> float:
    """Return the points between a panel and its title, which leave room for the legend."""
    return 19 + 72 * legend_height(axes) if axes.get_legend() else 6


def _columns(labels: list[str]) -> int:
    """Return how many columns the legend has: at most four, as many as fit."""
    for columns in (4, 3, 2):
        lines = -(-len(labels) // columns)
        widths = [max(map(len, labels[start : start + lines])) + 6 for start in range(0, len(labels), lines)]
        if sum(widths) <= _WIDTH:
            return columns
    return 1
