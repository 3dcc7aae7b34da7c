"""`trl-lambda`: the version, and two commands that take over what follows them."""

import subprocess
import sys

import pytest

import trl_lambda
from trl_lambda import cli


def test_the_version_takes_no_import_of_trl(tmp_path):
    code = "import sys; from trl_lambda import cli; print('trl' in sys.modules, 'torch' in sys.modules); cli.main()"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert done.stdout == f"False False\ntrl-lambda {trl_lambda.__version__}\n" and done.returncode == 0


def test_public_names_are_imported_when_asked_for():
    for name in trl_lambda.__all__:
        assert getattr(trl_lambda, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'LambdaGRPOTrainers'"):
        _ = trl_lambda.LambdaGRPOTrainers


@pytest.mark.parametrize("arguments", [[], ["tain"], ["--config", "x.yaml"]])
def test_what_is_no_command_ends_in_one_line_that_names_them(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "trl-lambda: error: " in (text := capsys.readouterr().err) and "train" in text and "report" in text


def test_each_command_is_handed_what_follows_it(tmp_path, capsys):
    with pytest.raises(SystemExit, match="^error: no model: "):
        cli.main(["train", "--use_cpu", "--bf16", "false"])
    with pytest.raises(SystemExit, match="^error: .*nowhere"):
        cli.main(["report", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as done:
        cli.main(["train", "--help"])
    assert done.value.code == 0 and "\ntrl-lambda:\n" in capsys.readouterr().out
