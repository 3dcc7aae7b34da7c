"""Each mutant's text is in the code once, its test file exists, and MUTATIONS.md has it as caught."""

import pytest
from mutations import MUTANTS, PAGE, ROOT, occurrences


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[1])
def test_a_mutant_is_of_this_code_and_was_caught(mutant):
    file, old, new, tests = mutant
    assert occurrences(mutant) == 1 and old != new and (ROOT / "tests" / tests).is_file()
    assert f"| `{file}` | `{old}` | `{new}` | `{tests}::test_" in PAGE.read_text(encoding="utf-8")


def test_there_are_25():
    assert len(set(MUTANTS)) == 25
