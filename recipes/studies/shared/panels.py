"""What all figures share: panels, their axes, one legend."""

from typing import Any

import numpy as np


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, np.ndarray]:
    """Return a figure and its panels, (rows, columns), each of the given inches; ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the figures need matplotlib: pip install "trl-lambda[plots]"') from error

    figure = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def finish_panel(axes: Any, title: str, x: str, y: str) -> None:
    """Give a panel its title, its axes' names and a quiet grid."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(True, color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Any, title: str, order: tuple[str, ...] = ()) -> None:
    """Put one legend for all panels above them, where it covers nothing; `order` comes first, "other arms" last."""
    found = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = sorted(found, key=lambda label: (label == "other arms", [*order, label].index(label)))
    # A column takes its handle and about a ninth of an inch for each letter of its longest label.
    fitting = int(figure.get_figwidth() / (0.6 + 0.09 * max(map(len, labels), default=1)))
    columns = max(1, min(7, fitting, len(labels)))
    figure.legend(
        [found[label] for label in labels], labels, loc="outside upper left", ncols=columns,
        frameon=False, fontsize=9, handlelength=3, title=title, title_fontsize=9.5, alignment="left",
    )  # fmt: skip
