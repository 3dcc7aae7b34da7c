"""The model card's code, run where the card lies, loads the model or adapter and λ; its picture is the run's."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from support import Batch, build, config
from trl import GRPOTrainer

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
from trl_lambda.card_loading import loading_section
from trl_lambda.training import finish


def section(folder: str | Path) -> str:
    text = ModelCard.load(f"{folder}/README.md").text
    return text.partition("### How to load it again")[2].partition("### How the tokens")[0]


def run_code(folder: Path, monkeypatch) -> dict:
    """The code of the card, from the folder that holds the model's."""
    monkeypatch.chdir(folder.parent)
    namespace: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```", section(folder), re.MULTILINE | re.DOTALL):
        exec(code, namespace)
    return namespace


@pytest.mark.parametrize("aggregation", ["lambda", "grpo"])
def test_the_code_of_the_card_loads_model_tokenizer_and_lambda(aggregation, model_folder, tmp_path, monkeypatch):
    folder = tmp_path / "adder"
    batch = Batch()
    options = {"lambda_init": 0.5} if aggregation == "lambda" else {}
    args = config(LambdaGRPOConfig, batch, output_dir=str(folder), aggregation=aggregation, **options)
    trainer = build(LambdaGRPOTrainer, args, batch)
    trainer.save_model()
    trainer.processing_class.save_pretrained(folder)
    trainer.create_model_card()
    loaded = run_code(folder, monkeypatch)
    for a, b in zip(loaded["model"].parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert loaded["tokenizer"].vocab_size == trainer.processing_class.vocab_size
    assert loaded.get("lam") == (0.5 if aggregation == "lambda" else None)
    assert ("lambda.json" in section(folder)) == (aggregation == "lambda")


def test_an_adapter_is_loaded_as_one(model_folder, tmp_path, monkeypatch):
    folder = tmp_path / "adder"
    args = LambdaGRPOConfig(str(folder), use_cpu=True, bf16=False, report_to="none")
    from datasets import Dataset

    trainer = LambdaGRPOTrainer(
        model=model_folder,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["1+1="]}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    )
    trainer.save_model()
    trainer.create_model_card()
    assert "AutoPeftModelForCausalLM" in section(folder)
    loaded = run_code(folder, monkeypatch)
    assert any("lora" in name for name, _ in loaded["model"].named_parameters()) and loaded["lam"] == 0.0


def test_a_model_on_the_hub_is_named_as_there(tmp_path):
    batch = Batch()
    trainer = build(LambdaGRPOTrainer, config(LambdaGRPOConfig, batch, output_dir=str(tmp_path)), batch)
    trainer.hub_model_id = "someone/adder"
    text = loading_section(trainer)
    assert "name = 'someone/adder'\n" in text and "hf_hub_download(name, 'lambda.json')" in text
    assert "this folder" not in text


def test_the_picture_of_the_run_is_in_the_card_if_there_is_one(tmp_path):
    batch = Batch()
    trainer = build(LambdaGRPOTrainer, config(LambdaGRPOConfig, batch, output_dir=str(tmp_path)), batch)
    assert "### The run" not in loading_section(trainer)
    (tmp_path / "run.png").write_bytes(b"")
    assert "![What was logged](run.png)" in loading_section(trainer)
    (tmp_path / "report.png").write_bytes(b"")
    assert "![What was logged](report.png)" in loading_section(trainer) and "run.png" not in loading_section(trainer)


def test_the_command_draws_before_it_writes_the_card(tmp_path):
    from trl_lambda.training import LambdaGRPOScriptArguments

    batch = Batch()
    trainer = build(LambdaGRPOTrainer, config(LambdaGRPOConfig, batch, output_dir=str(tmp_path), max_steps=2), batch)
    trainer.train()
    finish(trainer, LambdaGRPOScriptArguments("rows", plot=True))
    assert "![What was logged](run.png)" in (tmp_path / "README.md").read_text()


def test_a_card_of_trl_alone_says_none_of_it(tmp_path):
    batch = Batch()
    from trl import GRPOConfig

    trainer = build(GRPOTrainer, config(GRPOConfig, batch, output_dir=str(tmp_path)), batch)
    trainer.create_model_card()
    assert "How to load it again" not in (tmp_path / "README.md").read_text()
