"""`recipes/train.py`: the real command, its summary, and the one-line errors."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from trl_lambda import LambdaGRPOConfig
from trl_lambda import training as train

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "recipes" / "configs" / "playground.yaml"
BASE = ["--config", str(CONFIG)]


def command_in_config() -> list[str]:
    """The launch command that the YAML file's opening comment gives to its reader."""
    comment = "\n".join(line.lstrip("# ") for line in CONFIG.read_text().splitlines() if line.startswith("#"))
    command = re.search(r"^accelerate launch .*?playground\.yaml$", comment.replace("\\\n", " "), re.MULTILINE).group()
    return shlex.split(command)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """Two steps of the documented command, on smaller batches."""
    output_dir = tmp_path_factory.mktemp("run")
    _, _, *arguments = command_in_config()
    overrides = {
        "output_dir": output_dir,
        "dataset_test_split": "validation",
        "max_steps": 2,
        "eval_steps": 2,
        "per_device_train_batch_size": 16,
    }
    options = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True), output_dir


def test_the_documented_command_trains_and_writes_its_files(run):
    process, output_dir = run
    assert process.returncode == 0, process.stderr
    assert (output_dir / "model.safetensors").stat().st_size > 1e6
    assert (output_dir / "tokenizer.json").is_file()
    assert (output_dir / "run.png").read_bytes().startswith(b"\x89PNG")
    lam = json.loads((output_dir / "lambda.json").read_text())["lambda"]
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    assert lam != 0.0
    assert [entry["lambda/value"] for entry in history if "lambda/value" in entry][-1] == lam


def test_the_summary_says_what_the_log_says(run):
    process, output_dir = run
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    before, after = (entry for entry in history if "eval_reward" in entry)
    assert (before["step"], after["step"]) == (0, 2)
    lam = json.loads((output_dir / "lambda.json").read_text())["lambda"]
    text = re.sub(r" +", " ", process.stdout)
    reward, length = "eval_rewards/exact_answer/mean", "eval_completions/mean_length"
    assert f"held-out reward exact_answer {before[reward]:.3f} -> {after[reward]:.3f} (step 0 -> 2)" in text
    assert f"held-out mean length {before[length]:.3f} -> {after[length]:.3f} tokens (step 0 -> 2)" in text
    assert f"lambda 0.000 -> {lam:.3f} (learned)" in text
    for name in ("", "/lambda.json", "/README.md", "/run.png"):
        assert f" {output_dir}{name}\n" in text


def test_the_documented_command_leaves_accelerate_nothing_to_guess(run):
    process, _ = run
    assert "not passed to `accelerate launch`" not in process.stderr


def test_the_progress_bar_shows_reward_length_and_lambda(run):
    process, _ = run
    assert re.search(r"2/2 .*reward=\d\.\d+, length=\d+\.\d+, lambda=-?\d\.\d+", process.stderr)
    assert "'completions/mean_length'" not in process.stdout + process.stderr  # and not the line of all metrics


def test_an_error_ends_the_process_with_its_line_alone(tmp_path: Path):
    config = tmp_path / "bad.yaml"
    config.write_text("lamda_init: 0.5\nuse_cpu: true\nbf16: false\n")
    process = subprocess.run(
        [sys.executable, "recipes/train.py", "--config", str(config)], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 1
    # The last line: transformers 5 warns above it about an option that TRL sets by default.
    assert process.stderr.splitlines()[-1] == "error: unknown argument 'lamda_init'; did you mean 'lambda_init'?"
    assert "Traceback" not in process.stderr
    assert process.stdout == ""


def dataset(folder: Path, **columns: str) -> str:
    """A local dataset of one row in the splits that the playground's configuration asks for."""
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps(columns) + "\n")
    return str(folder)


def error_of(arguments: list[str], monkeypatch) -> str:
    """The line that the script ends with."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as exit_error:
        train.main()
    line = exit_error.value.code  # a string: printed to stderr, exit status 1
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml"], "--config cannot be read: [Errno 2] No such file or directory: 'nowhere.yaml'"),
        (["--config"], "--config needs the path of a YAML file"),
        ([*BASE, "--lambda_inti", "1"], "unknown argument 'lambda_inti'; did you mean 'lambda_init'?"),
        ([*BASE, "--max_steps", "many"], "max-steps: invalid int value: 'many'"),
        ([*BASE, "--aggregation", "mean"], "aggregation='mean' is unknown; accepted: "),
        ([*BASE, "--reward_funcs", "exact_answer"], "reward_funcs has 'exact_answer'; accepted: accuracy_reward, "),
        ([*BASE, "--reward_funcs", "recipes.playground.rewards.exact"], "has no attribute 'exact'"),
        ([*BASE, "--reward_funcs", "no.such.module"], "which cannot be imported (No module named 'no')"),
        (
            [*BASE, "--reward_funcs", "recipes.playground.tasks.SEED"],
            "'recipes.playground.tasks.SEED', which is a int",
        ),
        ([*BASE, "--model_name_or_path", "no/where"], "model_name_or_path is 'no/where', which cannot be loaded: "),
        ([*BASE, "--model_name_or_path", "recipes/configs"], "model_name_or_path is 'recipes/configs', which cannot"),
        ([*BASE, "--dataset_name", "no/where"], "dataset_name is 'no/where', which cannot be loaded: "),
        ([*BASE, "--dataset_name", "recipes/configs"], "dataset_name is 'recipes/configs', which cannot be loaded: "),
        (
            [*BASE, "--dataset_test_split", "dev"],
            "dataset_test_split is 'dev'; dataset_name is 'recipes/playground/data/running_sum', which has: train, ",
        ),
        (["--output_dir", "unused"], "no reward: set reward_funcs, reward_model_name_or_path, or both."),
        (["--reward_funcs", "think_format_reward"], "no model: set model_name_or_path"),
        (
            ["--reward_funcs", "think_format_reward", "--model_name_or_path", "recipes/playground/base_model"],
            "no dataset: set dataset_name",
        ),
    ],
)
def test_errors_are_one_line_that_names_the_field(arguments, message, monkeypatch):
    if arguments[0] == "--output_dir" or arguments[0] == "--reward_funcs":
        arguments = [*arguments, "--use_cpu", "--bf16", "false"]  # TRL's default precision needs a GPU
    assert message in error_of(arguments, monkeypatch)


def test_a_config_file_that_is_no_mapping_is_refused(tmp_path: Path, monkeypatch):
    for content in ("- a\n- b\n", "", "a: [1\n", "a: b: c\n"):
        (tmp_path / "bad.yaml").write_text(content)
        assert "bad.yaml" in error_of(["--config", str(tmp_path / "bad.yaml")], monkeypatch)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "lambda_bounds: [-1e0, 1e0]",
            "lambda_bounds has '-1e0', which YAML reads as text; accepted in this list: a number",
        ),
        ("lambda_bounds: 1", "lambda_bounds is 1; accepted: a list."),
        (
            "lambda_bounds: [null, 1]",
            "lambda_bounds has None, which YAML reads as nothing; accepted in this list: a num",
        ),
        ('lambda_init: "half"', "lambda-init: invalid float value: 'half'"),
        ("lambda_init: [0.5]", "lambda_init is [0.5]; accepted: a number."),
        ("lambda_init:", "lambda_init is empty; accepted: a number."),
        ("lambda_init: true", "lambda_init is true; YAML reads no, off, yes and on so"),
        (f"lambda_init: {'9' * 400}", "lambda_init is an integer of 400 digits; accepted: a number below 2**63."),
        (f"max_steps: {'9' * 5000}", "--config cannot be read: "),
        ("max_steps: 2.5", "max_steps is 2.5; accepted: an integer."),
        ("max_steps: {a: 1}", "max_steps is {'a': 1}; accepted: an integer."),
        ("eval_strategy: no", "eval_strategy is false; YAML reads no, off, yes and on so: put it in quotes"),
        ("output_dir: 5", "output_dir is 5; accepted: text."),
        ("reward_funcs: no_such_reward", "reward_funcs has 'no_such_reward'; accepted: accuracy_reward, "),
        ("reward_weights: 1.0", "reward_weights is 1.0; accepted: a list."),
        ("reward_weights: one", "reward_weights is 'one'; accepted: a list."),
        ("reward_funcs: [1]", "reward_funcs has 1, which YAML reads as an integer; accepted in this list: text."),
        ("1: 2", "has an option called 1; accepted: lines of `option: value`."),
        ("env: 3", "`env` field should be a dict"),
        ("a: " + "[" * 5000, "--config cannot be read: "),
        ("a: !!python/object/apply:os.getcwd []", "--config cannot be read: "),
        ("a: \\x00\xff", "--config cannot be read: "),
    ],
)
def test_bad_yaml_values_are_one_line_that_names_the_option(line, message, tmp_path: Path, monkeypatch):
    text = f"use_cpu: true\nbf16: false\n{line}\n".replace("\\x00", "\0")
    (tmp_path / "bad.yaml").write_text(text)
    assert message in error_of(["--config", str(tmp_path / "bad.yaml")], monkeypatch)


def test_good_yaml_values_arrive(tmp_path: Path):
    lines = ["learning_rate: 1e-6", "lambda_bounds: [-1, 1.5]", "lambda_init: 1", "max_steps: '3'", "report_to: none",
             "model_init_kwargs: {a: 1}", "gradient_checkpointing_kwargs: {use_reentrant: false}", "save_steps: 0.5",
             "dataset_config:", "reward_funcs: [a.b, c]", 'eval_strategy: "no"', "use_cpu: true", "bf16: false",
             "datasets: [{path: x}]", "lora_target_modules: all-linear",
             "reward_weights: [1, 0.5]", "lr_scheduler_kwargs: {}"]  # fmt: skip
    (tmp_path / "good.yaml").write_text("\n".join(lines))
    script_args, args, *_ = train.parse(["--config", str(tmp_path / "good.yaml")])
    assert (args.learning_rate, args.lambda_bounds, args.lambda_init, args.max_steps) == (1e-6, [-1, 1.5], 1, 3)
    assert script_args.reward_funcs == ["a.b", "c"] and args.model_init_kwargs == {"a": 1}


def test_a_type_error_of_the_configs_own_checks_is_one_line(monkeypatch):
    def post_init(self):
        raise TypeError("'<' not supported between instances of 'str' and 'int'")

    monkeypatch.setattr(LambdaGRPOConfig, "__post_init__", post_init)
    line = error_of([*BASE, "--lambda_bounds", "1", "2"], monkeypatch)
    assert "an option has a value of a wrong type or size ('<' not supported" in line and "--lambda_bounds" in line


MODULES = {
    "a syntax error": ("def f(:\n", "SyntaxError: invalid syntax (broken_rewards.py, line 1)"),
    "an error on import": ("1 / 0\n", "ZeroDivisionError: division by zero"),
    "a missing import": ("import no_such_module_anywhere\n", "No module named 'no_such_module_anywhere'"),
    "an exit": ("raise SystemExit(3)\n", "SystemExit: 3"),
    "a null byte": ("x = '\0'\n", "SyntaxError: source code string cannot contain null bytes"),
    "a circle": ("import broken_rewards\nbroken_rewards.f\n", "has no attribute 'f'"),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("option", ["reward_funcs", "dataset_preparation"])
def test_a_module_that_cannot_be_imported_is_one_line_that_names_the_option(kind, option, tmp_path: Path, monkeypatch):
    source, message = MODULES[kind]
    (tmp_path / "broken_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken_rewards", raising=False)
    line = error_of([*BASE, f"--{option}", "broken_rewards.f"], monkeypatch)
    assert (
        f"{option} {'has' if option == 'reward_funcs' else 'is'} 'broken_rewards.f', which cannot be imported ("
        in line
    )
    assert message in line and "accepted: " in line


@pytest.mark.parametrize("name", ["..a.b", ".a.b", ".f", "f.", "a..b", "", "."])
def test_names_that_are_no_dotted_path_are_one_line(name, monkeypatch):
    line = error_of([*BASE, "--reward_funcs", name], monkeypatch)
    assert f"reward_funcs has {name!r}" in line and "accepted: accuracy_reward, " in line


@pytest.mark.parametrize("state", ['{"log_history": [', "[" * 100_000, "9" * 5000])
def test_a_torn_checkpoint_is_refused_before_anything_is_loaded(state, tmp_path: Path, monkeypatch):
    (tmp_path / "trainer_state.json").write_text(state)
    line = error_of([*BASE, "--resume_from_checkpoint", str(tmp_path)], monkeypatch)
    assert f"resume_from_checkpoint is {str(tmp_path)!r}, whose trainer_state.json is damaged (" in line
    assert line.endswith("; resume from an older checkpoint.")


def test_a_dataset_without_prompts_is_refused(tmp_path: Path, monkeypatch):
    name = dataset(tmp_path, question="A1+1=", solution="2")
    line = error_of([*BASE, "--dataset_name", name], monkeypatch)
    assert "split 'train' has no 'prompt' column; it has: question, solution." in line


def test_a_checkpoint_that_is_not_there_or_has_no_lambda_is_refused(tmp_path: Path, monkeypatch):
    line = error_of([*BASE, "--resume_from_checkpoint", str(tmp_path)], monkeypatch)
    assert line == f"error: resume_from_checkpoint is {str(tmp_path)!r}; accepted: the folder of a checkpoint."
    (tmp_path / "trainer_state.json").write_text("{}")
    line = error_of([*BASE, "--resume_from_checkpoint", str(tmp_path)], monkeypatch)
    assert "lambda.json is missing" in line and "To start λ afresh" in line


def test_plot_without_matplotlib_is_refused_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # makes the import fail
    assert 'pip install "trl-lambda[plots]"' in error_of(BASE, monkeypatch)


@pytest.mark.parametrize("name", train.MATH_REWARDS)
def test_maths_rewards_without_math_verify_are_refused(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    assert f"reward_funcs has '{name}', which needs math-verify" in error_of(
        [*BASE, "--reward_funcs", name], monkeypatch
    )


def test_the_playground_config_is_what_its_comment_says():
    script_args, args, *_ = train.parse(BASE)
    assert (args.aggregation, args.lambda_learnable, args.token_regulation) == ("lambda", True, "sigmoid")
    assert args.max_steps == 100 and args.per_device_train_batch_size == 64 and args.num_generations == 8
    assert args.learning_rate == 1e-4 and script_args.plot


def test_options_on_the_command_line_win_over_the_file():
    _, args, model_args, _ = train.parse([*BASE, "--lambda_init", "-0.5", "--use_peft", "--lora_r", "4"])
    assert args.lambda_init == -0.5 and args.aggregation == "lambda"
    assert model_args.use_peft and model_args.lora_r == 4


def test_rewards_are_found_by_name_and_by_path(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = ["think_format_reward", "recipes.playground.rewards.exact_answer"]
    script_args = train.LambdaGRPOScriptArguments(reward_funcs=names, reward_model_name_or_path="some/model")
    model, *functions = train.load_rewards(script_args)
    assert model == "some/model"
    assert [function.__name__ for function in functions] == ["think_format_reward", "exact_answer"]


def config(**options) -> LambdaGRPOConfig:
    return LambdaGRPOConfig(output_dir="unused", use_cpu=True, bf16=False, **options)


def test_the_summary_knows_runs_whose_lambda_is_learned_fixed_or_absent():
    assert train.lambda_line(config(lambda_init=0.1), 0.25) == ("lambda", "0.100 -> 0.250 (learned)")
    fixed = config(lambda_init=1.5, lambda_learnable=False)
    assert train.lambda_line(fixed, 1.5) == ("lambda", "fixed at 1.5")
    assert train.lambda_line(config(aggregation="dapo"), None) == ("lambda", "none (aggregation: dapo)")


def test_weights_of_the_users_are_found_by_path(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = CONFIG.read_text().replace("token_regulation: sigmoid\n", "").splitlines()
    options = {"length_weight": "user_weights.power", "token_weight": "user_weights.linear", "max_steps": 1}
    (tmp_path / "own.yaml").write_text("\n".join([*lines, *(f"{name}: {value}" for name, value in options.items())]))
    arguments = ["--config", str(tmp_path / "own.yaml"), "--output_dir", str(tmp_path / "run"), "--lambda_init", "0.5"]
    trainer = train.make_trainer(*train.parse([*arguments, "--length_weight", "user_weights.same_power"]))
    assert trainer.length_weight.name == "user_weights.same_power"  # the command line wins here too
    assert trainer.token_weight.name == trainer.args.token_regulation == "user_weights.linear"
    assert trainer.lambda_value == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length_weight", "user_weights.none"], "length_weight='user_weights.none' cannot be imported (AttributeE"),
        (["--length_weight", "power"], "length_weight='power' is no dotted path; accepted: package.module.function."),
        (["--length_weight", ""], "length_weight='' is no dotted path"),
        (["--length_weight", "..a.b"], "length_weight='..a.b' is no dotted path"),
        (["--length_weight", "user_weights.__name__"], "length_weight='user_weights.__name__' is no function"),
        (["--length_weight", "user_weights.Square"], "length_weight=Square is a class: pass an object, Square()."),
        (["--length_weight", "user_weights.misspelled"], "user_weights.misspelled requires 'length'; a weight is"),
        (["--length_weight", "user_weights.half", "--lambda_init", "1"], "lambda_init=1.0 has no effect with aggreg"),
        (["--token_weight", "broken_weights.v"], "token_weight='broken_weights.v' cannot be imported (SystemExit: 3)"),
        (
            ["--token_weight", "user_weights.power"],
            "user_weights.power requires 'lengths'; a weight is called by name",
        ),
        (["--token_weight", "user_weights.linear"], "token_regulation='sigmoid' has no effect beside user_weights.l"),
    ],
)
def test_weights_that_cannot_be_used_are_one_line(arguments, message, tmp_path: Path, monkeypatch):
    (tmp_path / "broken_weights.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    nowhere = ["--model_name_or_path", "no/where"]  # the weights are looked at first
    assert message in error_of([*BASE, *nowhere, *arguments], monkeypatch)
