"""Stand-ins for what TRL's tests name on the hub: its tiny models in the hub's cache, and zen."""

import json
import re
import runpy
import shutil
from pathlib import Path

import datasets
import torch
import transformers
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from trl.chat_template_utils import qwen2_5_chat_template, qwen3_chat_template

OWNER = "trl-internal-testing"
SMALL, LARGE = "0" * 40, "1" * 40  # commits: 1,024 tokens, and as many as give Qwen's their numbers
MODELS = """Qwen2ForCausalLM-2.5 Qwen3ForCausalLM Qwen3MoeForCausalLM Cohere2ForCausalLM Gemma2ForCausalLM
GptOssForCausalLM Glm4MoeForCausalLM NemotronHForCausalLM-nano LlamaForCausalLM-3.2
Qwen2ForSequenceClassification-2.5 Qwen3ForSequenceClassification LlamaForSequenceClassification-3.2"""
# Each architecture takes from these what it has.
SIZES = """hidden_size=8 num_hidden_layers=2 num_attention_heads=4 num_key_value_heads=2 head_dim=8
intermediate_size=32 num_labels=1 first_k_dense_replace=0 num_experts=4 num_local_experts=4 n_routed_experts=4
num_experts_per_tok=2 moe_intermediate_size=32 moe_shared_expert_intermediate_size=32 mamba_num_heads=8
mamba_head_dim=4 n_groups=1 ssm_state_size=16"""
# The tokens of Qwen's vocabulary that the tests of tools write by number, in the spelling of byte-level BPE.
TOKENS = """293=Ġb 314=Ġ{ 330=Ġ" 397=>Ċ 411=out 450=dec 497=", 522=</ 606=name 788=": 894=Ġany 927=sh 944='t 1318=text
1414=Ġknow 1513=Ġdon 2765=Ġwon 4913={" 5212=Ġ{" 5392=Ġtool 6023=hi 6659=call 7692=async 9520=step 11248=}}Ċ
13477=rement 14172=tool 16252=Ġincrement 16370=arguments 17453=Done 22785=_tool 35744=increment 64648=multiply
93054=_multiply 95642="}}Ċ 151643=<|endoftext|> 151644=<|im_start|> 151645=<|im_end|> 151657=<tool_call>
151658=</tool_call> 151665=<tool_response> 151666=</tool_response> 151667=<think> 151668=</think>"""


def write_model(folder: Path, name: str, vocabulary: int) -> None:
    """A model with random weights, and a tokenizer that knows the bytes and `TOKENS`."""
    tokens = [token.split("=", 1) for token in TOKENS.split()]
    words = sorted(ByteLevel.alphabet()) + [f"w{i}" for i in range(256, vocabulary)]
    for i, (number, word) in enumerate(tokens):
        words[int(number) if int(number) < vocabulary else vocabulary - 1 - i] = word
    tokenizer = transformers.Qwen2Tokenizer(
        {word: number for number, word in enumerate(words)},
        [],
        eos_token="<|im_end|>",
        chat_template=qwen3_chat_template if name.startswith("Qwen3") else qwen2_5_chat_template,
    )
    tokenizer.add_tokens([AddedToken(word, normalized=False) for _, word in tokens if re.fullmatch("<.+>", word)])
    tokenizer.save_pretrained(folder)
    model_class = getattr(transformers, name.split("-")[0])
    config = model_class.config_class(
        **{size: int(value) for size, value in (pair.split("=") for pair in SIZES.split())},
        layers_block_type=["mamba", "attention", "moe"],
        vocab_size=vocabulary,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)


def write_hub(hub: Path, repository: Path) -> None:
    """The models as a cache of the hub has them."""
    for name in MODELS.split():
        folder = hub / f"models--{OWNER}--tiny-{name}"
        write_model(folder / "snapshots" / SMALL, name, 1024)
        if name.startswith("Qwen"):
            write_model(folder / "snapshots" / LARGE, name, 151669)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(SMALL)
    # The model with code of its own: the Llama, with the clone's code.
    folder = hub / f"models--{OWNER}--tiny-RemoteForCausalLM"
    shutil.copytree(hub / f"models--{OWNER}--tiny-LlamaForCausalLM-3.2", folder)
    for file in (repository / "scripts/generate_tiny_models/for_causal_lm/_remote_code").glob("*_remote.py"):
        shutil.copy(file, folder / "snapshots" / SMALL)
    file = folder / "snapshots" / SMALL / "config.json"
    config = json.loads(file.read_text()) | {"model_type": "remote", "architectures": ["RemoteForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_remote.RemoteConfig",
        "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
    }
    file.write_text(json.dumps(config))


def use_vocabulary(hub: Path, commit: str) -> None:
    """Which of the two snapshots the names of the Qwen models mean."""
    for file in hub.glob("*Qwen*/refs/main"):
        file.write_text(commit)


def make_zen(repository: Path) -> dict[str, datasets.DatasetDict]:
    """Run the clone's script that makes zen and sends it to the hub, and keep what it sends."""
    sent = {}
    datasets.DatasetDict.push_to_hub = lambda splits, _, config_name: sent.update({config_name: splits})
    runpy.run_path(str(repository / "scripts" / "generate_zen_dataset.py"))["main"](0.1, True, "")
    return sent
