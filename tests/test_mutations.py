"""The texts that `tests/tools/mutations.py` replaces are there, once each, and so are the tests it names."""

from pathlib import Path

import pytest
from mutations import MUTANTS, PAGE, ROOT, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_made(mutant):
    source = (ROOT / "trl_lambda" / mutant.file).read_text(encoding="utf-8")
    assert mutated(mutant, ROOT / "trl_lambda") != source
    for test in mutant.tests:
        file, _, function = test.partition("::")
        assert f"def {function}" in Path(ROOT, "tests", file).read_text(encoding="utf-8")


def test_the_page_has_every_mutant_and_none_that_survived():
    page = PAGE.read_text(encoding="utf-8")
    names = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines()[6:]]
    assert names == [mutant.name for mutant in MUTANTS]
    assert "**nothing**" not in page
