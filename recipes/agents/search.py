"""
Search over a local index as an environment: full-text search of SQLite (FTS5, ranked by BM25).

    python -m recipes.agents.search hotpotqa/hotpot_qa --config distractor --output runs/hotpotqa.sqlite

writes the index of the paragraphs that a dataset's `context` column has; `SEARCH_INDEX` names the file for training.
"""

import argparse
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from datasets import load_dataset

INDEX_VARIABLE = "SEARCH_INDEX"
DEFAULT_INDEX = "runs/search_index.sqlite"
RESULTS = 3
PARAGRAPH_CHARACTERS = 600  # of a paragraph that are shown
QUERY_WORDS = 32  # of a query that are used


def build_index(paragraphs: Iterable[tuple[str, str]], path: str | Path) -> int:
    """
    Write the index of some paragraphs, each once.

    Args:
        paragraphs (`Iterable[tuple[str, str]]`):
            Title and text of each.
        path (`str` or `Path`):
            The file; one that is there is replaced once the new one is whole.

    Returns:
        `int`: number of paragraphs.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.unlink(missing_ok=True)
    with closing(sqlite3.connect(unfinished)) as connection, connection:
        connection.execute("CREATE VIRTUAL TABLE paragraphs USING fts5(title, text)")
        unique = dict.fromkeys(paragraphs)
        connection.executemany("INSERT INTO paragraphs VALUES (?, ?)", unique)
    unfinished.replace(path)
    return len(unique)


def context_paragraphs(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Title and text of the paragraphs in HotpotQA's `context` column: lists by name, or a list of paragraphs."""
    for row in rows:
        context = row["context"]
        if isinstance(context, dict):
            pairs = zip(context["title"], context["sentences"], strict=True)
        else:
            pairs = ((paragraph["title"], paragraph["sentences"]) for paragraph in context)
        for title, sentences in pairs:
            yield title, "".join(sentences).strip()


class Search:
    """The environment: the same index for every rollout, and a tool that searches it."""

    def __init__(self) -> None:
        path = Path(os.environ.get(INDEX_VARIABLE, DEFAULT_INDEX))
        if not path.is_file():
            raise ValueError(f"there is no index at {path}: make one, or set {INDEX_VARIABLE}.")
        # Read only: a policy's query can change nothing. One rollout after another uses it, maybe in other threads.
        self._connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)

    def reset(self, **row: Any) -> None:
        """Start a rollout: there is nothing to forget, and the row's prompt is the whole question."""

    def search(self, query: str) -> str:
        """
        Search the library for paragraphs that have words of the query.

        Args:
            query: A few words, such as "director of the film Alien".

        Returns:
            The best paragraphs, each with its title.
        """
        # Each word is quoted, so that none is an operator of FTS5's own language.
        words = re.findall(r"\w+", query)[:QUERY_WORDS]
        if not words:
            raise ValueError("the query has no words.")
        found = self._connection.execute(
            "SELECT title, text FROM paragraphs WHERE paragraphs MATCH ? ORDER BY rank LIMIT ?",
            (" OR ".join(f'"{word}"' for word in words), RESULTS),
        ).fetchall()
        if not found:
            return "Nothing was found."
        return "\n".join(f"{title}: {text[:PARAGRAPH_CHARACTERS]}" for title, text in found)


REQUEST = (
    "Search the library as often as you need. Then give the answer alone, in a few words, within "
    "<answer> and </answer>."
)


def hotpotqa(question: str, answer: str) -> dict[str, Any]:
    """
    Prepare `hotpotqa/hotpot_qa`: a `dataset_preparation`.

    Args:
        question (`str`):
            A question that takes two paragraphs of Wikipedia.
        answer (`str`):
            Its answer, a few words.

    Returns:
        `dict`: `prompt` and `solution`.
    """
    return {"prompt": [{"role": "user", "content": f"{question}\n\n{REQUEST}"}], "solution": answer}


def main() -> None:
    """Write the index of a dataset's paragraphs."""
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="hub name or local folder")
    parser.add_argument("--config", help="its configuration")
    parser.add_argument("--output", type=Path, default=Path(DEFAULT_INDEX), help="file (default: %(default)s)")
    args = parser.parse_args()
    dataset = load_dataset(args.dataset, args.config)
    rows = (row for split in dataset for row in dataset[split])
    print(f"{build_index(context_paragraphs(rows), args.output)} paragraphs in {args.output}")


if __name__ == "__main__":
    main()
