"""Shapes of the models that are measured, with random weights: no hub is needed."""

from dataclasses import dataclass

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

# From the config.json of each model on the hub.
_QWEN = {"vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True}
MODELS = {
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # Next to no model: what the trainers themselves take shows most.
    "hidden 24": {
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # A vocabulary of the real ones behind next to no model: what the head takes is all there is.
    "head": _QWEN | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "qwen2.5-0.5b": _QWEN
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "qwen2.5-1.5b": _QWEN
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "qwen2.5-7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
PAD, EOS = 0, 1


@dataclass(frozen=True)
class Workload:
    """
    What one measurement trains: a model shape and the batch of one optimizer step.

    Args:
        shape (`str`): a key of `MODELS`.
        rows (`int`): completions of a micro-batch.
        accumulation (`int`): micro-batches of an optimizer step.
        group (`int`): completions of a prompt.
        completion (`int`): tokens of the longest completion.
        dtype (`str`): of the weights; `"bfloat16"` also turns autocast on.
        checkpointing (`bool`): gradient checkpointing.
        lora (`bool`): train adapters of rank 16 on every projection instead of all weights.
        optim (`str`): `TrainingArguments.optim`.
        device (`str`): `"cpu"` or `"cuda"`.
        logging_steps (`int`): optimizer steps between two logs.
    """

    shape: str = "tiny"
    rows: int = 64
    accumulation: int = 1
    group: int = 8
    completion: int = 48
    dtype: str = "float32"
    checkpointing: bool = False
    lora: bool = False
    optim: str = "adamw_torch"
    device: str = "cpu"
    logging_steps: int = 1

    @property
    def step_rows(self) -> int:
        return self.rows * self.accumulation

    def describe(self) -> str:
        """The setting in words, for the results' `setting` column."""
        words = [self.shape, f"{self.rows}x{self.accumulation} completions of <= {self.completion} tokens", self.dtype]
        words += ["gradient checkpointing"] if self.checkpointing else []
        words += ["LoRA"] if self.lora else []
        words += [self.optim] if self.optim != "adamw_torch" else []
        return ", ".join([*words, f"logging_steps={self.logging_steps}"])


def build_model(workload: Workload) -> Qwen2ForCausalLM:
    """The same weights for the same workload, made on the device they are used on."""
    torch.manual_seed(0)
    config = Qwen2Config(**MODELS[workload.shape], pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None)
    with torch.device(workload.device):
        return Qwen2ForCausalLM(config).to(getattr(torch, workload.dtype))
