"""Every command that a page, a recipe or a workflow gives can be run: options, files and targets exist."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from documents import PAGES, ROOT, commands, name, prose

from recipes.train import RecipeArguments
from trl_lambda.scripts import grpo

FOUND = [(name(path), command) for path in PAGES for command in commands(path)]


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))


@pytest.mark.parametrize(("page", "command"), FOUND)
def test_a_command_is_one_that_its_program_takes(page: str, command: str, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] == "make":
        assert set(words[1:]) <= targets()
    elif words[:2] == ["trl-lambda", "train"] and Path(words[-1]).is_relative_to("recipes"):
        assert grpo.parse([*words[2:], "--use_cpu", "--bf16", "false"])
    elif words[:2] == ["accelerate", "launch"] or words[:2] == ["python", "recipes/train.py"]:
        args = launch_command_parser().parse_args(words[1:] if words[0] == "python" else words[2:])
        assert args.training_script == "recipes/train.py" or args.module
        assert args.config_file is None or Path(args.config_file).is_file()
        assert grpo.parse([*args.training_script_args, "--use_cpu", "--bf16", "false"], RecipeArguments)
    else:
        assert words[0] in ("git", "pip", "trl-lambda", "python", "cd"), f"{page} has a command of a new kind"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_make_target_that_is_named_exists(path: Path):
    named = set(re.findall(r"`make ([a-z-]+)", prose(path)))
    assert named <= targets(), named - targets()


@pytest.mark.parametrize("target", sorted(targets()))
def test_a_target_can_be_planned(target: str):
    """`make` finds every rule and variable that a target needs, without running it."""
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_workflows_run_what_the_repository_has():
    workflows = {path.stem: path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert workflows.keys() == {"ci", "newest-trl", "release"} and "run: .ci/run\n" in workflows["ci"]
    for text in [*workflows.values(), (ROOT / ".ci" / "run").read_text()]:
        assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= targets()
        assert all((ROOT / file).exists() for file in re.findall(r"\btests/[\w/]+(?:\.py)?", text)), text
    assert yaml.safe_load(workflows["release"])["jobs"]["publish"]["needs"] == "build"
