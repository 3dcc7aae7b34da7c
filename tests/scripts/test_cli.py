"""`trl-lambda`: the version, and two commands that take over what follows them."""

import subprocess
import sys

import pytest
from stand_ins import write_model

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


def test_train_and_report_from_an_empty_folder_with_files_alone(tmp_path, monkeypatch, capsys):
    """Model, dataset, reward and configuration are the user's: nothing of the repository is in reach."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"prompt": "aeo"}\n{"prompt": "oa"}\n')
    (tmp_path / "own_reward.py").write_text(
        "def length(completions, **kwargs):\n    return [float(len(text)) for text in completions]\n"
    )
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: model\ndataset_name: rows\nreward_funcs: own_reward.length\noutput_dir: out\n"
        "max_steps: 2\nper_device_train_batch_size: 4\nnum_generations: 4\nmax_completion_length: 8\n"
        "use_cpu: true\nbf16: false\nlogging_steps: 1\nreport_to: none\ndisable_tqdm: true\nsave_strategy: 'no'\n"
    )
    cli.main(["train", "--config", "run.yaml"])
    assert "Summary of 2 optimizer steps" in capsys.readouterr().out
    assert (tmp_path / "out" / "lambda.json").is_file()
    cli.main(["report", "out"])
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
