"""`summary.csv` and `paired.csv`: what tables and figures show, in full."""

import csv
from pathlib import Path
from typing import Any

from recipes.studies.arena.analysis.comparisons import Arena
from recipes.studies.arena.analysis.runs import SUMMARIZED, values_of


def write_summary(arena: Arena, path: Path) -> None:
    """Write mean and standard deviation over seeds of every metric, one line per study, task and arm."""
    columns = [f"{name}_{part}" for name in SUMMARIZED for part in ("mean", "sd")]
    rows = []
    for (study, task), group in arena.groups.items():
        for arm, runs in group.items():
            row: list[Any] = [study, task, arm, len(runs), next(iter(runs.values())).settings[0]]
            for values in (values_of(runs, name) for name in SUMMARIZED):
                row += [values.mean() if len(values) else None, values.std(ddof=1) if len(values) > 1 else None]
            rows.append(row)
    _write(path, ["study", "task", "arm", "n", "learning_rate", *columns], rows)


def write_paired(arena: Arena, path: Path) -> None:
    """Write every comparison, one line each."""
    fields = ("n", "difference", "sd", "low", "high", "p", "p_holm", "p_sign_flip")
    rows = []
    for key, comparisons in arena.comparisons.items():
        for (arm, baseline), comparison in comparisons.items():
            rows.append([*key, arm, baseline, *(getattr(comparison, field) for field in fields)])
    _write(path, ["study", "task", "metric", "arm", "baseline", *fields], rows)


def _write(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    """Write a CSV, numbers to six digits so that rounding on another machine changes no line, empty where None."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row])
