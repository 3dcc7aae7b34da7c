"""Write the playground's data files, always the same bytes: `python -m recipes.playground.make_data`."""

import argparse
import json
from pathlib import Path

from recipes.playground.tasks import TASKS, make_splits

DATA_DIR = Path(__file__).parent / "data"


def write_data(data_dir: Path) -> list[Path]:
    """
    Write one JSON-lines file per task and split, with the columns `prompt` and `solution`, and what its
    environment needs.

    Args:
        data_dir (`Path`):
            Folder that gets one sub-folder per task, which `datasets.load_dataset` reads.

    Returns:
        `list[Path]`: the files written.
    """
    written = []
    for task in TASKS:
        (data_dir / task).mkdir(parents=True, exist_ok=True)
        for split, problems in make_splits(task).items():
            rows = [json.dumps(problem.row()) for problem in problems]
            path = data_dir / task / f"{split}.jsonl"
            path.write_text("\n".join(rows) + "\n", encoding="ascii", newline="\n")
            written.append(path)
    return written


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, default=DATA_DIR, help="folder to write to (default: %(default)s)")
    for path in write_data(parser.parse_args().data_dir):
        print(path)


if __name__ == "__main__":
    main()
