"""README and pages are plain English, as far as three numbers can say."""

from pathlib import Path

import pytest
from documents import PAGES, ROOT, measures, name, sentences

LIMITS = {"semicolons": 0.3, "what": 0.2, "length": 15.0}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_a_page_is_within_the_limits(path: Path):
    measured = measures(path.read_text(encoding="utf-8"))
    assert not {key: value for key, value in measured.items() if value > LIMITS[key]}


def test_the_readme_has_at_most_sixty_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 60


def test_the_measures_on_a_text_counted_by_hand():
    text = "# What is no sentence\nWhat is it? It does what it says; nothing more.\n\n```text\nwhat; ever\n```\n"
    text += "\n| cell one | what; it does |\n|---|---|\n`what; code` and [a link](what;it).\n"
    assert sentences(text)[:2] == ["What is it?", "It does what it says; nothing more."]
    # Words: 3 + 7, 2 + 3 in cells, 4 with `code` and the link's text. The heading and the fence are left out.
    assert measures(text) == pytest.approx({"semicolons": 100 * 2 / 19, "what": 100 * 2 / 19, "length": 14 / 3})
