"""Each mutant's text is in the code once, its test file exists, and MUTATIONS.md has it as caught."""

from mutations import MUTANTS, PAGE, ROOT, occurrences


def test_25_mutants_are_of_this_code_and_were_caught():
    page = PAGE.read_text(encoding="utf-8")
    assert len(set(MUTANTS)) == 25
    for mutant in MUTANTS:
        file, old, new, tests = mutant
        assert occurrences(mutant) == 1 and old != new and (ROOT / "tests" / tests).is_file(), mutant
        assert f"| `{file}` | `{old}` | `{new}` | `{tests}::test_" in page, mutant
