"""`trl_lambda.scripts.grpo`: TRL's own options, processes as `trl grpo` starts them, refusals in one line."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import trl.scripts.grpo as trl_script
from stand_ins import GSM8K, write_dataset, write_model
from trl import GRPOConfig

import trl_lambda
from trl_lambda import LambdaGRPOConfig
from trl_lambda.scripts import grpo

ROOT = Path(trl_lambda.__file__).parent.parent
CPU = ["--use_cpu", "--bf16", "false"]


def reward(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_model(folder / "model")
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text('{"prompt": "aeo"}\n{"prompt": "oa"}\n')
    write_dataset(folder / "sums", {"main": {"train": GSM8K, "test": GSM8K[:1]}})
    (folder / "my_reward.py").write_text(
        "def length(completions, **kwargs):\n    return [float(len(text)) for text in completions]\n"
    )
    return folder


def options(files: Path, output_dir: Path, **changes) -> dict:
    return {
        "model_name_or_path": str(files / "model"), "dataset_name": str(files / "data"), "use_cpu": True,
        "reward_funcs": ["test_grpo_script.reward"], "output_dir": str(output_dir), "max_steps": 2, "save_steps": 1,
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "report_to": "none",
        "bf16": False, "logging_steps": 1,
    } | changes  # fmt: skip


def write_yaml(path: Path, content: dict) -> list[str]:
    path.write_text(json.dumps(content))  # JSON is YAML
    return ["--config", str(path)]


def error_of(*arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        grpo.train(list(arguments))
    line = caught.value.code  # a string: printed to stderr, exit status 1
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line
    return line


@pytest.fixture
def built(monkeypatch) -> dict:
    seen: dict = {}

    def make_trainer(**kwargs):
        seen.update(kwargs)
        raise ValueError("made")

    monkeypatch.setattr(grpo, "LambdaGRPOTrainer", make_trainer)
    return seen


def test_every_option_of_trl_is_one_here_and_ours_come_first_in_the_help():
    theirs, ours = trl_script.make_parser(), grpo.make_parser()
    assert type(ours) is type(theirs)
    known = {action.option_strings[0]: (action.nargs, action.choices) for action in ours._actions}
    for action in theirs._actions:
        assert known[action.option_strings[0]] == (action.nargs, action.choices)
    first = ours.format_help().partition("\noptions:")[0]
    added = {field.name for field in fields(LambdaGRPOConfig)} - {field.name for field in fields(GRPOConfig)}
    listed = set(re.findall(r"^  --(\w+)", first, re.MULTILINE)) - {"no_lambda_learnable", "no_token_metrics"}
    assert listed == added | {"dataset_preparation", "plot"}


VALUES = {
    "scale_rewards": False, "resume_from_checkpoint": True, "reward_funcs": ["accuracy_reward", "a.b"],
    "learning_rate": "1e-6", "model_init_kwargs": {"dtype": "float32"}, "datasets": [{"path": "a", "split": "b+c"}],
    "load_in_4bit": True, "eval_strategy": "no", "lr_scheduler_kwargs": {}, "dataset_config": None,
}  # fmt: skip


def test_values_in_yaml_arrive_as_in_trls_script(tmp_path):
    arguments = [*write_yaml(tmp_path / "run.yaml", VALUES | {"num_processes": 2, "output_dir": "out"}), *CPU]
    theirs = trl_script.make_parser().parse_args_and_config(arguments, fail_with_unknown_args=False)
    *ours, launch, _ = grpo.parse(arguments)
    assert launch == ["--num_processes", "2"]
    for their, our in zip(theirs, ours, strict=True):
        for field in fields(their):
            if field.name != "logging_dir":  # holds the time
                assert repr(getattr(our, field.name)) == repr(getattr(their, field.name)), field.name
    assert ours[1].scale_rewards == "none" and ours[0].reward_funcs == ["accuracy_reward", "a.b"]


def test_model_rewards_quantization_and_lora_reach_the_trainer(files, tmp_path, built):
    chosen = options(
        files, tmp_path / "out", load_in_4bit=True, use_peft=True, lora_r=4, model_revision="v1", dtype="float32",
        model_init_kwargs={"revision": "v2"}, reward_model_name_or_path="some/model", eval_strategy="steps",
        dataset_test_split="train", reward_funcs=["think_format_reward", "test_grpo_script.reward"],
    )  # fmt: skip
    assert error_of(*write_yaml(tmp_path / "run.yaml", chosen)) == "error: made"
    assert built["quantization_config"].load_in_4bit and built["peft_config"].r == 4
    wanted = {"revision": "v2", "trust_remote_code": False, "attn_implementation": None, "dtype": "float32"}
    assert built["args"].model_init_kwargs == wanted
    model, *functions = built["reward_funcs"]
    assert model == "some/model" and [f.__name__ for f in functions] == ["think_format_reward", "reward"]
    assert len(built["train_dataset"]) == len(built["eval_dataset"]) == 2
    chosen["reward_funcs"] = "get_soft_overlong_punishment"  # one name, not a list
    assert error_of(*write_yaml(tmp_path / "run.yaml", chosen)) == "error: made"
    assert built["reward_funcs"][1]([[0] * 1152, [0] * 10]) == [-0.5, 0.0]


def test_a_mixture_of_datasets_is_split_and_prepared(files, tmp_path, built):
    mixture = [{"path": str(files / "sums"), "name": "main", "split": split} for split in ("train", "test")]
    chosen = options(files, tmp_path / "out", datasets=mixture, test_split_size=1, eval_strategy="steps")
    chosen["dataset_preparation"] = "recipes.preparations.gsm8k"
    with pytest.warns(UserWarning, match="dataset_name has no effect beside datasets"):
        error_of(*write_yaml(tmp_path / "run.yaml", chosen))
    assert (len(built["train_dataset"]), len(built["eval_dataset"])) == (2, 1)
    assert built["train_dataset"].column_names == ["prompt", "solution"]
    del chosen["datasets"], chosen["test_split_size"], chosen["eval_strategy"]  # a stream has no column names
    chosen |= {"dataset_name": str(files / "sums"), "dataset_config": "main", "dataset_streaming": True}
    error_of(*write_yaml(tmp_path / "run.yaml", chosen))
    rows = list(built["train_dataset"])
    assert [row["solution"] for row in rows] == ["72", "1000"] and rows[0].keys() == {"prompt", "solution"}
    assert built["eval_dataset"] is None


def test_launch_options_go_to_accelerate_and_the_rest_to_the_script(files, tmp_path, monkeypatch):
    launched = []
    monkeypatch.setattr(grpo, "launch_command", launched.append)
    config = options(files, tmp_path, accelerate_config="zero2", num_processes=8)
    arguments = [*write_yaml(tmp_path / "run.yaml", config), "--num_processes", "2", "--max_steps", "2"]
    grpo.train([*arguments, "--mixed_precision", "no", "--accelerate_config", "fsdp2"])
    (args,) = launched
    assert args.module and args.training_script == "trl_lambda.scripts.grpo" and args.quiet
    assert (args.num_processes, args.mixed_precision, Path(args.config_file).stem) == (2, "no", "fsdp2")
    assert args.training_script_args == [*arguments[:2], "--max_steps", "2"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    grpo.train(["--output_dir", "out", *CPU])
    assert launched[1].training_script_args == ["--output_dir", "out", *CPU]


def test_a_yaml_file_with_launch_options_trains_and_resumes(files, tmp_path, monkeypatch, capsys):
    launch = {"num_processes": 1, "mixed_precision": "no", "dynamo_backend": "no", "accelerate_config": "single_gpu"}
    config = options(files, tmp_path / "out", scale_rewards=False, **launch) | {"reward_funcs": "my_reward.length"}
    arguments = write_yaml(tmp_path / "run.yaml", config)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "trl_lambda.cli", "train", *arguments, "--cpu"]
    done = subprocess.run(command, cwd=files, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Summary of 2 optimizer steps" in done.stdout
    lam = json.loads((tmp_path / "out" / "lambda.json").read_text())["lambda"]
    assert re.search(rf"^  lambda .* -> {lam:.3f} \(step 1 -> 2\)$", done.stdout, re.MULTILINE)
    assert f" {tmp_path / 'out'}/lambda.json\n" in done.stdout
    # The same file resumes, here in this process.
    monkeypatch.chdir(files)
    config = {name: value for name, value in config.items() if name not in launch} | {"max_steps": 3}
    draw, drawn = grpo.plot_run, []  # the run itself, whatever an older one has left in the folder
    monkeypatch.setattr(grpo, "plot_run", lambda a, b, title: drawn.append((a[-1]["step"], title)) or draw(a, b))
    grpo.train([*write_yaml(tmp_path / "run.yaml", config), "--resume_from_checkpoint", "true", "--plot"])
    assert "(step 1 -> 3)" in capsys.readouterr().out
    assert (tmp_path / "out" / "run.png").read_bytes().startswith(b"\x89PNG")
    assert drawn == [(3, "out")]
    assert "huggingface.co/datasets" not in (tmp_path / "out" / "README.md").read_text()  # data of this machine
    config["resume_from_checkpoint"] = str(tmp_path / "out" / "checkpoint-2")
    arguments = write_yaml(tmp_path / "run.yaml", config)
    assert "checkpoint-2 was trained with 'lambda_grpo'" in error_of(*arguments, "--length_weight", "power")
    assert "nowhere has no trainer_state.json" in error_of(*arguments, "--resume_from_checkpoint", "nowhere")
    empty = ["--resume_from_checkpoint", "true", "--output_dir", str(files)]
    assert "has no checkpoint to resume from" in error_of(*arguments, *empty)


def test_lora_with_a_weight_of_ones_own(files, tmp_path):
    config = options(files, tmp_path / "out", use_peft=True, length_weight="user_weights.power")
    config |= {"length_weight_kwargs": None, "token_weight": "tr_grpo", "token_weight_kwargs": {"max": 1.2}}
    trainer = grpo.main(*grpo.parse(write_yaml(tmp_path / "run.yaml", config))[:4])
    assert trainer.state.global_step == 2 and trainer.lambda_value != 0
    assert trainer.length_weight.name == "user_weights.power"
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no options: name model, dataset and reward"),
        (["--config", __file__], "expected '<document start>'"),  # no YAML
        (["--config", "nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
        (["--lamda_init", "1"], "unknown argument '--lamda_init'; did you mean '--lambda_init'?"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--length_weight", "no.such"], "length_weight='no.such' cannot be imported (ModuleNotFoundError"),
        (["--output_dir", "x"], "no model: set model_name_or_path"),
        (["--model_name_or_path", "m"], "no dataset: set dataset_name"),
        (["--model_name_or_path", "m", "--reward_funcs", "exact"], "reward_funcs has 'exact'; accepted: accuracy_rew"),
        (["--model_name_or_path", "m", "--reward_funcs", "a.b"], "reward_funcs='a.b' cannot be imported"),
        (["--model_name_or_path", "m", "--dataset_name", "no/where"], "no/where"),
    ],
)
def test_what_the_user_can_mend_is_one_line(arguments, message):
    assert message in error_of(*arguments, *(CPU if arguments else []))


def test_an_unknown_option_of_a_file_is_named_in_every_process(tmp_path, monkeypatch):
    config = write_yaml(tmp_path / "run.yaml", {"lamda_init": 0.5, "use_cpu": True, "bf16": False})
    assert "unknown argument '--lamda_init'; did you mean" in error_of(*config)
    for arguments, message in ((config, "unknown argument"), ([*CPU, "--num_processes", "2"], "before the script")):
        monkeypatch.setattr(sys, "argv", ["grpo.py", *arguments])
        with pytest.raises(ValueError, match=message):
            grpo.parse_in_script()


def test_plot_without_matplotlib_and_an_unfit_preparation_are_refused(files, tmp_path, monkeypatch):
    arguments = write_yaml(tmp_path / "run.yaml", options(files, tmp_path))
    assert "cannot be imported" in error_of(*arguments, "--dataset_preparation", "recipes.preparations.gsm9k")
    assert "question" in error_of(*arguments, "--dataset_preparation", "recipes.preparations.gsm8k")
    assert "no split 'test', only: train" in error_of(*arguments, "--eval_strategy", "steps")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # makes the import fail
    assert "matplotlib" in error_of(*arguments, "--plot")


def test_an_error_of_the_users_reward_keeps_its_traceback(files, tmp_path, monkeypatch):
    def broken(completions, **kwargs):
        raise ValueError("broken")

    monkeypatch.setattr(sys.modules[__name__], "reward", broken)
    with pytest.raises(ValueError, match="broken"):
        grpo.train(write_yaml(tmp_path / "run.yaml", options(files, tmp_path)))
