"""Every command of README, CONTRIBUTING and docs is run by a test or by CI, or says that it needs a GPU or a network."""

import re
import subprocess
from pathlib import Path

import pytest
from documents import PAGES, ROOT, commands, name, prose

# command -> what runs it: a test, a line of .ci/run, or what it needs, which its own line or sentence then says.
CHECKED_BY = {
    "make demo": "tests/test_train_script.py::test_the_documented_command_trains_and_writes_its_files",
    "make test": ".ci/run",
    "make setup": ".ci/run",
    "make lint": ".ci/run",  # by `make test`
    "make versions": "network",
    "make docs": "tests/test_docs.py::test_the_site_is_built_without_a_warning",
    "make pictures": "tests/test_docs.py::test_the_pictures_are_drawn",
    'pip install -e ".[plots]"': "network",
    "trl-lambda train --config run.yaml": "tests/test_release.py::test_a_user_without_a_checkout_trains_draws_and_launches",
    "trl-lambda report runs/playground": "tests/test_cli.py::test_train_and_report_from_an_empty_folder_with_files_alone",
    "trl-lambda report runs/playground --html": "tests/test_release.py::test_a_user_without_a_checkout_trains_draws_and_launches",
    "accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes 8 recipes/train.py --config "
    "recipes/configs/math_qwen2.5-7b.yaml": "GPU",
}  # fmt: skip
FOUND = [(name(path), command, comment) for path in PAGES for command, comment in commands(path)]


def test_every_command_is_in_the_table_and_the_table_has_no_other():
    assert {command for _, command, _ in FOUND} == CHECKED_BY.keys()


@pytest.mark.parametrize(("page", "command", "comment"), FOUND)
def test_what_checks_a_command_is_there(page: str, command: str, comment: str):
    check = CHECKED_BY[command]
    if check in ("network", "GPU"):
        assert f"needs a {check}" in comment, f"{page} must say that {command!r} needs a {check}"
    elif check == ".ci/run":
        script = (ROOT / check).read_text(encoding="utf-8")
        assert command in script or command == "make lint" and re.search(r"make test", script)
    else:
        file, _, test = check.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_make_target_that_is_named_exists(path: Path):
    named = set(re.findall(r"`make ([a-z-]+)", prose(path)))
    assert named <= targets(), named - targets()


@pytest.mark.parametrize("target", sorted(targets()))
def test_a_target_can_be_planned(target: str):
    """`make` finds every rule and variable that a target needs, without running it."""
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
