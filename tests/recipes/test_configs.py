"""Every recipe: its header, its dataclasses, and two steps with local stand-ins for model and dataset."""

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
from gym_stand_in import install_gym
from stand_ins import BOXED, HOTPOTQA, write_agent_model, write_datasets, write_model
from trl import get_peft_config, get_quantization_config

from recipes import train
from recipes.agents import search
from trl_lambda import LambdaGRPOConfig
from trl_lambda.scripts import grpo

ROOT = Path(train.ROOT)
FOLDER = ROOT / "recipes" / "configs"
README = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
CONFIGS = {str(path.relative_to(FOLDER).with_suffix("")): path for path in sorted(FOLDER.glob("*/*.yaml"))}
# Folders whose recipes run below; the others have tests of theirs.
TRAINS_ITSELF = ("gsm8k", "math", "logic", "agents")
RECIPES = [name for name in CONFIGS if name.startswith(TRAINS_ITSELF) and name != "agents/lookup"]
CPU = ["--use_cpu", "--bf16", "false", "--dtype", "float32", "--disable_tqdm", "true"]
# Calls that tools take, and calls that they refuse. The stand-in policy makes all of them.
CALLS = {
    "agents/calculator_qwen3-1.7b": [
        ("calculate", {"expression": "48/2+48"}), ("calculate", {"expression": "__import__('os')"}), ("unknown", {}),
    ],
    "agents/search_qwen3-1.7b": [("search", {"query": "director of Alien"}), ("search", {"query": "?"})],
}  # fmt: skip
# What needs more than a CPU and is switched off here. Everything else in the file stays.
WITHOUT = {
    "gsm8k/qwen2.5-1.5b_qlora": ["--load_in_4bit", "false"],
    "math/qwen2.5-3b_vllm_colocate": ["--use_vllm", "false", "--vllm_enable_sleep_mode", "false"],
    "math/qwen2.5-7b_vllm_server": ["--use_vllm", "false"],
}


@pytest.fixture(autouse=True)
def gym(monkeypatch):
    install_gym(monkeypatch)


def header(name: str) -> str:
    """The comment that a file opens with, without its marks, continued lines joined."""
    lines = CONFIGS[name].read_text().partition("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in lines), name
    return "\n".join(line[1:].strip() for line in lines).replace("\\\n", " ")


def command(name: str) -> list[str]:
    """The command of the header that trains, without variables of the environment."""
    line = re.search(r"^(?:\w+=\S+ )*((accelerate launch|trl-lambda train|python recipes) ?.*)$", header(name), re.M)
    return shlex.split(line[1])


def parse(name: str, *overrides: str) -> list:
    return grpo.parse(["--config", str(CONFIGS[name]), *CPU, *overrides], train.RecipeArguments)[:4]


def read(name: str) -> dict:
    return yaml.safe_load(CONFIGS[name].read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recipe_opens_with_purpose_hardware_memory_and_its_command(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = header(name)
    assert all(part in text for part in ("Purpose:", "Hardware:", "Memory:", "Command, from the repository root:"))
    words = command(name)
    assert words[-2:] == ["--config", f"recipes/configs/{name}.yaml"]
    if words[0] == "accelerate":
        args = launch_command_parser().parse_args(words[2:])
        assert Path(args.config_file).is_file() and args.training_script == "recipes/train.py"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recipe_parses_into_its_dataclasses(name):
    script_args, args, model_args, dataset_args = parse(name)
    assert isinstance(args, LambdaGRPOConfig) and model_args.model_name_or_path
    assert script_args.dataset_name or dataset_args.datasets or script_args.environment or script_args.reasoning_gym
    assert args.output_dir in (f"runs/{name.replace('/', '_')}", "runs/playground")
    assert args.learning_rate == read(name)["learning_rate"] and args.loss_type == "dapo" and args.report_to == []
    assert (get_peft_config(model_args) is not None) == ("lora" in name or name.startswith("smollm2"))
    if name.startswith(TRAINS_ITSELF) and args.length_weight == "lambda_grpo":
        assert parse(name, "--length_weight", "dapo")[1].length_weight == "dapo"  # other arms are one override


def test_recipes_that_are_to_be_compared_differ_only_where_they_say():
    lora, target = read("gsm8k/qwen2.5-1.5b_lora"), read("gsm8k/qwen2.5-1.5b_lora_length_target")
    changed = {key: target[key] for key in target if target[key] != lora.get(key) and key != "output_dir"}
    assert changed == {"length_weight": "power", "length_target": 0.6}
    for name in (name for name in RECIPES if name.startswith("math")):
        args, words = parse(name)[1], command(name)
        gpus = int(words[words.index("--num_processes") + 1]) if "--num_processes" in words else 1
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps * gpus == 256
        assert (args.max_steps, args.learning_rate, args.beta) == (160, 1e-6, 0.0)


def test_what_single_recipes_promise():
    quantization = get_quantization_config(parse("gsm8k/qwen2.5-1.5b_qlora", "--dtype", "bfloat16")[2])
    assert quantization.load_in_4bit and quantization.bnb_4bit_quant_type == "nf4"
    served = re.search(r"vllm-serve --model (\S+) .*--max_model_len (\d+)", header("math/qwen2.5-7b_vllm_server"))
    _, server, model_args, _ = parse("math/qwen2.5-7b_vllm_server")
    assert server.vllm_mode == "server" and parse("math/qwen2.5-3b_vllm_colocate")[1].vllm_mode == "colocate"
    assert served[1] == model_args.model_name_or_path and int(served[2]) > server.max_completion_length
    logic = parse("logic/knights_and_knaves_qwen2.5-3b")[1]
    assert logic.length_weight is None and logic.token_weight == "tr_grpo" and logic.token_weight_kwargs is None
    rows = logic.per_device_train_batch_size * 4
    assert (logic.steps_per_generation * rows, logic.gradient_accumulation_steps * rows) == (512, 256)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_accelerate_config_loads(path: Path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    engines = {"single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == engines[path.stem] and config.mixed_precision == "bf16"
    known = {action.dest for action in launch_command_parser()._actions}
    engine = (config.fsdp_config or {}) | (config.deepspeed_config or {})
    assert set(engine) <= known, set(engine) - known  # accelerate itself would ignore a misspelt one
    assert engine.get("zero_stage", engine.get("fsdp_version")) == {"fsdp2": 2, "zero2": 2, "zero3": 3}.get(path.stem)


def test_the_readme_lists_every_recipe_with_the_engine_and_the_memory_of_its_file():
    rows = dict(re.findall(r"^\| .* \| `(\S+)\.yaml` (\|.*)$", README, re.MULTILINE))
    assert rows.keys() == CONFIGS.keys() and len(README.splitlines()) <= 60
    for name, row in rows.items():
        *_, memory, engine, _ = (cell.strip(" `") for cell in row.split("|"))
        assert memory in header(name), name
        assert not engine or f"recipes/accelerate/{engine}.yaml" in command(name), name
    (words,) = re.findall(r"^(accelerate launch .*)$", README.replace("\\\n", " "), re.MULTILINE)
    assert shlex.split(words) == command("gsm8k/qwen2.5-1.5b_lora")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict:
    answers = [*BOXED, "<answer>Ridley Scott</answer>", "<answer>moss</answer>"]
    plain = write_model(tmp_path_factory.mktemp("model"))
    models = {name: write_agent_model(tmp_path_factory.mktemp("agent"), CALLS[name], answers) for name in CALLS}
    return dict.fromkeys(RECIPES, plain) | models | write_datasets(tmp_path_factory.mktemp("datasets"))


def overrides(name: str, stand_ins: dict, output_dir: Path) -> list[str]:
    """Two steps of a recipe on this machine: its own file, with local names in place of the hub's."""
    config = read(name)
    dataset = ["--dataset_name", stand_ins[config["dataset_name"]]] if "dataset_name" in config else []
    calls = ["--max_tool_calling_iterations", "2"] if name in CALLS else []  # an even policy would call on and on
    models = ["--model_name_or_path", stand_ins[name], "--output_dir", str(output_dir), "--max_steps", "2"]
    return [*models, *dataset, *calls, *CPU, *WITHOUT.get(name, [])]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_two_steps_on_stand_ins(name, stand_ins, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    search.build_index(search.context_paragraphs(HOTPOTQA), tmp_path / "index.sqlite")
    monkeypatch.setenv(search.INDEX_VARIABLE, str(tmp_path / "index.sqlite"))
    config = read(name)
    for dataset in config.get("datasets", []):
        dataset["path"] = stand_ins[dataset["path"]]
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    arguments = ["--config", str(tmp_path / "run.yaml"), *overrides(name, stand_ins, tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    trainer = train.main()
    keys = ("reward", "eval_reward", "tools/call_frequency", "tools/failure_frequency", "token_weight/mean")
    logs = {key: [log[key] for log in trainer.state.log_history if key in log] for key in keys}
    assert trainer.state.global_step == 2
    assert any(0 < value < 1 for value in [*logs["reward"], *logs["eval_reward"]]), "all answers right, or all wrong"
    assert len(logs["eval_reward"]) == (0 if "eval_strategy" not in config else 2)  # before training and after
    if name in CALLS:
        assert min(logs["tools/call_frequency"]) > 0
        assert all(0 < part < 1 for part in logs["tools/failure_frequency"])
    weights = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    assert all((tmp_path / file).is_file() for file in (weights, "README.md", "run.png", "lambda.json"))
    lam = json.loads((tmp_path / "lambda.json").read_text())["lambda"]
    if config["length_weight"] == "lambda_grpo":
        assert 0 < abs(lam) < 0.5
        assert re.search(rf"^  lambda .* -> {lam:.3f} \(step 1 -> 2\)$", capsys.readouterr().out, re.MULTILINE)
    elif config.get("length_target"):  # a part of the length of four generation batches: λ waits for it
        assert lam == 0
    else:
        assert lam is None and all(1.0 <= mean <= 1.4 for mean in logs["token_weight/mean"])


@pytest.mark.parametrize("name", ["playground/demo", "playground/features"])
def test_an_offline_recipe_runs_as_it_stands(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    small = ["--max_steps", "2", "--eval_strategy", "no", "--eval_on_start", "false", "--output_dir", str(tmp_path)]
    words = command(name)
    assert words[:2] == ["trl-lambda", "train"]
    trainer = grpo.main(*grpo.parse([*words[2:], *small, "--disable_tqdm", "true"])[:4])
    keys = {"lambda/value", "lambda/mean_logp", "lambda/min_logp"} & trainer.state.log_history[1].keys()
    assert len(keys) == (3 if "features" in name else 1) and (tmp_path / "run.png").is_file()
    assert all(0 < abs(trainer.state.log_history[1][key]) < 1 for key in keys)


def test_a_recipes_own_command_runs_in_processes_of_its_own(stand_ins, tmp_path):
    engine = ["--cpu", "--mixed_precision", "no", "--num_cpu_threads_per_process", "1", "--dynamo_backend", "no"]
    name = "gsm8k/qwen2.5-1.5b_lora"
    words = [sys.executable, "-m", "accelerate.commands.launch", *engine, *command(name)[2:]]
    words += [*overrides(name, stand_ins, tmp_path), "--short_progress", "--disable_tqdm", "false"]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    assert "Summary of 2 optimizer steps" in process.stdout
    assert re.search(r"2/2 .*reward=\d\.\d+", process.stderr)  # the short progress bar


def test_a_missing_package_ends_in_one_line_that_names_it(stand_ins, tmp_path, monkeypatch):
    name = "gsm8k/qwen2.5-1.5b_qlora"
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    options = overrides(name, stand_ins, tmp_path)[: -len(WITHOUT[name])]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(CONFIGS[name]), *options])
    with pytest.raises(SystemExit, match=r"(?i)^error: .*bitsandbytes.*$"):
        train.main()
