"""`trl-lambda`, and every command that a page or a workflow gives: its options, files and targets exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from documents import PAGES, ROOT, commands, name, prose

import trl_lambda
from recipes.train import RecipeArguments
from trl_lambda import cli
from trl_lambda.scripts import grpo


def test_the_version_takes_no_import_of_trl(tmp_path):
    code = "import sys; from trl_lambda import cli; print('trl' in sys.modules, 'torch' in sys.modules); cli.main()"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert done.stdout == f"False False\ntrl-lambda {trl_lambda.__version__}\n" and done.returncode == 0


def test_public_names_are_imported_when_asked_for():
    for public in trl_lambda.__all__:
        assert getattr(trl_lambda, public).__name__ == public
    with pytest.raises(AttributeError, match="no attribute 'LambdaGRPOTrainers'"):
        _ = trl_lambda.LambdaGRPOTrainers


@pytest.mark.parametrize("arguments", [[], ["tain"], ["--config", "x.yaml"]])
def test_what_is_no_command_ends_in_one_line_that_names_them(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "trl-lambda: error: " in (text := capsys.readouterr().err) and "train" in text and "report" in text


def test_each_command_is_handed_what_follows_it(tmp_path, capsys):
    with pytest.raises(SystemExit, match="^error: no model: "):
        cli.main(["train", "--use_cpu", "--bf16", "false"])
    with pytest.raises(SystemExit, match="^error: .*nowhere"):
        cli.main(["report", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as done:
        cli.main(["train", "--help"])
    assert done.value.code == 0 and "\ntrl-lambda:\n" in capsys.readouterr().out


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
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_workflows_run_what_the_repository_has():
    workflows = {path.stem: path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert workflows.keys() == {"ci", "newest-trl", "release"} and "run: .ci/run\n" in workflows["ci"]
    for text in [*workflows.values(), (ROOT / ".ci" / "run").read_text()]:
        assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= targets()
        assert all((ROOT / file).exists() for file in re.findall(r"\btests/[\w/]+(?:\.py)?", text)), text
    assert yaml.safe_load(workflows["release"])["jobs"]["publish"]["needs"] == "build"
