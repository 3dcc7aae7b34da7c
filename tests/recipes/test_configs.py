"""Every recipe: parsed into its dataclasses, and run for two steps with local stand-ins for model and dataset."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from stand_ins import BOXED, HOTPOTQA, write_agent_model, write_datasets, write_model
from support import Batch, build, config, largest_deviation, watch
from support import train as train_prepared
from transformers import BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config, get_quantization_config

from recipes.agents import search
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
from trl_lambda import training as train
from trl_lambda.weights.features import FEATURES

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
ENGINES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
# Need no stand-in: test_train_script.py, test_lookup_agent.py, and below.
OFFLINE = ("playground", "lookup_agent", "playground_preference")
RECIPES = [path for path in CONFIGS if path.stem not in OFFLINE]
ON_CPU = ["--use_cpu", "--bf16", "false", "--dtype", "float32"]
# What a policy of near-even odds may say: calls that tools take and calls that they refuse.
CALLS = {
    "gsm8k_calculator_qwen3-1.7b_trgrpo": [
        ("calculate", {"expression": "48/2+48"}),
        ("calculate", {"expression": "__import__('os')"}),
        ("calculate", {}),
        ("unknown", {}),
    ],
    "hotpotqa_search_qwen3-1.7b": [("search", {"query": "director of Alien"}), ("search", {"query": "?"})],
}
REWARDS = {
    "gsm8k_calculator_qwen3-1.7b_trgrpo": "trl_lambda.training.agent_rewards.final_accuracy",
    "hotpotqa_search_qwen3-1.7b": "trl_lambda.training.agent_rewards.answer_match",
}
# What a recipe needs beside a CPU and is switched off here; everything else in the file stays.
WITHOUT = {
    "gsm8k_qwen2.5-1.5b_qlora": ["--load_in_4bit", "false"],
    "math_qwen2.5-3b_vllm_colocate": ["--use_vllm", "false", "--vllm_enable_sleep_mode", "false"],
    "math_qwen2.5-7b_vllm_server": ["--use_vllm", "false"],
}


def name(path: Path) -> str:
    return path.stem


def comment(path: Path) -> str:
    """The comment that a file opens with, its marks removed and its continued lines joined."""
    lines = path.read_text().partition("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in lines), path
    return "\n".join(line[1:].strip() for line in lines).replace("\\\n", " ")


def launch_command(path: Path) -> list[str]:
    """The command of a recipe's opening comment, without what sets its environment."""
    line = re.search(r"^(?:\w+=\S+ )*(accelerate launch .*)$", comment(path), re.MULTILINE)
    return shlex.split(line[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def agent_models(tmp_path_factory) -> dict[str, str]:
    answers = [*BOXED, "<answer>Ridley Scott</answer>", "<answer>moss</answer>"]
    return {stem: write_agent_model(tmp_path_factory.mktemp(stem), calls, answers) for stem, calls in CALLS.items()}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, str]:
    return write_datasets(tmp_path_factory.mktemp("datasets"))


def parse(path: Path, *overrides: str):
    # The GPU that bf16 asks for is not here; nothing else is overridden.
    return train.parse(["--config", str(path), "--use_cpu", "--bf16", "false", *overrides])


def two_steps(path: Path, model: str, datasets: dict[str, str], output_dir: Path) -> list[str]:
    """The overrides for two steps of a recipe on this machine."""
    dataset = datasets[yaml.safe_load(path.read_text())["dataset_name"]]
    names = ["--model_name_or_path", model, "--dataset_name", dataset, "--output_dir", str(output_dir)]
    # A policy of even odds would call until the completion is full.
    limits = ["--max_tool_calling_iterations", "2"] if path.stem in CALLS else []
    return [*names, "--max_steps", "2", *limits, *ON_CPU, *WITHOUT.get(path.stem, [])]


def logs(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# ---- Parsing ----


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_recipe_opens_with_purpose_hardware_memory_and_its_command(path: Path):
    text = comment(path)
    for heading in ("Purpose:", "Hardware:", "Memory:", "Command, from the repository root:"):
        assert heading in text, heading
    assert path.stem in OFFLINE or "estimated" in text
    command = launch_command(path)
    assert command[-2:] == ["--config", str(path.relative_to(ROOT))] and command[-3] == "recipes/train.py"
    assert all(len(line) <= 119 for line in path.read_text().splitlines())


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_parses_and_keeps_the_packages_defaults_of_lambda(path: Path):
    script_args, args, model_args, _ = parse(path)
    raw = yaml.safe_load(path.read_text())
    assert isinstance(args, LambdaGRPOConfig) and isinstance(model_args, ModelConfig)
    assert args.output_dir == f"runs/{path.stem}" and script_args.reward_funcs == [
        REWARDS.get(path.stem, "accuracy_reward")
    ]
    # The command line takes values as text: here they arrive as what they are.
    assert args.learning_rate == raw["learning_rate"] and isinstance(args.learning_rate, float)
    for field in [field for field in raw if field.startswith(("lambda_", "regulation_", "length_scale"))]:
        pytest.fail(f"{field} is set: a recipe uses the package's defaults, so that its arms need one override")
    assert args.loss_type == "dapo" and args.report_to == []
    assert (get_peft_config(model_args) is not None) == ("lora" in path.stem)


@pytest.mark.parametrize("path", [p for p in RECIPES if not p.stem.endswith(("trgrpo", "budget"))], ids=name)
def test_the_fixed_arms_are_one_override_of_the_same_file(path: Path):
    assert parse(path)[1].has_lambda
    for member in ("grpo", "dapo", "dr_grpo", "power"):
        args = parse(path, "--aggregation", member)[1]
        assert args.aggregation == member and args.has_lambda == (member == "power")


def test_the_arms_of_the_token_weight_are_one_override_of_the_same_file():
    path = next(path for path in RECIPES if path.stem.startswith("knights") and "trgrpo" in path.stem)
    args = parse(path)[1]
    assert args.aggregation is None and args.token_regulation == "sigmoid"
    constants = (args.regulation_slope, args.regulation_center, args.regulation_min, args.regulation_max)
    assert constants == (9.0, 0.25, 1.0, 1.4) and args.regulation_alpha is None
    assert parse(path, "--token_regulation", "linear")[1].token_regulation == "linear"
    assert parse(path, "--token_regulation", "none")[1].token_regulation is None
    assert parse(path, "--aggregation", "lambda")[1].has_lambda
    # 64 prompts × 8 completions a generation and 256 completions an optimizer step on four GPUs.
    assert args.steps_per_generation * args.per_device_train_batch_size * 4 == 512
    assert args.gradient_accumulation_steps * args.per_device_train_batch_size * 4 == 256


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem.startswith("math")], ids=name)
def test_the_maths_recipes_share_one_batch_whatever_the_number_of_gpus(path: Path):
    args = parse(path)[1]
    command = launch_command(path)
    gpus = int(command[command.index("--num_processes") + 1]) if "--num_processes" in command else 1
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * gpus == 256
    assert args.max_steps == 160 and args.learning_rate == 1e-6 and args.beta == 0.0


def test_the_4_bit_recipe_builds_its_quantization():
    path = next(path for path in RECIPES if "qlora" in path.stem)
    quantization = get_quantization_config(parse(path, "--dtype", "bfloat16")[2])
    assert isinstance(quantization, BitsAndBytesConfig)
    assert quantization.load_in_4bit and quantization.bnb_4bit_quant_type == "nf4"
    assert quantization.bnb_4bit_use_double_quant


def test_the_vllm_recipes_name_their_mode_and_the_servers_command_serves_their_model():
    modes = {path.stem: parse(path)[1] for path in RECIPES if "vllm" in path.stem}
    assert {args.vllm_mode for args in modes.values()} == {"colocate", "server"}
    assert all(args.use_vllm and args.vllm_importance_sampling_correction for args in modes.values())
    path = next(path for path in RECIPES if "vllm_server" in path.stem)
    served = re.search(r"trl vllm-serve --model (\S+) .*--max_model_len (\d+)", comment(path))
    assert served[1] == parse(path)[2].model_name_or_path
    assert int(served[2]) > parse(path)[1].max_completion_length


# ---- accelerate ----


@pytest.mark.parametrize("path", ENGINES, ids=name)
def test_an_accelerate_config_loads(path: Path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    engines = {"single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == engines[path.stem] and config.mixed_precision == "bf16" and not config.use_cpu
    known = {action.dest for action in launch_command_parser()._actions}
    engine = (config.fsdp_config or {}) | (config.deepspeed_config or {})
    assert set(engine) <= known, set(engine) - known  # accelerate itself would ignore a misspelt one
    assert engine.get("zero_stage") == {"zero2": 2, "zero3": 3}.get(path.stem)
    assert engine.get("fsdp_version") == {"fsdp2": 2}.get(path.stem)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipes_launch_command_is_one_that_accelerate_takes(path: Path):
    _, _, *arguments = launch_command(path)
    args = launch_command_parser().parse_args(arguments)
    assert Path(args.config_file) in [engine.relative_to(ROOT) for engine in ENGINES]
    assert args.training_script == "recipes/train.py"


# ---- Two steps ----


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_runs_two_steps_on_stand_ins(
    path: Path, model, agent_models, datasets, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    model = agent_models.get(path.stem, model)
    if path.stem.startswith("hotpotqa"):
        search.build_index(search.context_paragraphs(HOTPOTQA), tmp_path / "index.sqlite")
        monkeypatch.setenv(search.INDEX_VARIABLE, str(tmp_path / "index.sqlite"))
    script_args, args, model_args, mixture = train.parse(
        ["--config", str(path), *two_steps(path, model, datasets, tmp_path), "--disable_tqdm", "true"]
    )
    trainer = train.make_trainer(script_args, args, model_args, mixture)
    trainer.train()
    train.finish(trainer, script_args)
    assert trainer.state.global_step == 2
    rewards = [*logs(trainer, "reward"), *logs(trainer, "eval_reward")]
    assert any(0 < reward < 1 for reward in rewards), "the reward saw no right answer, or no wrong one"
    assert len(logs(trainer, "eval_reward")) == (2 if args.eval_strategy != "no" else 0)  # before training and after
    if path.stem in CALLS:
        assert (
            min(logs(trainer, "tools/call_frequency")) > 0
            and "| `tools/call_frequency` |" in (ROOT / "docs" / "metrics.md").read_text()
        )
        assert all(0 < part < 1 for part in logs(trainer, "tools/failure_frequency"))
    weights = "adapter_model.safetensors" if model_args.use_peft else "model.safetensors"
    for file in (weights, "README.md", "run.png"):
        assert (tmp_path / file).is_file(), file
    if args.aggregation == "lambda":
        lam = json.loads((tmp_path / "lambda.json").read_text())
        assert lam["global_step"] == 2 and 0 < abs(lam["lambda"]) < 0.5
        assert f"lambda 0.000 -> {lam['lambda']:.3f} (learned)" in re.sub(r" +", " ", capsys.readouterr().out)
    elif args.length_target is not None:  # a part of the length of four generation batches: λ waits for it
        lam = json.loads((tmp_path / "lambda.json").read_text())
        assert lam["lambda"] == 0 and lam["rule_state"]["seen"] == 2 and lam["rule_state"]["length"] is None
    else:
        assert not (tmp_path / "lambda.json").exists()
        assert all(1.0 <= mean <= 1.4 for mean in logs(trainer, "token_weight/mean"))


def test_the_preference_recipe_runs_two_steps_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    path = ROOT / "recipes" / "configs" / "playground_preference.yaml"
    _, _, *arguments = launch_command(path)
    assert launch_command_parser().parse_args(arguments).training_script == "recipes/train.py"
    smaller = ["--max_steps", "2", "--eval_strategy", "no", "--eval_on_start", "false", "--disable_tqdm", "true"]
    parsed = train.parse(["--config", str(path), *smaller, "--output_dir", str(tmp_path)])
    raw, plain = (yaml.safe_load(p.read_text()) for p in (path, path.with_stem("playground")))
    candidate = {
        "aggregation": "power", "lambda_side": "positive", "lambda_rule": "regression",
        "lambda_features": ["length", "mean_logp", "min_logp"],
    }  # fmt: skip
    assert {key: value for key, value in raw.items() if plain.get(key) != value} == candidate | {
        "output_dir": "runs/playground_preference"
    }
    (code,) = re.findall(r"^args = LambdaGRPOConfig\((.*?)^\)$", README, re.MULTILINE | re.DOTALL)
    assert eval(f"dict(output_dir={code})") == candidate | {"output_dir": "out"}
    trainer = train.make_trainer(*parsed)
    trainer.train()
    train.finish(trainer, parsed[0])
    assert trainer.state.global_step == 2
    values = [logs(trainer, f"lambda/{name}")[-1] for name in ("value", "mean_logp", "min_logp")]
    assert all(0 < abs(value) < 1 for value in values)
    # λ of right answers only: the weights of the wrong ones are all alike.
    first, second = (
        {key: logs(trainer, f"length_weight/{key}")[step] for key in ("positive/min", "positive/max", "negative/min")}
        for step in (0, 1)
    )
    assert set(first.values()) == {1.0} and second["positive/min"] < 1 < second["positive/max"]
    assert logs(trainer, "length_weight/negative/max")[-1] == second["negative/min"]
    for file in ("model.safetensors", "README.md", "run.png", "lambda.json"):
        assert (tmp_path / file).is_file(), file


def test_the_budget_recipe_is_the_lora_recipe_with_another_f():
    path = next(path for path in RECIPES if path.stem.endswith("budget"))
    raw, plain = (yaml.safe_load(p.read_text()) for p in (path, path.with_stem("gsm8k_qwen2.5-1.5b_lora")))
    assert {key: value for key, value in raw.items() if plain.get(key) != value} == {
        "aggregation": "power", "length_target": 0.6, "output_dir": f"runs/{path.stem}",
    }  # fmt: skip
    assert raw.keys() >= plain.keys() and parse(path)[1].length_target == 0.6


def test_the_maths_recipes_run_on_gsm8k_by_three_overrides(model, datasets, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = next(path for path in RECIPES if path.stem == "math_qwen2.5-3b")
    options = re.search(r"On GSM8K: add `([^`]+)`", " ".join(comment(path).split()))[1]
    overrides = shlex.split(options.replace("openai/gsm8k", datasets["openai/gsm8k"]))
    script_args, _, _, mixture = parse(path, *overrides)
    rows, held_out = train.load_splits(script_args, mixture, evaluate=True)
    assert {row["solution"] for row in rows} == {row["solution"] for row in held_out} == {"72", "1000"}


def test_a_recipes_own_command_runs_in_a_process_of_its_own(model, datasets, tmp_path):
    """accelerate, its YAML and the script together, as the comment has them, on this machine's CPU."""
    path = next(path for path in RECIPES if path.stem == "gsm8k_qwen2.5-1.5b_lora")
    _, _, *arguments = launch_command(path)
    engine = ["--cpu", "--mixed_precision", "no", "--num_cpu_threads_per_process", "1", "--dynamo_backend", "no"]
    overrides = two_steps(path, model, datasets, tmp_path)
    command = [sys.executable, "-m", "accelerate.commands.launch", *engine, *arguments, *overrides]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    assert "Summary of 2 optimizer steps" in process.stdout
    assert re.search(r"2/2 .*reward=\d\.\d+", process.stderr)  # the progress bar, with its estimate
    assert json.loads((tmp_path / "lambda.json").read_text())["global_step"] == 2


@pytest.mark.parametrize(
    ("stem", "package"), [("gsm8k_qwen2.5-1.5b_qlora", "bitsandbytes"), ("math_qwen2.5-3b_vllm_colocate", "vllm")]
)
def test_a_missing_package_ends_in_one_line_that_names_it(stem, package, model, datasets, tmp_path, monkeypatch):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed here")
    monkeypatch.chdir(ROOT)
    path = ROOT / "recipes" / "configs" / f"{stem}.yaml"
    options = two_steps(path, model, datasets, tmp_path)
    options = options[: len(options) - len(WITHOUT[stem])]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path), *options])
    with pytest.raises(SystemExit) as error:
        train.main()
    assert re.match(rf"error: .*{package}", str(error.value.code), re.IGNORECASE) and "\n" not in error.value.code


# ---- recipes/README.md ----

README = (ROOT / "recipes" / "README.md").read_text()


def test_the_readme_lists_every_recipe_with_the_engine_and_the_memory_of_its_file():
    rows = dict(re.findall(r"^\| `(\S+)\.yaml` (\|.*)$", README, re.MULTILINE))
    assert rows.keys() == {path.stem for path in CONFIGS}
    for path in RECIPES:
        *_, memory, engine, _ = (cell.strip() for cell in rows[path.stem].split("|"))
        command = launch_command(path)
        assert f"recipes/accelerate/{engine.strip('`')}" == command[command.index("--config_file") + 1]
        assert f"about {memory} " in comment(path).replace(",", " ")


def test_every_row_of_options_is_a_configuration():
    table = README.partition("## Which option is which paper")[2].partition("\n## ")[0]
    options = re.findall(r"^\| .* \| .* \| `(.+)` \|$", table, re.MULTILINE)
    assert len(options) == len(re.findall(r"^\| ", table, re.MULTILINE)) - 1 >= 15  # every row but the heading
    for text in options:
        chosen = eval(f"dict({text})")
        args = LambdaGRPOConfig("unused", use_cpu=True, bf16=False, **chosen)
        assert all(getattr(args, field) == value for field, value in chosen.items())


def options_of(method: str) -> dict:
    (text,) = re.findall(rf"^\| {re.escape(method)}.* \| .* \| `(.+)` \|$", README, re.MULTILINE)
    return eval(f"dict({text})")


def one_step(trainer_class, config_class, noise: float, **options):
    """One step on prepared completions of very unequal length, ratios off 1 by about `noise`."""
    batch = Batch()
    run = watch(build(trainer_class, config(config_class, batch, **options), batch, noise=noise))
    run.trainer.train()
    return run


@pytest.mark.parametrize("method", ["GSPO, with the clip", "a λ that begins at GSPO"])
def test_the_gspo_rows_are_trls_gspo(method):
    clip = {"epsilon": 3e-4, "epsilon_high": 4e-4}
    trl = {"importance_sampling_level": "sequence", "loss_type": "grpo", **clip}
    expected = one_step(GRPOTrainer, GRPOConfig, 1e-3, **trl)
    row = one_step(LambdaGRPOTrainer, LambdaGRPOConfig, 1e-3, **options_of(method))
    # The advantages of a group sum to 0 and so, near ρ = 1, does the loss: it is compared with its terms, of order 1.
    assert row.losses == pytest.approx(expected.losses, rel=0, abs=1e-6)
    assert largest_deviation(row.grads[0], expected.grads[0]) < 1e-5
    # Some responses are clipped and some are not, or the clip would not be looked at.
    assert 0 < expected.logs[0]["clip_ratio/region_mean"] < 1
    at_zero = {"importance_sampling_level": "sequence", "aggregation": "lambda", **clip}
    at_zero = one_step(LambdaGRPOTrainer, LambdaGRPOConfig, 1e-3, **at_zero)
    assert largest_deviation(at_zero.grads[0], expected.grads[0]) > 0.1  # the token mean is not GSPO


def test_the_cispo_row_clamps_no_ratio_near_1():
    options = options_of("CISPO's surrogate")
    row = one_step(LambdaGRPOTrainer, LambdaGRPOConfig, 0.1, **options)
    free = one_step(LambdaGRPOTrainer, LambdaGRPOConfig, 0.1, **options | {"epsilon_high": 1e6})
    assert row.losses == free.losses and row.logs[0]["cispo_clip_ratio"] == 0
    del options["epsilon_high"]  # every ratio becomes 0.2
    default = one_step(LambdaGRPOTrainer, LambdaGRPOConfig, 0.0, **options)
    on_policy = one_step(LambdaGRPOTrainer, LambdaGRPOConfig, 0.0, **options | {"epsilon_high": 5.0})
    fifth = {name: grad / 5 for name, grad in on_policy.grads[0].items()}
    assert largest_deviation(default.grads[0], fifth) < 1e-5


def test_what_the_page_says_of_the_arena_stands_in_the_arenas_tables():
    """The smallest differences that could be seen, and TR-GRPO's with one step per generation batch."""
    said = " ".join(
        (ROOT / "docs" / "arena.md").read_text().partition("## Does it help?")[2].partition("\n## ")[0].split()
    )
    arena = (ROOT / "recipes" / "arena" / "first_round.md").read_text()
    found = arena.partition("## What was found")[2].partition("\n## ")[0]
    found = " ".join(found.split())

    def resolution(task: str) -> tuple[str, str]:
        (row,) = re.findall(rf"^\| {task} \| mean training reward \|.*\| (\S+) \| (\S+) \|$", arena, re.MULTILINE)
        return tuple(f"{float(value):.1f}" for value in row)

    alone, corrected = zip(resolution("running_sum"), resolution("slippery_chain"), strict=True)
    assert f"{alone[0]} and {alone[1]} points of training reward on the two tasks for a single comparison" in said
    assert f"{corrected[0]} and {corrected[1]} after the correction" in said
    assert f"on `running_sum` {alone[0]} points of training reward for a comparison planned alone" in found
    assert f"{corrected[0]} at Holm's first step; on `slippery_chain` {alone[1]} and {corrected[1]}." in found
    one_step_study = arena.partition("**running_sum (study one_step)**")[2]
    row = re.search(r"^\| `tr` \|(.*)\|$", one_step_study, re.MULTILINE)[1].split("|")
    mean, low, high, star = re.fullmatch(r" (\S+) \[(\S+), (\S+)\]( \*)? ", row[4]).groups()
    mean, low, high = (f"{float(value):+.1f}".removeprefix("+") for value in (mean, low, high))
    assert star and f"{mean} points [{low}, {high}] of sampled accuracy, beyond the correction" in said
    assert f"{mean} [{low}, {high}] in sampled accuracy, beyond the correction too" in found


def test_the_readmes_command_is_one_that_accelerate_and_the_script_take():
    command = re.search(r"^accelerate launch (.*?[^\\])$", README.replace("\\\n", " "), re.MULTILINE)[1]
    args = launch_command_parser().parse_args(shlex.split(command))
    assert (ROOT / args.config_file).is_file() and args.training_script == "recipes/train.py"
    parsed = train.parse([*args.training_script_args, "--use_cpu", "--bf16", "false"])[1]
    assert parsed.gradient_accumulation_steps * parsed.per_device_train_batch_size * args.num_processes == 64


def test_every_logged_metric_is_explained():
    logged = set()
    for options in (
        {"token_regulation": "sigmoid", "regulation_inside_clip": True},
        {"token_regulation": "sigmoid", "loss_type": "sapo"},
        {"aggregation": "grpo", "loss_type": "cispo"},
        {"aggregation": "grpo", "loss_type": "vespo"},
        {"aggregation": "power", "lambda_side": "positive", "lambda_features": ["length", *FEATURES]},
        {"length_target": 0.5},
    ):
        run = train_prepared(LambdaGRPOTrainer, LambdaGRPOConfig, max_steps=1, **options)
        logged |= {key for entry in run.trainer.state.log_history for key in entry}
    assert {"lambda/value", "token_weight/clipped_by_regulation", "share/probability_q4"} <= logged
    assert {"lambda/min_logp", "lambda/r2", "lambda/slope", "length_weight/negative/mean"} <= logged
    assert "lambda/target_gap" in logged
    explained = (ROOT / "docs" / "metrics.md").read_text()
    names = set(re.findall(r"`([^`]+)`", explained))
    names |= {name.replace("<function>", "reward") for name in names}  # the test's reward function is called so
    names |= {re.sub(r"(min|max|mean)_length", r"\1_terminated_length", name) for name in names}
    names |= {re.sub(r"_q1$", f"_q{q}", name) for name in names for q in (2, 3)}
    names |= {f"lambda/{feature}" for feature in FEATURES if "lambda/<feature>" in names}
    assert logged <= names, logged - names
