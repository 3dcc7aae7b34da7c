"""Parts of the model card: the run's picture, and how model, adapter and λ are loaded again."""

from pathlib import Path
from typing import TYPE_CHECKING

from .preference.files import LAMBDA_FILE

if TYPE_CHECKING:
    from .lambda_grpo_trainer import LambdaGRPOTrainer

# Written by `ReportCallback` and `trl-lambda report`, and by `trl-lambda train --plot`.
PICTURES = ("report.png", "run.png")


def loading_section(trainer: "LambdaGRPOTrainer") -> str:
    """
    Say in Markdown how to use what lies beside the card: the run's picture, if there is one by now, and code for model
    or adapter and, if there is one, λ.
    """
    folder = Path(str(trainer.args.output_dir)).resolve()
    on_hub = trainer.hub_model_id
    name = on_hub or folder.name
    picture = next((name for name in PICTURES if (folder / name).is_file()), None)
    parts = [] if picture is None else [f"### The run\n\n![What was logged]({picture})"]
    if hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"):
        what, package, model_class = "The adapter, on its base model", "peft", "AutoPeftModelForCausalLM"
    else:
        what, package, model_class = "The model", "transformers", "AutoModelForCausalLM"
    code = [
        f"from {package} import {model_class}",
        "from transformers import AutoTokenizer",
        "",
        f"name = {name!r}" + ("" if on_hub else "  # this folder"),
        f"model = {model_class}.from_pretrained(name)",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
    ]
    parts.append(f"### How to load it again\n\n{what}:\n\n```python\n" + "\n".join(code) + "\n```")
    if trainer.lambda_value is not None:
        parts.append(_lambda_part(on_hub))
    return "\n\n".join(parts)


def _lambda_part(on_hub: str | None) -> str:
    where = f"hf_hub_download(name, {LAMBDA_FILE!r})" if on_hub else f"os.path.join(name, {LAMBDA_FILE!r})"
    imports = ["import json"] + (["from huggingface_hub import hf_hub_download"] if on_hub else ["import os"])
    code = [*imports, "", f"with open({where}) as file:", '    lam = json.load(file)["lambda"]']
    return (
        "λ, to read it or to go on from it with `LambdaGRPOConfig(lambda_init=lam)`:\n\n```python\n"
        + "\n".join(code)
        + "\n```\n\nA run that was broken off goes on, λ and its optimizer included, by "
        "`trainer.train(resume_from_checkpoint=...)`."
    )
