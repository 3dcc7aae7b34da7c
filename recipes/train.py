"""
Train with `LambdaGRPOTrainer`: TRL's GRPO script with the class swapped, and a summary at the end.

Model, dataset and rewards are named as in `trl grpo`, on the command line or in YAML; hub names and local folders are
given in the same way. Whatever `LambdaGRPOConfig` and `trl.ModelConfig` know is an option here.

    accelerate launch recipes/train.py --config recipes/configs/playground.yaml
    python recipes/train.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/DeepMath-103K \
        --reward_funcs accuracy_reward --lambda_init 0.0 --output_dir runs/deepmath
"""

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import transformers
import yaml
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from packaging.version import Version
from transformers import AutoConfig, ProgressCallback
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.rewards import (
    accuracy_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
from trl_lambda.report import plot_run, require_matplotlib, summarize_run

REWARD_FUNCS: dict[str, Callable] = {
    "accuracy_reward": accuracy_reward,
    "reasoning_accuracy_reward": reasoning_accuracy_reward,
    "think_format_reward": think_format_reward,
    "get_soft_overlong_punishment": get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256),
}
MATH_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward")


@dataclass
class LambdaGRPOScriptArguments(ScriptArguments):
    """
    Script arguments: TRL's, and rewards and the picture.

    Args:
        reward_model_name_or_path (`str`, *optional*):
            Reward model: hub id or local folder.
        reward_funcs (`list[str]`, *optional*):
            Reward functions: `"accuracy_reward"`, `"reasoning_accuracy_reward"`, `"think_format_reward"`,
            `"get_soft_overlong_punishment"` (with `max_completion_len=1280`, `soft_punish_cache=256`, as in TRL's
            script), or a dotted path that can be imported from the current directory.
        plot (`bool`, *optional*, defaults to `False`):
            Write `run.png` (λ, reward and length over steps) into the output folder; needs `trl-lambda[plots]`.
        short_progress (`bool`, *optional*, defaults to `False`):
            Show reward, length and λ beside the progress bar, in place of a line of all metrics per logged step.
    """

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model: hub id or local folder."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: `accuracy_reward`, `reasoning_accuracy_reward`, `think_format_reward`, "
            "`get_soft_overlong_punishment` (max_completion_len=1280, soft_punish_cache=256, as in TRL's script), or "
            "a dotted path that can be imported from the current directory."
        },
    )
    plot: bool = field(
        default=False,
        metadata={"help": "Write run.png (λ, reward and length over steps) to output_dir; needs trl-lambda[plots]."},
    )
    short_progress: bool = field(
        default=False,
        metadata={
            "help": "Show reward, length and λ beside the progress bar, in place of a line of all metrics per logged "
            "step."
        },
    )


class Parser(TrlParser):
    """`TrlParser` whose errors are one line: argparse would first print the usage of some two hundred options."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise ValueError(message)


class ShortProgress(ProgressCallback):
    """The progress bar with a few figures beside it, instead of a line of all metrics at each logged step."""

    FIGURES = {
        "reward": "reward",
        "completions/mean_length": "length",
        "lambda/value": "lambda",
        "eval_reward": "held-out reward",
    }

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Update the figures that this log holds; the others stay as they were."""
        if state.is_world_process_zero and self.training_bar is not None:
            logged = {label: (logs or {}).get(key) for key, label in self.FIGURES.items()}
            self.shown |= {label: f"{value:.3f}" for label, value in logged.items() if value is not None}
            self.training_bar.set_postfix(self.shown)


DATACLASSES = (LambdaGRPOScriptArguments, LambdaGRPOConfig, ModelConfig, DatasetMixtureConfig)


def parse(args: list[str]) -> tuple[LambdaGRPOScriptArguments, LambdaGRPOConfig, ModelConfig, DatasetMixtureConfig]:
    """
    Parse the command line and the YAML file that `--config` names.

    Raises:
        ValueError: if an argument is unknown, has a value that is not accepted, or the file is no YAML mapping.
    """
    if args[-1:] == ["--config"]:
        raise ValueError("--config needs the path of a YAML file.")
    parser = Parser(DATACLASSES)
    try:
        *parsed, unknown = parser.parse_args_and_config(args, return_remaining_strings=True)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config cannot be read: {error}") from error
    if unknown:
        name = unknown[0].removeprefix("--")
        known = {known_field.name for dataclass_type in DATACLASSES for known_field in fields(dataclass_type)}
        close = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"unknown argument {name!r}" + (f"; did you mean {close[0]!r}?" if close else "."))
    return tuple(parsed)


def load_rewards(script_args: LambdaGRPOScriptArguments) -> list[str | Callable]:
    """
    Resolve the names of reward model and reward functions to what the trainer takes as `reward_funcs`.

    Raises:
        ValueError: if none is given, or a name cannot be resolved.
    """
    rewards: list[str | Callable] = []
    if script_args.reward_model_name_or_path:
        rewards.append(script_args.reward_model_name_or_path)
    for name in script_args.reward_funcs or []:
        if name in MATH_REWARDS and importlib.util.find_spec("math_verify") is None:
            raise ValueError(f'reward_funcs has {name!r}, which needs math-verify: pip install "trl[math_verify]"')
        rewards.append(REWARD_FUNCS[name] if name in REWARD_FUNCS else import_reward(name))
    if not rewards:
        raise ValueError("no reward: set reward_funcs, reward_model_name_or_path, or both.")
    return rewards


def import_reward(name: str) -> Callable:
    """
    Import a reward function by its dotted path, from the current directory too.

    Raises:
        ValueError: if `name` is not a dotted path, cannot be imported, or is not callable.
    """
    accepted = f"accepted: {', '.join(REWARD_FUNCS)}, or a dotted path to a function"
    module_name, _, function_name = name.rpartition(".")
    if not module_name:
        raise ValueError(f"reward_funcs has {name!r}; {accepted}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward_funcs has {name!r}, which cannot be imported ({error}); {accepted}.") from error
    if not callable(function):
        raise ValueError(f"reward_funcs has {name!r}, which is a {type(function).__name__}; {accepted}.")
    return function


def load_splits(script_args: ScriptArguments, mixture: DatasetMixtureConfig, evaluate: bool) -> tuple[Any, Any]:
    """
    Load the training split and, if `evaluate`, the held-out one (else `None`); a mixture goes before a single name.

    Raises:
        ValueError: if the dataset cannot be loaded, lacks a split, or a split lacks the `prompt` column.
    """
    name = script_args.dataset_name
    if not mixture.datasets and not name:
        raise ValueError("no dataset: set dataset_name to a hub name or a local folder, or set datasets.")
    label = "datasets" if mixture.datasets else f"dataset_name is {name!r}"
    try:
        if mixture.datasets:
            dataset = get_dataset(mixture)
        else:
            dataset = load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"{label}, which cannot be loaded: {error}") from error
    wanted = {"dataset_train_split": script_args.dataset_train_split}
    if evaluate:
        wanted["dataset_test_split"] = script_args.dataset_test_split
    for argument, split in wanted.items():
        if split not in dataset:
            raise ValueError(f"{argument} is {split!r}; {label}, which has: {', '.join(map(str, dataset))}.")
        columns = dataset[split].column_names  # None for some streamed datasets
        if columns is not None and "prompt" not in columns:
            raise ValueError(f"{label}: split {split!r} has no 'prompt' column; it has: {', '.join(columns)}.")
    splits = [dataset[split] for split in wanted.values()]
    return splits[0], splits[1] if evaluate else None


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
    rewards = load_rewards(script_args)
    check_model(model_args, training_args.trust_remote_code)
    train_dataset, eval_dataset = load_splits(script_args, mixture, training_args.eval_strategy != "no")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = LambdaGRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
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
    if trainer.accelerator.is_main_process:
        history, output_dir = trainer.state.log_history, Path(args.output_dir)
        lines = [*summarize_run(history), lambda_line(args, trainer.lambda_value)]
        files = [("model", output_dir), ("lambda", output_dir / "lambda.json")]
        if script_args.plot:
            files.append(("plot", plot_run(history, output_dir / "run.png")))
        files = [(name, path) for name, path in files if path.exists()]
        print(f"\nSummary of {trainer.state.global_step} optimizer steps")
        print("\n".join(f"  {name:<34} {text}" for name, text in lines))
        print("Files written")
        print("\n".join(f"  {name:<34} {path}" for name, path in files), flush=True)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if Version(transformers.__version__) >= Version("5.18.0"):  # older ones have no `end`
        trainer.end()


def main() -> None:
    """Parse, build, train, finish; what the user can mend is told in one line, without a traceback."""
    try:
        script_args, training_args, model_args, mixture = parse(sys.argv[1:])
        trainer = make_trainer(script_args, training_args, model_args, mixture)
    except (ValueError, OSError, ImportError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    finish(trainer, script_args)


if __name__ == "__main__":
    main()
