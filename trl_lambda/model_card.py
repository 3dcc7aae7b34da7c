"""The model card: TRL's own, with both papers to cite, λ as it ended and the settings of the weights."""

from pathlib import Path

from .weights import DEFAULT_REGULATION_ALPHA

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

_LENGTH_WEIGHTS = {
    "lambda": "λ-GRPO: G · softmax of h^λ (arXiv 2510.06870)",
    "power": "(length/μ)^λ, token mass preserved: λ = -1 is GRPO, λ = 0 the token mean",
    "grpo": "GRPO: mean over sequences of each sequence's mean (arXiv 2402.03300)",
    "dapo": "DAPO: token mean (arXiv 2503.14476)",
    "dr_grpo": "Dr. GRPO: divided by a constant length (arXiv 2503.20783)",
}
_TOKEN_WEIGHTS = {
    "sigmoid": "TR-GRPO: clip(α·σ(k·(π - p0)), L, U) (arXiv 2511.00066)",
    "linear": "AR: α·π + 1 - α (arXiv 2505.12929)",
    None: "none",
}
_FOLLOWS = "### Framework versions"  # the part of TRL's template that the settings go before


class ModelCardMixin:
    """Completes the card that TRL writes, for a trainer with `lambda_value`."""

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write TRL's model card with the weights' settings.

        Args:
            model_name (`str`, *optional*): As in TRL; the folder's name if not given.
            dataset_name (`str`, *optional*): As in TRL.
            tags (`str` or `list[str]`, *optional*): As in TRL; `lambda-grpo` and `tr-grpo` are added where they apply.
        """
        tags = {tags} if isinstance(tags, str) else set(tags or ())
        tags |= {"lambda-grpo"} if self.args.aggregation == "lambda" else set()
        tags |= {"tr-grpo"} if self.args.token_regulation == "sigmoid" else set()
        model_name = model_name or Path(self.args.output_dir).resolve().name
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=sorted(tags))
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "README.md"
        text, section = with_names(self, path.read_text(encoding="utf-8")), settings_section(self)
        before, anchor, after = text.partition(_FOLLOWS)
        path.write_text(f"{before.rstrip()}\n\n{section}\n\n{anchor}{after}".rstrip() + "\n", encoding="utf-8")


def with_names(trainer, card: str) -> str:
    """
    Say what is known where TRL's card says None: it has a name only for a model of the hub and a run that is pushed.

    Args:
        trainer ([`LambdaGRPOTrainer`]): The trainer.
        card (`str`): The card as TRL wrote it.

    Returns:
        `str`: the card with the folder that the model came from, if it came from one, and the run's own.
    """
    base = getattr(trainer.model.config, "_name_or_path", None)
    came_from = (
        f"is a fine-tuned version of `{Path(base).resolve().name}`"
        if base
        else "was trained from a model without a name"
    )
    card = card.replace("is a fine-tuned version of [None](https://huggingface.co/None)", came_from)
    if trainer.hub_model_id is None:
        card = card.replace('model="None"', f'model="{Path(trainer.args.output_dir).resolve().name}"')
    return card


def settings_section(trainer) -> str:
    """
    Say in Markdown how the tokens of a run were weighted.

    Args:
        trainer ([`LambdaGRPOTrainer`]): The trainer, at any time of its run.

    Returns:
        `str`: a heading and a table; only what had an effect is in it.
    """
    args, step = trainer.args, trainer.state.global_step
    own = f"TRL's own, of `loss_type={args.loss_type}`"
    rows = [("length weight (`aggregation`)", _LENGTH_WEIGHTS.get(args.aggregation, own))]
    if args.aggregation is not None:
        rows.append(("scope of the token mean (`aggregation_scope`)", args.aggregation_scope))
    if trainer.lambda_value is not None:
        course = f"from {args.lambda_init:g}, learned" if args.lambda_learnable else "fixed"
        rows.append(("λ", f"{trainer.lambda_value:.4f} at step {step} ({course})"))
        if args.lambda_learnable:
            rows.append(("learning rate of λ (`lambda_learning_rate`)", f"{args.lambda_learning_rate:g}"))
    if args.aggregation == "lambda":
        rows.append(("r (`length_scale`)", f"{args.length_scale:.4g}"))
    rows.append(("token weight (`token_regulation`)", _TOKEN_WEIGHTS[args.token_regulation]))
    rows += _regulation_rows(args)
    rows.append(("surrogate (`loss_type`)", args.loss_type))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "### How the tokens were weighted\n\n"
        "Trained with `trl_lambda`, its authors' reading of arXiv 2510.06870 "
        f"and arXiv 2511.00066, not a reproduction of either.\n\n| setting | value |\n|---|---|\n{table}"
    )


def _regulation_rows(args) -> list[tuple[str, str]]:
    """The parameters of the token weight that are in use, and where it stands."""
    if args.token_regulation is None:
        return []
    alpha = DEFAULT_REGULATION_ALPHA[args.token_regulation] if args.regulation_alpha is None else args.regulation_alpha
    values = f"α = {alpha:g}"
    if args.token_regulation == "sigmoid":
        values += f", k = {args.regulation_slope:g}, p0 = {args.regulation_center:g}"
        values += f", L = {args.regulation_min:g}, U = {args.regulation_max:g}"
    return [("its parameters", values), ("inside the clip", "yes" if args.regulation_inside_clip else "no")]
