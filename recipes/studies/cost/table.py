"""
Print results.csv as tables. Where a figure has been measured twice on one machine, the later counts.

    python -m recipes.studies.cost.table
    python -m recipes.studies.cost.table --write recipes/studies/cost/README.md  # between its `bench:` marks
    python -m recipes.studies.cost.table --write docs/cost.md --overhead-only  # the first tables alone
    python -m recipes.studies.cost.table --gpu --write recipes/studies/cost/README.md  # gpu.csv, `gpu:` marks
"""

import argparse
from pathlib import Path

from recipes.studies.cost.gpu_parts import cost
from recipes.studies.cost.measure.rows import RESULTS, read
from recipes.studies.cost.measure.trainers import BASELINE
from recipes.studies.shared.markdown import markdown_table

GPU_RESULTS = RESULTS.with_name("gpu.csv")
_TIMES = ("loss forward", "backward", "optimizer", "whole step")
_PEAKS = ("peak memory",)
_TRAFFIC = {
    "loss: device reads": "device reads in the loss",
    "step: device reads": "device reads per step",
    "step: collectives": "collectives per step",
    "step with log: collectives": "collectives per step with a log",
    "generation: collectives": "collectives per generation batch",
}


class Results:
    """
    Rows of a results file, found by what was measured.

    Args:
        rows (`list[dict]`): as `read` returns them.
    """

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.rows = {self._key(row): row for row in rows}  # the last of equals

    @staticmethod
    def _key(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in ("hardware", "bench", "setting", "arm", "metric", "unit"))

    def groups(self, bench: str) -> list[tuple[str, str]]:
        """(hardware, setting) of a bench, in the order of the file."""
        return list(dict.fromkeys((r["hardware"], r["setting"]) for r in self.rows.values() if r["bench"] == bench))

    def arms(self, bench: str, group: tuple[str, str]) -> list[str]:
        """Arms of a bench in one group."""
        found = (r for r in self.rows.values() if r["bench"] == bench)
        return list(dict.fromkeys(r["arm"] for r in found if (r["hardware"], r["setting"]) == group))

    def get(self, bench: str, group: tuple[str, str], arm: str, metric: str, unit: str) -> dict[str, str] | None:
        """One row, or nothing."""
        return self.rows.get((group[0], bench, group[1], arm, metric, unit))


def ratio(row: dict[str, str] | None) -> str:
    """A ratio and its quartiles."""
    if row is None:
        return "–"
    value = f"{float(row['value']):.3f}"
    return value if row["low"] == "" else f"{value} ({float(row['low']):.3f} – {float(row['high']):.3f})"


def number(row: dict[str, str] | None, scale: float = 1.0) -> str:
    """A value to three digits, or the word that stands for it."""
    if row is None:
        return "–"
    try:
        return f"{float(row['value']) * scale:.3g}"
    except ValueError:
        return row["value"]


def overhead(results: Results) -> list[str]:
    """Ratios to `GRPOTrainer`, and traffic, by setting."""
    return beside_the_baseline(results, "overhead", _TIMES, _PEAKS)


def beside_the_baseline(results: Results, bench: str, times: tuple[str, ...], peaks: tuple[str, ...]) -> list[str]:
    """Two tables a setting: ratios to `GRPOTrainer`, and traffic."""
    parts = []
    for group in results.groups(bench):
        arms = [arm for arm in results.arms(bench, group) if arm != BASELINE]
        base = results.get(bench, group, BASELINE, "whole step", "ms")
        if base is None:
            continue
        sample = next(row for row in results.rows.values() if (row["hardware"], row["setting"]) == group)
        caption = f"{group[1]}; `GRPOTrainer` takes {number(base)} ms a step"
        caption += f" ({group[0]}; torch {sample['torch']}, TRL {sample['trl']}; {sample['commit']})."
        body = [
            [arm, *(ratio(results.get(bench, group, arm, metric, "ratio")) for metric in (*times, *peaks))]
            for arm in arms
        ]
        parts.append(f"{caption}\n\n" + markdown_table(["ratio to `GRPOTrainer`", *times, *peaks], body))
        traffic = [
            [arm, *(number(results.get(bench, group, arm, metric, "count")) for metric in _TRAFFIC)]
            for arm in (BASELINE, *arms)
        ]
        parts.append(markdown_table(["", *_TRAFFIC.values()], traffic))
    return parts


def by_size(results: Results, bench: str, metric: str, unit: str, scale: float, title: str) -> list[str]:
    """One table a machine, arms down and settings across."""
    parts = []
    for hardware in dict.fromkeys(hardware for hardware, _ in results.groups(bench)):
        cells = {
            (row["arm"], row["setting"]): number(row, scale)
            for row in results.rows.values()
            # Without a unit it is a word that says why there is no number.
            if (row["hardware"], row["bench"], row["metric"]) == (hardware, bench, metric)
            and row["unit"] in (unit, "")
        }
        arms, settings = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
        body = [[arm, *(cells.get((arm, setting), "–") for setting in settings)] for arm in arms]
        parts.append(f"{title} ({hardware})\n\n" + markdown_table(["", *settings], body))
    return parts


def single(results: Results, bench: str) -> list[str]:
    """Every figure of a bench, one a line."""
    body = [
        [row["arm"], row["setting"], row["metric"], f"{number(row)} {row['unit']}"]
        for row in results.rows.values()
        if row["bench"] == bench
    ]
    return [markdown_table(["", "setting", "figure", "median"], body)] if body else []


def markdown(path: Path = RESULTS) -> str:
    """All tables."""
    results = Results(read(path))
    parts = overhead(results)
    parts += by_size(
        results, "head", "peak of the loss", "MiB", 1 / 1024, "Peak of one loss and its backward pass, GiB"
    )
    parts += by_size(results, "weights", "time", "s", 1e6, "The weights alone, µs a call")
    parts += by_size(results, "weights", "bytes beside the floor", "ratio", 1.0, "Bytes moved, of the floor's")
    return "\n\n".join([*parts, *single(results, "generation"), *single(results, "import")]) + "\n"


def gpu_markdown(path: Path) -> str:
    """The tables of the rows of `recipes.studies.cost.gpu`, or a line that says that there are none."""
    if not path.exists():
        return "No GPU row yet: `make gpu` writes them.\n"
    results = Results(read(path))
    benches = list(dict.fromkeys(row["bench"] for row in results.rows.values()))
    parts = []
    for bench in benches:
        if bench == cost.BENCH:
            parts += beside_the_baseline(results, bench, ("whole step",), _PEAKS)
        else:
            parts += [f"{bench}\n\n{table}" for table in single(results, bench)]
    return "\n\n".join(parts) + "\n"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def replace_between(path: Path, mark: str, text: str) -> None:
    """
    Write a text into a file, between its two marks.

    Raises:
        ValueError: if they are not there.
    """
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, first, rest = _text(path).partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise ValueError(f"{path} has no {begin} and {end}.")
    path.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, or write them into a file between its marks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().split("\n\n")[0])
    parser.add_argument("--results", type=Path, help="CSV file (default: results.csv, with --gpu gpu.csv)")
    parser.add_argument("--write", type=Path, help="a Markdown file with the two marks")
    parser.add_argument("--overhead-only", action="store_true", help="only what a step costs beside GRPOTrainer")
    parser.add_argument("--gpu", action="store_true", help="the rows of `make gpu`")
    args = parser.parse_args(arguments)
    path = args.results or (GPU_RESULTS if args.gpu else RESULTS)
    try:
        if args.gpu:
            text = gpu_markdown(path)
        elif args.overhead_only:
            text = "\n\n".join(overhead(Results(read(path)))) + "\n"
        else:
            text = markdown(path)
        if args.write is None:
            print(text, end="")
        else:
            replace_between(args.write, "gpu" if args.gpu else "bench", text)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
