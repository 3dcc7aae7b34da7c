"""One run: what is cheap to check is checked first, then the trainer is built, trains, and says what came out."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version
from transformers import AutoConfig, ProgressCallback
from trl import DatasetMixtureConfig, ModelConfig, get_peft_config, get_quantization_config

from ..lambda_grpo_config import LambdaGRPOConfig
from ..lambda_grpo_trainer import LambdaGRPOTrainer
from ..preference.files import read_lambda_file
from ..report import plot_run, require_matplotlib, summarize_run
from ..weights import LengthWeight, TokenWeight, as_length_weight, as_token_weight
from ..weights.custom import import_function as import_weight
from .agents import check_reward_names, check_rows, check_tokenizer, load_environment, load_tools
from .arguments import LambdaGRPOScriptArguments, parse
from .loading import load_splits
from .progress import ShortProgress
from .rewards import load_rewards


def check_model(model_args: ModelConfig, trust_remote_code: bool) -> None:
    """
    Check that the model exists, by its configuration alone, before anything large is loaded.

    Raises:
        ValueError: if no model is given, or its configuration cannot be read.
    """
    name = model_args.model_name_or_path
    if not name:
        raise ValueError("no model: set model_name_or_path to a hub name or a local folder.")
    try:
        AutoConfig.from_pretrained(name, revision=model_args.model_revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"model_name_or_path is {name!r}, which cannot be loaded: {error}") from error


def check_resume(args: LambdaGRPOConfig) -> None:
    """
    Check that the checkpoint to resume from is there, and λ in it, before anything large is loaded.

    Raises:
        ValueError: if it is no folder, is torn, or has no λ where the run needs one.
    """
    checkpoint = args.resume_from_checkpoint
    if checkpoint is None:
        return
    state = Path(checkpoint, "trainer_state.json")
    if not state.is_file():
        raise ValueError(f"resume_from_checkpoint is {checkpoint!r}; accepted: the folder of a checkpoint.")
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"resume_from_checkpoint is {checkpoint!r}, whose trainer_state.json is damaged ({error}); resume from an "
            "older checkpoint."
        ) from error
    if args.has_lambda:
        read_lambda_file(checkpoint)


def load_agent(script_args: LambdaGRPOScriptArguments) -> tuple[list[Callable[..., Any]], type | None]:
    """
    Load the tools and the environment that the arguments name.

    Raises:
        ValueError: if one cannot be used.
    """
    timeout = script_args.tool_timeout
    if timeout is not None and not script_args.tools and not script_args.environment:
        raise ValueError("tool_timeout is set without tools and environment.")
    tools, environment = load_tools(script_args.tools, timeout), load_environment(script_args.environment, timeout)
    if tools or environment:
        check_reward_names(script_args.reward_funcs)
    return tools, environment


def load_weights(script_args: LambdaGRPOScriptArguments) -> tuple[LengthWeight | None, TokenWeight | None]:
    """
    Import the user's own weights, where there are any.

    Raises:
        ValueError: if a path cannot be imported, or is of something else than a weight.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    f, v = script_args.length_weight, script_args.token_weight
    return (
        None if f is None else as_length_weight(import_weight(f, "length_weight")),
        None if v is None else as_token_weight(import_weight(v, "token_weight")),
    )


def make_trainer(
    script_args: LambdaGRPOScriptArguments,
    training_args: LambdaGRPOConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> LambdaGRPOTrainer:
    """
    Build the trainer from the parsed arguments; what is cheap to check is checked first.

    Raises:
        ValueError: if an argument cannot be honoured.
        ImportError: if an optional package is needed and missing.
    """
    if script_args.plot:
        require_matplotlib()
    tools, environment = load_agent(script_args)
    rewards = load_rewards(script_args, environment)
    length_weight, token_weight = load_weights(script_args)
    training_args.validate(length_weight, token_weight)
    check_model(model_args, training_args.trust_remote_code)
    check_resume(training_args)
    train_dataset, eval_dataset = load_splits(script_args, mixture, training_args.eval_strategy != "no")
    if tools or environment:
        check_tokenizer(str(model_args.model_name_or_path), model_args.model_revision, training_args.trust_remote_code)
        check_rows(train_dataset, environment, script_args.environment)
    agent: dict[str, Any] = {"tools": tools} if tools else {}
    if environment:
        agent["environment_factory"] = environment
    given: Any = training_args.model_init_kwargs or {}
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **given,
    }
    trainer = LambdaGRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        **agent,
        length_weight=length_weight,
        token_weight=token_weight,
    )
    if script_args.short_progress and not training_args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ShortProgress())
    return trainer


def lambda_line(args: LambdaGRPOConfig, lam: float | None) -> tuple[str, str]:
    """Say what became of λ, as a line of the summary; `lam` is λ at the end, `None` where there is none."""
    if lam is None:
        return "lambda", f"none (aggregation: {args.aggregation})"
    if not args.lambda_learnable:
        return "lambda", f"fixed at {lam:g}"
    return "lambda", f"{args.lambda_init:.3f} -> {lam:.3f} (learned)"


def finish(trainer: LambdaGRPOTrainer, script_args: LambdaGRPOScriptArguments) -> None:
    """Save the model, the log history and the picture, say what came out, push if asked, and end the trackers."""
    args = trainer.args
    trainer.save_model(args.output_dir)
    trainer.save_state()  # the log history, for `trl_lambda.report`
    output_dir, picture = Path(str(args.output_dir)), None
    if script_args.plot and trainer.accelerator.is_main_process:
        picture = plot_run(output_dir, output_dir / "run.png")  # before the card, which shows it
    on_hub = script_args.dataset_name if not Path(script_args.dataset_name or "").exists() else None
    trainer.create_model_card(model_name=output_dir.name, dataset_name=on_hub)
    if trainer.accelerator.is_main_process:
        lines = [*summarize_run(trainer.state.log_history), lambda_line(args, trainer.lambda_value)]
        files = [
            ("model", output_dir),
            ("lambda", output_dir / "lambda.json"),
            ("model card", output_dir / "README.md"),
        ]
        files += [("plot", picture)] if picture else []
        files = [(name, path) for name, path in files if path.exists()]
        print(f"\nSummary of {trainer.state.global_step} optimizer steps")
        print("\n".join(f"  {name:<34} {text}" for name, text in lines))
        print("Files written")
        print("\n".join(f"  {name:<34} {path}" for name, path in files), flush=True)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=on_hub)
    if Version(transformers.__version__) >= Version("5.18.0"):  # older ones have no `end`
        trainer.end()


def main(arguments: list[str] | None = None) -> None:
    """
    Parse, build, train, finish; what the user can mend is told in one line, without a traceback.

    Args:
        arguments (`list[str]`, *optional*):
            The command line after its command; that of the process if not given.
    """
    try:
        script_args, training_args, model_args, mixture = parse(sys.argv[1:] if arguments is None else arguments)
        trainer = make_trainer(script_args, training_args, model_args, mixture)
    except (ValueError, OSError, ImportError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    finish(trainer, script_args)
