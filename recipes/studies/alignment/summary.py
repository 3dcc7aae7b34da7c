"""Pool `alignment.csv` over seeds, and draw it."""

import csv
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

GROUP = ("task", "checkpoint", "learning_rate", "batches", "weight")
WITH_ERROR = ("ratio_raw", "ratio_adam", "lambda_gradient", "slope_raw", "slope_adam")
PLAIN = ("cosine_raw", "cosine_adam", "accuracy", "mean_length")
BASE = "dapo"  # λ = 0
# Checkpoints are told apart by lightness and shape, never by hue alone.
_RAMP = ("#9ac6e3", "#4a90c4", "#0b4083", "black")
_MARKERS = ("o", "s", "^", "D")
_LIMITS = (0, 2)  # where the cosine of λ = 0 is lost in noise, ratios and errors are boundless


def summary_rows(path: Path) -> list[dict[str, Any]]:
    """
    Pool the seeds of every task, checkpoint and weight.

    The value is the plain mean over seeds. Its standard error is the larger of two: √(Σ se²)/S from the errors within
    the S seeds, and sd/√S from the spread between them, which holds what training adds, but which three seeds may show
    too small by chance. For the base model the seeds are samples of one and the same model.

    Args:
        path (`Path`): `alignment.csv`.

    Returns:
        `list[dict[str, Any]]`: `GROUP` and `same_as` as text, `seeds`, means of `WITH_ERROR`, each with `*_se`, and of
        `PLAIN`; `None` where the file has nothing.
    """
    groups: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            groups[tuple(row[name] for name in GROUP)].append(row)
    pooled = []
    for key, rows in groups.items():
        summary: dict[str, Any] = dict(zip(GROUP, key, strict=True))
        summary |= {"same_as": rows[0]["same_as"], "seeds": len(rows)}
        for name in WITH_ERROR:
            summary[name] = summary[f"{name}_se"] = None
            if all(row[name] for row in rows):
                values, errors = ([float(row[column]) for row in rows] for column in (name, f"{name}_se"))
                summary[name], summary[f"{name}_se"] = statistics.fmean(values), pooled_error(values, errors)
        summary |= {name: statistics.fmean(float(row[name]) for row in rows) for name in PLAIN}
        pooled.append(summary)
    return pooled


def pooled_error(values: list[float], errors: list[float]) -> float:
    """Standard error of the plain mean: the larger of that from within and that from between, see `summary_rows`."""
    within = math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)
    between = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return max(within, between)


def plot(path: Path, image: Path) -> None:
    """
    Draw the ratios in Adam's metric: a panel per task, a line per weight, a mark per checkpoint, λ = 0 at 1.

    Args:
        path (`Path`): `alignment.csv`.
        image (`Path`): the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in summary_rows(path) if not row["same_as"] and row["weight"] != BASE]
    tasks, checkpoints, weights = (
        list(dict.fromkeys(row[name] for row in rows)) for name in ("task", "checkpoint", "weight")
    )
    figure = Figure(figsize=(2 + 3.5 * len(tasks), 1.6 + 0.36 * len(weights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        panel.axvline(1, color="0.6", linewidth=1, zorder=0)
        for i, checkpoint in enumerate(checkpoints):
            mine = [row for row in rows if (row["task"], row["checkpoint"]) == (task, checkpoint)]
            panel.errorbar(
                [row["ratio_adam"] for row in mine],
                [weights.index(row["weight"]) + 0.2 * (i - (len(checkpoints) - 1) / 2) for row in mine],
                xerr=[row["ratio_adam_se"] for row in mine],
                linestyle="none",
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=4,
                linewidth=1,
                color=_RAMP[i % len(_RAMP)],
                label=checkpoint if checkpoint == "base" else f"step {checkpoint}",
            )
        low, high = panel.get_xlim()
        panel.set_xlim(max(low, _LIMITS[0]), min(high, _LIMITS[1]))
        panel.set_title(task, fontsize=10)
        panel.set_xlabel("cosine with the policy gradient,\ndivided by that of λ = 0")
    panels[0].set_yticks(range(len(weights)), weights)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(checkpoints))
    figure.savefig(image, dpi=150)
