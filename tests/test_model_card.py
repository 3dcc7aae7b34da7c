"""The model card: TRL's, with both papers, λ as it ended, and the settings that had an effect."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from support import Batch, build, config
from trl import GRPOConfig, GRPOTrainer

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer, TRGRPOConfig, TRGRPOTrainer


def train_and_write(trainer_class, config_class, train: bool = False, **options) -> tuple[object, ModelCard]:
    batch = Batch()
    trainer = build(trainer_class, config(config_class, batch, **options), batch)
    trainer._name = trainer_class._name
    if train:
        trainer.train()
    trainer.create_model_card(model_name="adder", tags="arithmetic")
    return trainer, ModelCard.load(f"{trainer.args.output_dir}/README.md")


def rows(card: ModelCard) -> dict[str, str]:
    """The table of settings."""
    section = card.text.partition("### How the tokens were weighted")[2].partition("### ")[0]
    pairs = re.findall(r"^\| (.+?) \| (.+) \|$", section, re.MULTILINE)
    return {name.partition(" (`")[0]: value for name, value in pairs}


def test_the_card_says_what_lambda_became_and_cites_both_papers():
    options = {"lambda_init": 0.5, "lambda_learning_rate": 0.25, "max_steps": 2, "token_regulation": "sigmoid"}
    trainer, card = train_and_write(LambdaGRPOTrainer, LambdaGRPOConfig, train=True, **options)
    assert trainer.lambda_value != 0.5
    assert rows(card) == {
        "setting": "value",
        "length weight": "λ-GRPO: G · softmax of h^λ (arXiv 2510.06870)",
        "scope of the token mean": "batch",
        "λ": f"{trainer.lambda_value:.4f} at step 2 (from 0.5, learned)",
        "learning rate of λ": "0.25",
        "r": "0.1111",
        "token weight": "TR-GRPO: clip(α·σ(k·(π - p0)), L, U) (arXiv 2511.00066)",
        "its parameters": "α = 2, k = 9, p0 = 0.25, L = 1, U = 1.4",
        "inside the clip": "no",
        "surrogate": "dapo",
    }
    assert "trained with LambdaGRPO, a method introduced in [λ-GRPO: Unifying" in card.text
    bibliography = card.text.partition("## Citations")[2]
    assert bibliography.count("@article") == 2 and bibliography.count("@software") == 1  # TRL's own stays
    assert "arXiv:2510.06870" in bibliography and "arXiv:2511.00066" in bibliography
    assert {"trl", "grpo", "lambda-grpo", "tr-grpo", "arithmetic"} <= set(card.data.tags)


def test_every_checkpoint_renews_the_card():
    batch = Batch()
    args = config(LambdaGRPOConfig, batch, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = build(LambdaGRPOTrainer, args, batch)
    trainer.train()
    card = ModelCard.load(f"{args.output_dir}/README.md")
    assert rows(card)["λ"] == f"{trainer.lambda_value:.4f} at step 2 (from 0, learned)"


def test_the_card_of_tr_grpo_names_its_own_paper_first_and_no_lambda():
    _, card = train_and_write(TRGRPOTrainer, TRGRPOConfig)
    assert "a method introduced in [Token-Regulated Group Relative" in card.text
    table = rows(card)
    assert table["length weight"] == "TRL's own, of `loss_type=dapo`" and "λ" not in table and "r" not in table
    citations = re.findall(r"arXiv:(\d{4}\.\d{5})", card.text.partition("## Citations")[2])
    assert citations == ["2511.00066", "2510.06870"]
    assert "tr-grpo" in card.data.tags and "lambda-grpo" not in card.data.tags


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"aggregation": "grpo"}, {"length weight": "GRPO: mean over sequences of each sequence's mean"}),
        ({"aggregation": "power", "lambda_learnable": False, "lambda_init": -1.0}, {"λ": "-1.0000 at step 0 (fixed)"}),
        ({"aggregation_scope": "prompt"}, {"scope of the token mean": "prompt"}),
        (
            {"token_regulation": "linear", "regulation_alpha": 0.6},
            {"token weight": "AR: α·π + 1 - α", "its parameters": "α = 0.6"},
        ),
        ({}, {"token weight": "none"}),
    ],
)
def test_only_what_had_an_effect_is_in_the_card(options, expected):
    table = rows(train_and_write(LambdaGRPOTrainer, LambdaGRPOConfig, **options)[1])
    assert all(table[name].startswith(value) for name, value in expected.items())
    assert ("λ" in table) == (options.get("aggregation", "lambda") in ("lambda", "power"))
    assert ("learning rate of λ" in table) == ("λ" in table and options.get("lambda_learnable", True))
    assert ("r" in table) == (options.get("aggregation", "lambda") == "lambda")
    assert ("its parameters" in table) == ("token_regulation" in options)


def test_the_rest_of_the_card_is_trls():
    trainer, ours = train_and_write(LambdaGRPOTrainer, LambdaGRPOConfig)
    batch = Batch()
    theirs = build(GRPOTrainer, config(GRPOConfig, batch), batch)
    theirs.create_model_card(model_name="adder", tags="arithmetic")
    expected = ModelCard.load(f"{theirs.args.output_dir}/README.md").text
    # But for what TRL has no name for: the next test.
    unnamed = "is a fine-tuned version of [None](https://huggingface.co/None)"
    assert unnamed in expected and 'model="None"' in expected
    folder = Path(trainer.args.output_dir).name
    expected = expected.replace(unnamed, "was trained from a model without a name")
    expected = expected.replace('model="None"', f'model="{folder}"')
    text = ours.text.replace(ours.text.partition("### How the tokens")[1], "### How the tokens")
    head, _, tail = text.partition("### How the tokens were weighted")
    assert expected.startswith(head.partition("This model was trained with")[0])
    versions = "### Framework versions" + tail.partition("### Framework versions")[2].partition("## Citations")[0]
    assert versions in expected


@pytest.mark.parametrize("source", ["", "a/folder/of_mine", "org/some-model"])
def test_the_card_never_names_a_model_none(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "folder" / "of_mine").mkdir(parents=True)
    batch = Batch()
    trainer = build(LambdaGRPOTrainer, config(LambdaGRPOConfig, batch, output_dir="runs/adder"), batch)
    trainer.model.config._name_or_path = source
    trainer.create_model_card(dataset_name="org/sums")
    text = ModelCard.load("runs/adder/README.md").text
    assert "None" not in text
    assert 'pipeline("text-generation", model="adder"' in text
    says = {
        "": "This model was trained from a model without a name on the [org/sums]",
        "a/folder/of_mine": "This model is a fine-tuned version of `of_mine` on the [org/sums]",
        "org/some-model": "version of [org/some-model](https://huggingface.co/org/some-model) on the [org/sums]",
    }
    assert says[source] in text
    assert "Model Card for adder" in text, text.splitlines()[0]


def test_a_template_without_the_usual_part_gets_the_settings_at_its_end(monkeypatch):
    import trl_lambda.model_card as model_card

    monkeypatch.setattr(model_card, "_FOLLOWS", "### A heading that no template has")
    _, card = train_and_write(LambdaGRPOTrainer, LambdaGRPOConfig)
    assert card.text.rstrip().endswith("| surrogate (`loss_type`) | dapo |")
    assert card.text.count("### How the tokens were weighted") == 1


def test_only_the_main_process_writes(monkeypatch):
    batch = Batch()
    trainer = build(LambdaGRPOTrainer, config(LambdaGRPOConfig, batch), batch)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card(model_name="adder")  # and reads no file that another process may not have written yet
    assert not (Path(trainer.args.output_dir) / "README.md").exists()
