"""Every command of README, CONTRIBUTING and docs is run by a test or by CI, or says what it needs."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from documents import PAGES, ROOT, commands, name, prose

# command -> what runs it: a test, a line of .ci/run, or what it needs, which its own line or sentence then says.
WHEEL = "tests/test_release.py::test_a_user_without_a_checkout_trains_draws_and_launches"
EMPTY_FOLDER = "tests/test_cli.py::test_train_and_report_from_an_empty_folder_with_files_alone"
DOCUMENTED = "tests/test_train_script.py::test_the_documented_command_trains_and_writes_its_files"
CHECKED_BY = {
    "make demo": DOCUMENTED,
    "make test": ".ci/run",
    "make setup": ".ci/run",
    "make lint": ".ci/run",  # by `make test`
    "make versions": "network",
    "make docs": "tests/test_docs.py::test_the_site_is_built_without_a_warning",
    "make pictures": "tests/test_docs.py::test_the_pictures_are_drawn",
    'pip install -e ".[plots]"': "network",
    "trl-lambda train --config recipes/configs/playground.yaml": DOCUMENTED,
    "git clone https://github.com/trl-lambda/trl-lambda && cd trl-lambda": "network",
    "trl-lambda report runs/playground": EMPTY_FOLDER,
    "trl-lambda report runs/playground --html": WHEEL,
    "accelerate launch --config_file recipes/accelerate/zero3.yaml --num_processes 8 recipes/train.py --config "
    "recipes/configs/math_qwen2.5-7b.yaml": "GPU",
}
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


# ---- Workflows and hooks ----

WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def steps(workflow: dict) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def test_the_workflows_run_what_the_repository_has():
    assert WORKFLOWS.keys() == {"ci", "newest-trl", "release"}
    assert steps(WORKFLOWS["ci"]) == [".ci/run"]
    for workflow in WORKFLOWS.values():
        for command in steps(workflow):
            assert set(re.findall(r"\bmake ([a-z-]+)", command)) <= targets()
            assert all((ROOT / file).is_file() for file in re.findall(r"\btests/\w+\.py", command))
    triggers = {name: set(workflow[True]) for name, workflow in WORKFLOWS.items()}  # YAML 1.1 reads on as true
    assert "push" in triggers["ci"] and "schedule" in triggers["newest-trl"] and triggers["release"] == {"push"}
    assert WORKFLOWS["release"][True]["push"] == {"tags": ["v*"]}
    assert WORKFLOWS["release"]["jobs"]["publish"]["needs"] == "build"


def test_the_hooks_are_the_linters_of_the_makefile():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = {hook["entry"].split(" --")[0] for hook in repository["hooks"]}
    assert entries == {".venv/bin/ruff check", ".venv/bin/ruff format"}
    assert ".venv/" in (ROOT / ".gitignore").read_text()
