r"""
Local stand-ins for what the recipes name on the hub: a model with a chat template, and datasets in the hub's layout.

The model's weights are near 0, so that it draws its tokens evenly; among them are the right answers, each
`\boxed{...}` one token. So TRL's reward finds some completions right and some wrong, as with a real model.
"""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl.chat_template_utils import qwen3_chat_template

BOXED = [rf"\boxed{{{answer}}}" for answer in ("72", "1000", r"\frac{1}{2}", "12", "121")]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

GSM8K = [
    {"question": "Ann sold 48 clips, and then half as many. How many?", "answer": "48/2 = <<48/2=24>>24\n#### 72"},
    {"question": "How many metres is a kilometre?", "answer": "It is 1,000.\n#### 1,000"},
]
MATH = [
    {
        "problem": r"What is $\frac{3}{6}$ in lowest terms?",
        "solution": r"First $\boxed{3}$ cancels, so it is $\boxed{\frac{1}{2}}$.",
        "level": 1,
    },
    {"problem": "What is $8 \\cdot 9$?", "solution": r"It is $\boxed 72$.", "level": 2},
]


def puzzle(names: list[str], solution: list[bool]) -> dict:
    """A row with the columns of `K-and-K/knights-and-knaves`."""
    quiz = f"You meet {len(names)} inhabitants: {', '.join(names)}. So who is a knight and who is a knave?"
    return {"quiz": quiz, "names": names, "solution": solution, "cot_repeat_steps": ["Assume that this is so."]}


KNIGHTS_AND_KNAVES = [puzzle(["Zoey", "Oliver"], [True, False]), puzzle(["Ava", "Noah", "Mia"], [True, False, True])]
SENTENCES = [["Alien is a film.", " Its director is Ridley Scott."], ["Moss grows in the shade."]]
PARAGRAPHS = {"title": ["Alien", "Moss"], "sentences": SENTENCES}
HOTPOTQA = [{"question": "Who directed Alien?", "answer": "Ridley Scott", "context": PARAGRAPHS, "level": "easy"}]


def write_dataset(folder: Path, configs: dict[str, dict[str, list[dict]]]) -> str:
    """Write configuration -> split -> rows as a hub repository has them: files, and a README.md that names them."""
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            file = folder / config / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            card += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return str(folder)


def write_datasets(folder: Path) -> dict[str, str]:
    """The recipes' datasets: hub name -> local folder with the same configurations, splits and columns."""
    inhabitants = [f"{n}ppl" for n in range(2, 9)]
    layouts = {
        "openai/gsm8k": {"main": {"train": GSM8K * 32, "test": GSM8K * 2}},
        "nlile/hendrycks-MATH-benchmark": {"default": {"train": MATH * 32, "test": MATH * 2}},
        "K-and-K/knights-and-knaves": {
            "train": dict.fromkeys(inhabitants, KNIGHTS_AND_KNAVES * 8),
            "test": dict.fromkeys(inhabitants, KNIGHTS_AND_KNAVES),
        },
    }
    layouts["hotpotqa/hotpot_qa"] = {"distractor": {"train": HOTPOTQA * 64, "validation": HOTPOTQA * 4}}
    return {name: write_dataset(folder / name, layout) for name, layout in layouts.items()}


def write_model(folder: Path) -> str:
    """A tiny Qwen2 with a chat template, whose vocabulary is a few letters and the answers."""
    return write_any_model(folder, ["<user>", "<assistant>", *BOXED], "<eos>", TEMPLATE)


def write_agent_model(folder: Path, calls: list[tuple[str, dict]], answers: list[str] = BOXED) -> str:
    """The same with Qwen3's template, and with calls of tools, (name, arguments), one token each."""
    written = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    calls = [f"<tool_call>\n{call}\n</tool_call>" for call in written]
    frame = ["<|im_start|>", "assistant", "user", "system", "\n", "<think>", "</think>", "<tool_response>"]
    return write_any_model(folder, [*frame, *calls, *answers], "<|im_end|>", qwen3_chat_template)


def write_any_model(folder: Path, added: list[str], eos: str, template: str) -> str:
    # AutoTokenizer of transformers 5 reads byte-level BPE for Qwen2, which leaves out the letters it does not know.
    words = ["<pad>", eos, "a", "e", "o"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in added])
    names = {"pad_token": "<pad>", "eos_token": eos, "padding_side": "left", "chat_template": template}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 8192}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.02}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = Qwen2Config(vocab_size=len(words) + len(added), **sizes, **heads, **ends)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)
