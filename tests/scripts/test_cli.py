"""`trl-lambda`: the version, and two commands that are handed what follows them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import write_model

import trl_lambda
from trl_lambda import cli
from trl_lambda.training import load_splits

ROOT = Path(__file__).parent.parent


def test_the_version_is_the_packages_and_takes_no_import_of_trl():
    code = "import sys; from trl_lambda import cli; print('trl' in sys.modules, 'torch' in sys.modules); cli.main()"
    done = subprocess.run([sys.executable, "-c", code, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"False False\ntrl-lambda {trl_lambda.__version__}\n" and done.returncode == 0


def test_the_package_shows_its_names_before_it_imports_them():
    assert set(trl_lambda.__all__) <= set(dir(trl_lambda))
    for name in trl_lambda.__all__:
        assert getattr(trl_lambda, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'LambdaGRPOTrainers'"):
        _ = trl_lambda.LambdaGRPOTrainers


@pytest.mark.parametrize("arguments", [[], ["tain"], ["--config", "x.yaml"]])
def test_what_is_no_command_ends_in_one_line_that_names_them(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert re.search(r"^trl-lambda: error: .*train", capsys.readouterr().err, re.MULTILINE)


def test_each_command_is_handed_what_follows_it(tmp_path):
    with pytest.raises(SystemExit, match="^error: unknown argument 'lamda_init'; did you mean 'lambda_init'\\?$"):
        cli.main(["train", "--use_cpu", "--bf16", "false", "--lamda_init", "0.5"])
    with pytest.raises(SystemExit, match="is no folder; accepted: the output_dir of a run.$"):
        cli.main(["report", str(tmp_path / "nowhere")])


def test_train_and_report_from_an_empty_folder_with_files_alone(tmp_path, monkeypatch, capsys):
    """Model, dataset, reward and configuration of the user's: nothing of the repository is in reach."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "aeo"}\n{"prompt": "oa"}\n')
    (tmp_path / "my_reward.py").write_text(
        "def length(completions, **kwargs):\n    return [float(len(text)) for text in completions]\n"
    )
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: model\ndataset_name: rows.jsonl\nreward_funcs: my_reward.length\noutput_dir: out\n"
        "max_steps: 2\nper_device_train_batch_size: 4\nnum_generations: 4\nmax_completion_length: 8\n"
        "use_cpu: true\nbf16: false\nlogging_steps: 1\nreport_to: none\ndisable_tqdm: true\nsave_strategy: 'no'\n"
    )
    cli.main(["train", "--config", "run.yaml"])
    assert "Summary of 2 optimizer steps" in capsys.readouterr().out
    assert (tmp_path / "out" / "lambda.json").is_file()
    cli.main(["report", "out"])
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_dataset_may_be_one_file_of_a_known_format(tmp_path):
    from trl import DatasetMixtureConfig

    from trl_lambda.training import LambdaGRPOScriptArguments

    (tmp_path / "rows.csv").write_text("prompt,solution\n1+1=,2\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+2=", "solution": "3"}\n')
    (tmp_path / "rows.xlsx").write_text("")
    for name, prompt in (("rows.csv", "1+1="), ("rows.jsonl", "1+2=")):
        rows, _ = load_splits(LambdaGRPOScriptArguments(str(tmp_path / name)), DatasetMixtureConfig(), False)
        assert rows["prompt"] == [prompt]
    with pytest.raises(ValueError, match="rows.xlsx', which cannot be loaded: a file must end in one of .json, "):
        load_splits(LambdaGRPOScriptArguments(str(tmp_path / "rows.xlsx")), DatasetMixtureConfig(), False)
