"""Rows of `results.csv`: one number each, with what it is worth nothing without."""

import argparse
import csv
import functools
import math
import platform
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recipes.studies.shared.machine import ROOT, commit, processor

RESULTS = ROOT / "recipes" / "studies" / "cost" / "results.csv"
MEASURED = ("bench", "arm", "setting", "metric", "value", "low", "high", "unit", "pairs")
CIRCUMSTANCES = ("device", "hardware", "torch", "trl", "transformers", "python", "commit")
COLUMNS: tuple[str, ...] = (*MEASURED, *CIRCUMSTANCES)


def row(
    bench: str,
    arm: str,
    setting: str,
    metric: str,
    value: float | int | Sequence[float] | str,
    unit: str,
) -> dict[str, str | float | int]:
    """
    One measured row.

    Args:
        bench, arm, setting, metric, unit (`str`): what was measured, on what, in which unit.
        value: a number; or several, of which the median and the quartiles are kept; or a word where there is none.
    """
    measured = {"bench": bench, "arm": arm, "setting": setting, "metric": metric, "unit": unit}
    if isinstance(value, str | int | float):
        return measured | {"value": value, "low": "", "high": "", "pairs": ""}
    low, middle, high = quartiles(value)
    return measured | {"value": middle, "low": low, "high": high, "pairs": len(value)}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@functools.cache
def circumstances(device: str) -> dict[str, str]:
    """Hardware, versions and commit of a measurement on `device` (`"cpu"` or `"cuda"`)."""
    versions = {name: version(name) for name in ("torch", "trl", "transformers")}
    hardware = (
        torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} thread(s)"
    )
    return {
        "device": device,
        "hardware": hardware,
        **versions,
        "python": platform.python_version(),
        "commit": commit(),
    }


def append(path: Path, rows: Iterable[dict[str, Any]], device: str) -> None:
    """Append rows to a CSV file, which gets its header when it is new."""
    new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for measured in rows:
            writer.writerow({name: _short(x) for name, x in (measured | circumstances(device)).items()})
            print("{bench} | {arm} | {setting} | {metric}: {value} {unit}".format(**_shown(measured)), flush=True)


def read(path: Path) -> list[dict[str, str]]:
    """All rows of a results file, as text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def bench_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser of the options that every bench has, described by the first paragraph of its docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").strip().split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file to append to (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to try the script itself")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch on a CPU")
    return parser


def _short(value: float | int | str) -> str:
    """Six significant digits: more than any of these measurements has."""
    return f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _shown(measured: dict[str, Any]) -> dict[str, str]:
    spread = "" if measured["low"] == "" else f" [{_short(measured['low'])}, {_short(measured['high'])}]"
    return measured | {"value": _short(measured["value"]) + spread}
