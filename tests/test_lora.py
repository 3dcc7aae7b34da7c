"""LoRA with every PEFT option of the recipe: adapters and λ are trained, saved, reloaded, merged and resumed."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_lambda import training as train

ROOT = Path(__file__).parent.parent
PLAYGROUND = ROOT / "recipes" / "configs" / "playground.yaml"
RECIPE = yaml.safe_load((ROOT / "recipes" / "configs" / "gsm8k_qwen2.5-1.5b_lora.yaml").read_text())
PEFT = {name: value for name, value in RECIPE.items() if name == "use_peft" or name.startswith("lora_")}
BASE = ROOT / "recipes" / "playground" / "base_model"


def run(output_dir: Path, **options):
    """Four steps on the playground with the recipe's adapters, a checkpoint after two."""
    options = {
        "output_dir": output_dir,
        "per_device_train_batch_size": 16,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "no",
        "eval_on_start": "false",
        "plot": "false",
        "learning_rate": 1e-3,
        "disable_tqdm": "true",
        **PEFT,
        **options,
    }
    texts = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    script_args, args, model_args, mixture = train.parse(["--config", str(PLAYGROUND), *texts])
    trainer = train.make_trainer(script_args, args, model_args, mixture)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    train.finish(trainer, script_args)
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def trainer(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return run(folder)


def logits(model) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(BASE)(["A47+86+31=", "A12+35="], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**tokens).logits


def test_the_recipes_options_reach_the_saved_adapters(trainer, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (32, 32, 0.0)
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(config["target_modules"]) == linear  # what "all-linear" is resolved to: not the head
    weights = load_file(folder / "adapter_model.safetensors")
    layers = trainer.model.config.num_hidden_layers
    assert len(weights) == 2 * len(linear) * layers and all("lora_" in name for name in weights)
    moved = [tensor.abs().max().item() for name, tensor in weights.items() if "lora_B" in name]
    assert min(moved) > 0  # B starts at 0
    assert not (folder / "model.safetensors").exists()


def test_the_optimizer_holds_adapters_and_lambda_apart(trainer):
    *groups, last = trainer.optimizer.param_groups
    assert last["name"] == "lambda" and [id(p) for p in last["params"]] == [id(trainer._lambda.tensor)]
    adapters = {id(p) for name, p in trainer.model.named_parameters() if "lora_" in name}
    assert {id(p) for group in groups for p in group["params"]} == adapters
    assert {p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" not in name} == {False}


def test_lambda_lies_beside_the_adapters_of_the_run_and_of_each_checkpoint(trainer, folder):
    final = json.loads((folder / "lambda.json").read_text())
    halfway = json.loads((folder / "checkpoint-2" / "lambda.json").read_text())
    assert final["lambda"] == trainer.lambda_value and final["global_step"] == 4 and halfway["global_step"] == 2
    assert 0.0 != halfway["lambda"] != final["lambda"]
    assert (folder / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_reloaded_and_merged_adapters_compute_what_the_trained_model_does(trainer, folder, tmp_path):
    trained, base = logits(trainer.model), AutoModelForCausalLM.from_pretrained(BASE)
    untouched = logits(base)
    reloaded = PeftModel.from_pretrained(base, folder)
    assert torch.equal(logits(reloaded), trained)
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-4)  # sums in another order, logits of about 10
    assert (trained - untouched).abs().max() > 1e-2
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_a_resumed_run_equals_the_uninterrupted_one(trainer, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    resumed = run(tmp_path, resume_from_checkpoint=folder / "checkpoint-2")
    assert resumed.state.global_step == 4 and resumed.lambda_value == trainer.lambda_value
    weights, expected = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, folder))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
