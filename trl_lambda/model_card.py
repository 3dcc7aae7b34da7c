"""The model card: TRL's own, with the paper whose weight was on, code that loads the run, and a settings table."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from .lambda_parameter import LAMBDA_FILE
from .weights import LengthWeight, TokenWeight

PAPERS = {
    "arXiv 2510.06870": {
        "id": "2510.06870",
        "name": "λ-GRPO",
        "title": "λ-GRPO: Unifying the GRPO Frameworks with Learnable Token Preferences",
        "citation": """\
@article{wang2025lambdagrpo,
    title        = {{$\\lambda$-GRPO: Unifying the GRPO Frameworks with Learnable Token Preferences}},
    author       = {Yining Wang and Jinman Zhao and Chuangxin Zhao and Shuhao Guan and Gerald Penn and Shinan Liu},
    year         = 2025,
    eprint       = {arXiv:2510.06870},
}""",
    },
    "arXiv 2511.00066": {
        "id": "2511.00066",
        "name": "TR-GRPO",
        "title": "Token-Regulated Group Relative Policy Optimization for Stable Reinforcement Learning in Large "
        "Language Models",
        "citation": """\
@article{le2025tokenregulated,
    title        = {{Token-Regulated Group Relative Policy Optimization for Stable Reinforcement Learning in Large \
Language Models}},
    author       = {Tue Le and Nghi D. Q. Bui and Linh Ngo Van and Trung Le},
    year         = 2025,
    eprint       = {arXiv:2511.00066},
}""",
    },
}
PICTURES = ("report.png", "run.png")  # of `trl-lambda report`, and of `plot: true`
_OPTIONS = ("positive_weight", "drop_tied_groups", "length_target", "lambda_bounds", "token_weight_inside_clip")


def paper_of(length_weight: LengthWeight | None, token_weight: TokenWeight | None) -> dict[str, str] | None:
    """Return the paper of the weights that are on, λ-GRPO's with both citations if both are, as TRL's `_paper`."""
    papers = [PAPERS[weight.source] for weight in (length_weight, token_weight) if weight and weight.source in PAPERS]
    both = {"name": " and ".join(p["name"] for p in papers), "citation": "\n".join(p["citation"] for p in papers)}
    return papers[0] | both if papers else None


def card_tags(trainer: Any, tags: str | list[str] | None) -> list[str]:
    """Return the caller's tags and those of the papers whose weights are on."""
    paper = paper_of(trainer.length_weight, trainer.token_weight)
    methods = paper["name"].replace("λ", "lambda").lower().split(" and ") if paper else []
    return sorted({*([tags] if isinstance(tags, str) else tags or ()), *methods})


def complete_card(trainer: Any) -> None:
    """Add picture, loading code and settings to the card that TRL has written into `output_dir`."""
    path = Path(str(trainer.args.output_dir)) / "README.md"
    # The settings precede this part of TRL's template.
    before, anchor, after = _with_names(trainer, path.read_text(encoding="utf-8")).partition("### Framework versions")
    pictures = [
        f"### The run\n\n![What the run logged]({file.name})"
        for file in sorted(path.parent.glob("*.png"), key=lambda file: file.stat().st_mtime)
        if file.name in PICTURES
    ]
    sections = "\n\n".join([before.rstrip(), *pictures[-1:], _loading_code(trainer), _settings_table(trainer)])
    path.write_text(f"{sections}\n\n{anchor}{after}".rstrip() + "\n", encoding="utf-8")


def _with_names(trainer: Any, card: str) -> str:
    """Fill in what TRL's card calls None without a hub, and name the method instead of the trainer class."""
    base: Any = trainer.model.config._name_or_path
    card = card.replace(
        "is a fine-tuned version of [None](https://huggingface.co/None)",
        f"is a fine-tuned version of `{Path(base).name}`" if base else "was trained from a model without a name",
    )
    if trainer.hub_model_id is None:
        card = card.replace('model="None"', f'model="{trainer.args.output_dir}"')
    paper = paper_of(trainer.length_weight, trainer.token_weight)
    for phrase in ("This model was trained with {}", "Cite {} as"):
        card = card.replace(phrase.format(trainer._name), phrase.format(paper["name"] if paper else "GRPO"))
    return card


def _loading_code(trainer: Any) -> str:
    is_adapter = hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
    package, kind = ("peft", "AutoPeftModel") if is_adapter else ("transformers", "AutoModel")
    hub, folder = trainer.hub_model_id, str(trainer.args.output_dir)
    code = [
        f"from {package} import {kind}ForCausalLM",
        "from transformers import AutoTokenizer",
        "",
        f"name = {hub!r}" if hub else f"name = {folder!r}  # path of this folder",
        f"model = {kind}ForCausalLM.from_pretrained(name)",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
    ]
    if trainer.lambda_value is not None:
        file = f"hf_hub_download(name, {LAMBDA_FILE!r})" if hub else f"name, {LAMBDA_FILE!r}"
        code[:0] = ["from huggingface_hub import hf_hub_download"] if hub else []
        code = [
            "import json",
            "from pathlib import Path",
            "",
            *code,
            f'lam = json.loads(Path({file}).read_text())["lambda"]  # go on with lambda_init=lam',
        ]
    return "### How to load it again\n\n```python\n" + "\n".join(code) + "\n```"


def _settings_table(trainer: Any) -> str:
    args, f, v = trainer.args, trainer.length_weight, trainer.token_weight
    changed = [field.name for field in fields(args) if getattr(args, field.name) != field.default]
    kind = f.formula or f.name if f else f"TRL's own, of {args.loss_type!r}"
    rows = [("length weight f (`length_weight`)", kind), *_parameters(f)]
    if f is not None and f.has_scope:
        rows.append(("scope of the token mean (`length_weight_scope`)", args.length_weight_scope))
    if trainer.lambda_value is not None:
        values = [f"{name} {value:.4f}" for name, value in trainer.lambda_values.items()]
        value = ", ".join(values) if len(values) > 1 else f"{trainer.lambda_value:.4f}"
        how = f"from {args.lambda_init:g}, learned" if args.lambda_learnable else "fixed"
        rows.append(("λ", f"{value} at step {trainer.state.global_step} ({how})"))
        if args.lambda_learnable:
            rows.append(("how λ learns", f"{trainer._lambda.learning.name}, at rate {args.lambda_learning_rate:g}"))
    rows += [(f"`{name}`", getattr(args, name)) for name in _OPTIONS if name in changed]
    rows += [("token weight v (`token_weight`)", v.formula or v.name if v else "none"), *_parameters(v)]
    rows += [("surrogate (`loss_type`)", args.loss_type)]
    table = "\n".join("| {} | {} |".format(*(str(cell).replace("|", "\\|") for cell in row)) for row in rows)
    links = [(w.source, w.source.replace("arXiv ", "https://arxiv.org/abs/")) for w in (f, v) if w]
    sources = [source if source == link else f"[{source}]({link})" for source, link in links]
    return (
        "### How the tokens were weighted\n\nTrained with `trl_lambda`, an independent implementation of the papers. "
        f"Source of the weights: {', '.join(sources) or 'TRL'}.\n\n"
        f"| setting | value |\n|---|---|\n{table}"
    )


def _parameters(weight: LengthWeight | TokenWeight | None) -> list[tuple[str, Any]]:
    # The user's object, where a member is made of one that names arguments.
    rows, weight = [], weight if is_dataclass(weight) else getattr(weight, "function", weight)
    for field in fields(weight) if is_dataclass(weight) else ():
        value, symbol = getattr(weight, field.name), field.metadata.get("symbol")
        if "config" in field.metadata and value == field.default:  # an option of λ that nobody set
            continue
        value = f"{value:.4g}" if isinstance(value, float) else ", ".join(value) if isinstance(value, tuple) else value
        rows.append(
            (f"{symbol} (`{field.name}`)" if symbol else f"`{field.metadata.get('config', field.name)}`", value)
        )
    return rows
