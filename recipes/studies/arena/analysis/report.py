"""
Tables and figures of the arena's first round, from `results/runs.csv`. Any part of the runs will do.

    python -m recipes.studies.arena.analysis.report

It writes into the folder of results `summary.csv` (mean and standard deviation of each arm), `paired.csv` (the
comparisons of two arms over the seeds that both have) and the figures, and replaces the tables of the arena's
`first_round.md` or, with `--results`, of a `README.md` in that folder. It needs `pip install "trl-lambda[arena]"`.
"""

import argparse
import os
import sys
from pathlib import Path

from recipes.studies.arena.analysis.comparisons import Arena
from recipes.studies.arena.analysis.csv_files import write_paired, write_summary
from recipes.studies.arena.analysis.curves import draw_curves, draw_lambda_paths
from recipes.studies.arena.analysis.forest import draw_forest, draw_lengths
from recipes.studies.arena.analysis.tables import make_tables
from recipes.studies.shared.markdown import replace_tables

RESULTS = Path(__file__).resolve().parent.parent / "results"
PAGE = RESULTS.parent / "first_round.md"
_FIGURES = {
    "accuracy_curves": draw_curves,
    "lambda_paths": draw_lambda_paths,
    "forest": draw_forest,
    "lengths": draw_lengths,
}


def write_report(results: Path, readme: Path | None = None) -> list[Path]:
    """
    Write the tables and figures of `results/runs.csv` beside it.

    Args:
        results (`Path`): the folder. Figures of studies other than "main" carry the study's name.
        readme (`Path`, *optional*): the page whose tables are replaced, if it exists.

    Returns:
        `list[Path]`: the files written.

    Raises:
        FileNotFoundError: if there is no `runs.csv`.
        ValueError: if it does not have the runs' form, has no run, or a marker of the page is not closed.
        ImportError: if matplotlib is not installed.
    """
    arena = Arena.read(results / "runs.csv")
    if not arena.groups:
        raise ValueError(f"{results / 'runs.csv'} has no run")
    write_summary(arena, results / "summary.csv")
    write_paired(arena, results / "paired.csv")
    written = [results / "summary.csv", results / "paired.csv"]
    if readme is not None and readme.exists():
        replaced = replace_tables(readme.read_text(encoding="utf-8"), make_tables(arena))
        readme.write_text(replaced, encoding="utf-8")
        written.append(readme)
    for study in arena.studies():
        for name, draw in _FIGURES.items():
            path = results / (f"{name}.png" if study == "main" else f"{name}_{study}.png")
            figure = draw(arena, study)
            if figure is not None:  # nothing to show, as of λ where none is learned
                figure.savefig(path, dpi=150)
                written.append(path)
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with runs.csv; default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        # Another folder of results brings its own page, if any: that of the arena shows the arena's results.
        page = PAGE if options.results.resolve() == RESULTS else options.results / "README.md"
        written = write_report(options.results, page)
    except (ValueError, ImportError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    for path in written:
        print(os.path.relpath(path))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
