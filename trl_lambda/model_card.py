"""The model card: TRL's own, with both papers to cite, λ as it ended and the settings of the weights."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card_loading import loading_section
from .weights import LengthWeight, TokenWeight
from .weights.custom import USERS

if TYPE_CHECKING:
    from .lambda_grpo_trainer import LambdaGRPOTrainer

LAMBDA_CITATION = """\
@article{wang2025lambdagrpo,
    title        = {{$\\lambda$-GRPO: Unifying the GRPO Frameworks with Learnable Token Preferences}},
    author       = {Yining Wang and Jinman Zhao and Chuangxin Zhao and Shuhao Guan and Gerald Penn and Shinan Liu},
    year         = 2025,
    eprint       = {arXiv:2510.06870},
}"""
TR_CITATION = """\
@article{le2025tokenregulated,
    title        = {{Token-Regulated Group Relative Policy Optimization for Stable Reinforcement Learning in Large \
Language Models}},
    author       = {Tue Le and Nghi D. Q. Bui and Linh Ngo Van and Trung Le},
    year         = 2025,
    eprint       = {arXiv:2511.00066},
}"""
# What TRL's card names as the source of the method: the trainer's own paper; both are cited.
LAMBDA_PAPER = {
    "title": "λ-GRPO: Unifying the GRPO Frameworks with Learnable Token Preferences",
    "id": "2510.06870",
    "citation": f"{LAMBDA_CITATION}\n{TR_CITATION}",
}
TR_PAPER = {
    "title": "Token-Regulated Group Relative Policy Optimization for Stable Reinforcement Learning in Large Language "
    "Models",
    "id": "2511.00066",
    "citation": f"{TR_CITATION}\n{LAMBDA_CITATION}",
}

_FOLLOWS = "### Framework versions"  # the part of TRL's template that the settings go before


def weight_tags(trainer: "LambdaGRPOTrainer", tags: str | list[str] | None) -> list[str]:
    """The tags of the card: the caller's and those of the papers whose weights are on."""
    all_tags = {tags} if isinstance(tags, str) else set(tags or ())
    all_tags |= {"lambda-grpo"} if trainer.args.aggregation == "lambda" else set()
    all_tags |= {"tr-grpo"} if trainer.args.token_regulation == "sigmoid" else set()
    return sorted(all_tags)


def complete_card(trainer: "LambdaGRPOTrainer") -> None:
    """Put the weights' settings into the card that TRL has written into `output_dir`."""
    path = Path(str(trainer.args.output_dir)) / "README.md"
    text, section = with_names(trainer, path.read_text(encoding="utf-8")), settings_section(trainer)
    before, anchor, after = text.partition(_FOLLOWS)
    section = f"{loading_section(trainer)}\n\n{section}"
    path.write_text(f"{before.rstrip()}\n\n{section}\n\n{anchor}{after}".rstrip() + "\n", encoding="utf-8")


def with_names(trainer: "LambdaGRPOTrainer", card: str) -> str:
    """
    Say what is known where TRL's card says None: it has a name only for a model of the hub and a run that is pushed.

    The folder that the model came from, if it came from one, and the run's own take their place.
    """
    base: Any = getattr(trainer.model.config, "_name_or_path", None)
    came_from = (
        f"is a fine-tuned version of `{Path(base).resolve().name}`"
        if base
        else "was trained from a model without a name"
    )
    card = card.replace("is a fine-tuned version of [None](https://huggingface.co/None)", came_from)
    if trainer.hub_model_id is None:
        card = card.replace('model="None"', f'model="{Path(str(trainer.args.output_dir)).resolve().name}"')
    return card


def settings_section(trainer: "LambdaGRPOTrainer") -> str:
    """Say in Markdown how the tokens of a run were weighted: a heading and a table of what had an effect."""
    args, step = trainer.args, trainer.state.global_step
    f, v = trainer.length_weight, trainer.token_weight
    own = f"TRL's own, of `loss_type={args.loss_type}`"
    rows = [("length weight (`aggregation`)", own if f is None else _what_it_is(f))]
    if f is not None and f.has_scope:
        rows.append(("scope of the token mean (`aggregation_scope`)", args.aggregation_scope))
    if trainer.lambda_value is not None:
        course = f"from {args.lambda_init:g}, learned" if args.lambda_learnable else "fixed"
        values = trainer.lambda_values.items()
        shown = ", ".join(f"{name} {value:.4f}" if len(values) > 1 else f"{value:.4f}" for name, value in values)
        rows.append(("λ", f"{shown} at step {step} ({course})"))
        if args.lambda_learnable:
            rows.append(("learning rate of λ (`lambda_learning_rate`)", f"{args.lambda_learning_rate:g}"))
    rows += [(f"{symbol} (`{name}`)", value) for symbol, name, value in _parameters(f)]
    if f is not None and f.has_lambda and args.lambda_learnable and args.rule_of(f) != "descent":
        rows.append(("how λ learns (`lambda_rule`)", args.rule_of(f)))
    if args.length_target is not None:
        rows.append(("length target (`length_target`)", f"{args.length_target:g}"))
    if args.positive_weight != 1:
        rows.append(("weight of responses with A > 0 (`positive_weight`)", f"{args.positive_weight:g}"))
    rows.append(("token weight (`token_regulation`)", "none" if v is None else _what_it_is(v)))
    if v is not None:
        values = ", ".join(f"{symbol} = {value}" for symbol, _, value in _parameters(v))
        rows += [("its parameters", values)] if values else []
        rows.append(("inside the clip", "yes" if args.regulation_inside_clip else "no"))
    rows.append(("surrogate (`loss_type`)", args.loss_type))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "### How the tokens were weighted\n\n"
        "Trained with `trl_lambda`, its authors' reading of arXiv 2510.06870 "
        f"and arXiv 2511.00066, not a reproduction of either.\n\n| setting | value |\n|---|---|\n{table}"
    )


def _what_it_is(weight: LengthWeight | TokenWeight) -> str:
    """Formula and source of a member; a user's own need not tell either."""
    return f"{weight.formula or weight.name} ({weight.source or USERS})"


def _parameters(weight: object) -> list[tuple[str, str, str]]:
    """Symbol, option and value of each parameter of a member; a user's own need not have symbols, nor numbers."""
    if not is_dataclass(weight):
        return []
    parameters = []
    for f in fields(weight):
        value, is_text = getattr(weight, f.name), not isinstance(f.default, int | float)
        if "option" in f.metadata and value == f.default:  # side "both", length alone: the paper's
            continue
        text = ", ".join(value) if isinstance(value, tuple) else value if is_text else f"{value:.4g}"
        parameters.append((f.metadata.get("symbol", f.name), f.metadata.get("option", f.name), str(text)))
    return parameters
