"""The whole path on a pretrained model (`make llm`): its tokenizer, template, bf16 autocast, LoRA, resume."""

import pytest
import torch
from datasets import Dataset

from recipes.playground.smollm2 import FOLDER
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} is made by `make llm`")

SETUPS = {
    "LoRA": ({"gradient_checkpointing": False}, True),
    "LoRA, checkpointing": ({"gradient_checkpointing": True}, True),
    "full weights": ({"gradient_checkpointing": True, "learning_rate": 1e-5}, False),
}


def length(completions, **kwargs):
    return [-len(completion[-1]["content"]) / 100 for completion in completions]


def build(folder, *, lora, **options):
    from peft import LoraConfig

    rows = [(a, b) for a in range(2, 6) for b in range(3, 7)]
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": f"What is {a} * {b}?"}]} for a, b in rows])
    defaults = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4, "max_steps": 2,
        "max_completion_length": 12, "use_cpu": True, "bf16": True, "logging_steps": 1, "report_to": "none",
        "save_steps": 1, "save_only_model": False, "learning_rate": 2e-4, "token_weight": "tr_grpo",
        "model_init_kwargs": {"dtype": "float32"}, "disable_tqdm": True,
    }  # fmt: skip
    peft = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]) if lora else None
    args = LambdaGRPOConfig(str(folder), **(defaults | options))
    return LambdaGRPOTrainer(str(FOLDER), length, args, dataset, peft_config=peft)


def trained(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("setup", SETUPS)
def test_it_trains_and_resumes_to_the_bit(tmp_path, setup):
    options, lora = SETUPS[setup]
    whole = build(tmp_path / "run", lora=lora, **options)
    before = trained(whole)
    whole.train()
    assert whole.lambda_value != 0 and abs(whole.lambda_value) < 0.5
    assert any(not torch.equal(before[name], after) for name, after in trained(whole).items())
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    assert 0 < logs[-1]["token_weight/at_max"] < 1  # on a real vocabulary v has something to weigh
    again = build(tmp_path / "run", lora=lora, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert again.lambda_value == whole.lambda_value
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(again)[name]), name
