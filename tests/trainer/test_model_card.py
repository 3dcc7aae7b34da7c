"""The model card: TRL's, with the paper whose weight was on, working code, λ as it ended and what had an effect."""

import os
import re
from pathlib import Path

import pytest
import torch
from harness import LORA, make
from huggingface_hub import ModelCard
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from user_weights import half

from trl_lambda import TRGRPOConfig, TRGRPOTrainer

LAMBDA_GRPO, TR_GRPO, GRPO = "2510.06870", "2511.00066", "2402.03300"


def card_of(trainer, **arguments) -> ModelCard:
    trainer.create_model_card(**arguments)
    return ModelCard.load(f"{trainer.args.output_dir}/README.md")


def settings(card: ModelCard) -> dict[str, str]:
    section = card.text.partition("### How the tokens were weighted")[2].partition("### ")[0]
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", section, re.MULTILINE))


@pytest.mark.parametrize(
    ("options", "method", "cited", "sources"),
    [
        ({}, "λ-GRPO", [LAMBDA_GRPO], rf"\[arXiv {LAMBDA_GRPO}\]"),
        ({"token_weight": "ar"}, "λ-GRPO", [LAMBDA_GRPO], r"\[.*\), \[arXiv 2505.12929\]"),
        ({"length_weight": None, "token_weight": "tr_grpo"}, "TR-GRPO", [TR_GRPO], rf"\[arXiv {TR_GRPO}\]"),
        ({"token_weight": "tr_grpo"}, "λ-GRPO and TR-GRPO", [LAMBDA_GRPO, TR_GRPO], r"\["),
        ({"length_weight": "power"}, "GRPO", [GRPO], "this project's"),
        ({"length_weight": "balanced"}, "GRPO", [GRPO], r"\[arXiv 2605.04077\]\(http"),
        ({"length_weight": None}, "GRPO", [GRPO], "TRL"),
        ({"arguments": {"length_weight": half}}, "GRPO", [GRPO], "the user's"),
    ],
)
def test_the_card_cites_the_paper_whose_weight_was_on(options, method, cited, sources):
    card = card_of(make(**options), tags="arithmetic")
    tags = {name.replace("λ", "lambda").lower() for name in method.split(" and ")}
    assert f"This model was trained with {method}, a method introduced in" in card.text
    assert f"(https://huggingface.co/papers/{cited[0]})" in card.text
    bibliography = card.text.partition("## Citations")[2]
    assert f"Cite {method} as:" in bibliography and "@software{vonwerra2020trl" in bibliography
    assert re.findall(r"arXiv:(\d{4}\.\d{5})", bibliography) == cited
    assert {"trl", "grpo", "arithmetic"} | tags == set(card.data.tags) - {"generated_from_trainer"}
    assert re.search(f"Source of the weights: {sources}", card.text)


def test_the_settings_table_shows_what_lambda_became():
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    weights = {"token_weight": "tr_grpo", "token_weight_kwargs": {"alpha": 1.5}, "positive_weight": 2.0}
    trainer = make(lambda_init=0.5, lambda_learning_rate=0.25, **saving, **weights)
    trainer.train()
    assert trainer.lambda_value != 0.5
    card = ModelCard.load(f"{trainer.args.output_dir}/README.md")  # of the checkpoint
    assert settings(card) == {
        "setting": "value",
        "length weight f (`length_weight`)": "λ-GRPO: G · softmax of h^λ",
        "r (`length_scale`)": "0.1111",
        "scope of the token mean (`length_weight_scope`)": "batch",
        "λ": f"{trainer.lambda_value:.4f} at step 2 (from 0.5, learned)",
        "how λ learns": "descent, at rate 0.25",
        "`positive_weight`": "2.0",
        "token weight v (`token_weight`)": "TR-GRPO: clip(α·σ(k·(π - p0)), L, U)",
        "α (`alpha`)": "1.5",
        "k (`slope`)": "9",
        "p0 (`center`)": "0.25",
        "L (`min`)": "1",
        "U (`max`)": "1.4",
        "surrogate (`loss_type`)": "dapo",
    }


@pytest.mark.parametrize(
    ("options", "shown", "hidden"),
    [
        ({"length_weight": None}, {"length weight f (`length_weight`)": "TRL's own, of 'dapo'"}, ["λ"]),
        ({"length_weight": "power", "lambda_learnable": False, "lambda_init": -1.0},
         {"λ": "-1.0000 at step 0 (fixed)"}, ["how λ learns", "r (`length_scale`)", "`lambda_side`"]),
        ({"length_weight": "power", "lambda_side": "signed", "lambda_features": ["length", "mean_logp"]},
         {"`lambda_side`": "signed", "`lambda_features`": "length, mean_logp",
          "λ": "length 0.0000, mean_logp 0.0000 at step 0 (from 0, learned)"}, []),
        ({"length_weight": "power", "length_target": 8.0}, {"`length_target`": "8.0"}, ["`positive_weight`"]),
        ({"length_weight": "dr_grpo"}, {"divisor (`max_completion_length`)": "16"},
         ["scope of the token mean (`length_weight_scope`)"]),
        ({"token_weight": "tr_grpo", "token_weight_inside_clip": True}, {"`token_weight_inside_clip`": "True"}, []),
    ],
)  # fmt: skip
def test_only_what_had_an_effect_is_in_the_table(options, shown, hidden):
    table = settings(card_of(make(**options)))
    assert {name: table[name] for name in shown} == shown
    assert not set(hidden) & set(table)


def run_code(card: ModelCard) -> dict:
    (code,) = re.findall(r"### How to load it again\n\n```python\n(.*?)^```", card.text, re.MULTILINE | re.DOTALL)
    namespace: dict = {}
    exec(code, namespace)
    return namespace


@pytest.mark.parametrize("output_dir", ["runs/adder", "absolute"])
@pytest.mark.parametrize("options", [{"lambda_init": 0.5}, {"length_weight": "grpo"}], ids=str)
def test_the_code_of_the_card_loads_model_tokenizer_and_lambda(options, output_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output_dir = str(tmp_path / "adder") if output_dir == "absolute" else output_dir
    trainer = make(output_dir=output_dir, **options)
    trainer.save_model()
    card = card_of(trainer)
    loaded = run_code(card)
    assert f"name = {output_dir!r}  # path of this folder" in card.text
    assert f'pipeline("text-generation", model="{output_dir}"' in card.text
    for mine, theirs in zip(loaded["model"].parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert loaded["tokenizer"].vocab_size == trainer.processing_class.vocab_size
    assert loaded.get("lam") == options.get("lambda_init")


def test_an_adapter_is_loaded_as_one(model_folder):
    trainer = make(model=model_folder, arguments={"peft_config": LoraConfig(**LORA)})
    trainer.save_model()
    loaded = run_code(card_of(trainer))
    assert any("lora" in name for name, _ in loaded["model"].named_parameters()) and loaded["lam"] == 0.0


def test_a_model_on_the_hub_is_named_as_there():
    trainer = make()
    trainer.hub_model_id = "someone/adder"
    text = card_of(trainer).text
    assert "name = 'someone/adder'\n" in text and "hf_hub_download(name, 'lambda.json')" in text
    assert "this folder" not in text


def test_the_picture_of_the_run_is_shown(monkeypatch):
    trainer = make()
    folder = Path(trainer.args.output_dir)
    assert "### The run" not in card_of(trainer).text
    for time, name in enumerate(("run.png", "report.png", "run.png")):  # the newest
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (time, time))
        assert f"### The run\n\n![What the run logged]({name})" in card_of(trainer).text
    (folder / "README.md").unlink()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()  # the main process alone writes
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("source", "origin"),
    [
        ("", "was trained from a model without a name on the [org/sums]"),
        ("a/folder/of_mine", "is a fine-tuned version of `of_mine` on the [org/sums]"),
        ("org/model", "is a fine-tuned version of [org/model](https://huggingface.co/org/model) on the"),
    ],
)
def test_the_card_never_says_none(source, origin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "folder" / "of_mine").mkdir(parents=True)
    trainer = make(output_dir="runs/adder")
    trainer.model.config._name_or_path = source
    text = card_of(trainer, dataset_name="org/sums").text
    assert f"This model {origin}" in text and "Model Card for adder" in text and "None" not in text


def test_the_rest_of_the_card_is_trls():
    ours = card_of(make(trainer_class=TRGRPOTrainer, config_class=TRGRPOConfig)).text
    theirs = card_of(make(trainer_class=GRPOTrainer, config_class=GRPOConfig)).text
    kept = [line for line in theirs.splitlines() if not re.search("^$|```|None|GRPO|shao2024|^    |Model Card", line)]
    assert len(kept) > 20 and [line for line in ours.splitlines() if line in kept] == kept
