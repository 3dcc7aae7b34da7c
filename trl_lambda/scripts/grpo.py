"""
TRL's GRPO script with the class swapped. It takes the options of `trl grpo` in YAML and on the command line.

    trl-lambda train --config run.yaml                             # launch options start processes, as in `trl grpo`
    accelerate launch -m trl_lambda.scripts.grpo --config run.yaml
"""

import argparse
import difflib
import inspect
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from accelerate.commands.launch import launch_command, launch_command_parser
from datasets import load_dataset
from packaging.version import Version
from transformers.trainer_utils import get_last_checkpoint
from trl import rewards
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.scripts.grpo import GRPOScriptArguments
from yaml import YAMLError

from ..lambda_grpo_config import LambdaGRPOConfig
from ..lambda_grpo_trainer import LambdaGRPOTrainer
from ..report import plot_run, require_matplotlib, summarize_run
from ..weights.weighing import import_path

MODULE = "trl_lambda.scripts.grpo"
REWARD_FUNCS: dict[str, Any] = {  # the names and parameters of TRL's script
    "accuracy_reward": rewards.accuracy_reward,
    "reasoning_accuracy_reward": rewards.reasoning_accuracy_reward,
    "think_format_reward": rewards.think_format_reward,
    "get_soft_overlong_punishment": rewards.get_soft_overlong_punishment(1280, 256),
}


@dataclass
class LambdaGRPOScriptArguments(GRPOScriptArguments):
    """The arguments of TRL's GRPO script, and two more."""

    dataset_preparation: str | None = field(
        default=None,
        metadata={
            "help": "Dotted path to a function of one row, such as `recipes.preparations.gsm8k`. Its parameters are "
            "the columns it reads, and the columns it returns replace all others."
        },
    )
    plot: bool = field(default=False, metadata={"help": "Write run.png into output_dir. Needs matplotlib."})


def make_parser(script_arguments: type = LambdaGRPOScriptArguments) -> trl.TrlParser:
    """TRL's parser over the four dataclasses. Its help begins with the options that TRL does not have."""
    types: Any = (script_arguments, LambdaGRPOConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    parser = trl.TrlParser(types, usage="trl-lambda train [--config FILE] [--OPTION VALUE]", exit_on_error=False)
    of_trl = (GRPOScriptArguments, trl.GRPOConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    known = {"help"} | {option.name for kind in of_trl for option in fields(kind)}
    group = parser.add_argument_group("trl-lambda", "options that `trl grpo` does not have")
    parser._action_groups.insert(0, parser._action_groups.pop())
    actions = parser._optionals._group_actions
    group._group_actions.extend(action for action in actions if action.dest not in known)
    parser._optionals._group_actions = [action for action in actions if action.dest in known]
    return parser


def parse(arguments: list[str], script_arguments: type = LambdaGRPOScriptArguments) -> list[Any]:
    """
    Parse a command line and the YAML file of its `--config`. A `ValueError` names an unknown or refused option.

    Returns:
        `list`: the four dataclasses, all options for `accelerate launch`, and which arguments those are.
    """
    if not arguments:
        raise ValueError("no options: name model, dataset and reward, or a YAML file with --config. See --help.")
    parser = make_parser(script_arguments)
    *parsed, in_file, on_line = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    options = [*resolve_accelerate_config_argument(in_file), *resolve_accelerate_config_argument(on_line)]
    launch, unknown = launch_command_parser().parse_known_args([*options, MODULE])
    if unknown or launch.training_script != MODULE:
        name = [*unknown, launch.training_script][0]
        close = difflib.get_close_matches(name.removeprefix("--"), [action.dest for action in parser._actions], n=1)
        raise ValueError(f"unknown argument {name!r}" + (f"; did you mean '--{close[0]}'?" if close else "."))
    return [*parsed, options, on_line]


def parse_in_script(script_arguments: type = LambdaGRPOScriptArguments) -> list[Any]:
    """The four dataclasses of this process, whatever the file says of other processes."""
    *parsed, _, on_line = parse(sys.argv[1:], script_arguments)
    if on_line:
        raise ValueError(f"{on_line[0]} goes to `accelerate launch`, before the script.")
    return parsed


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with `error: ...` where an argument is refused. A traceback would not help there."""
    try:
        yield
    except (ValueError, OSError, ImportError, argparse.ArgumentError, YAMLError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


def load_reward_funcs(script_args: GRPOScriptArguments) -> list[Any]:
    """The reward model and functions as the trainer takes them. A `ValueError` names a function that is unknown."""
    names = script_args.reward_funcs or []
    functions: list[Any] = [script_args.reward_model_name_or_path] if script_args.reward_model_name_or_path else []
    for name in [names] if isinstance(names, str) else names:  # in YAML, one name need not be a list
        if name not in REWARD_FUNCS and "." not in name:
            raise ValueError(f"reward_funcs has {name!r}; accepted: {', '.join(REWARD_FUNCS)}, or a dotted path.")
        functions.append(REWARD_FUNCS.get(name) or import_path(name, "reward_funcs"))
    return functions


def load_splits(
    script_args: LambdaGRPOScriptArguments, dataset_args: trl.DatasetMixtureConfig, evaluate: bool
) -> tuple[Any, Any]:
    """The training split and, if `evaluate`, the test split, prepared. A `ValueError` asks for a missing dataset."""
    if dataset_args.datasets:
        if script_args.dataset_name:
            warnings.warn("dataset_name has no effect beside datasets.", stacklevel=2)
        dataset = trl.get_dataset(dataset_args)
    elif script_args.dataset_name:
        config, streaming = script_args.dataset_config, script_args.dataset_streaming
        dataset = load_dataset(script_args.dataset_name, name=config, streaming=streaming)
    else:
        raise ValueError("no dataset: set dataset_name to a hub name or a local folder, or set datasets.")
    names = [script_args.dataset_train_split, script_args.dataset_test_split][: 1 + evaluate]
    if missing := [name for name in names if name not in dataset]:
        raise ValueError(f"the dataset has no split {missing[0]!r}, only: {', '.join(map(str, dataset))}.")
    splits: list[Any] = [dataset[name] for name in names]
    if script_args.dataset_preparation:
        prepare = import_path(script_args.dataset_preparation, "dataset_preparation")
        needed = list(inspect.signature(prepare).parameters)
        splits = [rows.map(prepare, input_columns=needed, remove_columns=rows.column_names) for rows in splits]
    return splits[0], splits[1] if evaluate else None


def main(
    script_args: LambdaGRPOScriptArguments,
    training_args: LambdaGRPOConfig,
    model_args: trl.ModelConfig,
    dataset_args: trl.DatasetMixtureConfig,
    *,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    **trainer_kwargs: Any,
) -> LambdaGRPOTrainer:
    """
    Train as the arguments say, save, and print a summary. A refused argument ends the process with one line.
    `trainer_kwargs` go to [`LambdaGRPOTrainer`]; datasets given here replace the named ones.
    """
    with one_line_errors():
        if not model_args.model_name_or_path:
            raise ValueError("no model: set model_name_or_path to a hub name or a local folder.")
        if script_args.plot:
            require_matplotlib()
        reward_funcs = load_reward_funcs(script_args)
        if train_dataset is None and "environment_factory" not in trainer_kwargs:
            evaluate = training_args.eval_strategy != "no"
            train_dataset, eval_dataset = load_splits(script_args, dataset_args, evaluate)
        checkpoint: Any = training_args.resume_from_checkpoint or None
        if str(checkpoint).lower() == "true":
            checkpoint = get_last_checkpoint(str(training_args.output_dir))
            if checkpoint is None:
                raise ValueError(f"output_dir={training_args.output_dir!r} has no checkpoint to resume from.")
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
            reward_funcs=reward_funcs,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=trl.get_quantization_config(model_args),
            peft_config=trl.get_peft_config(model_args),
            **trainer_kwargs,
        )
        if checkpoint is not None:
            trainer._lambda_file.check(checkpoint)  # `train` would raise the same, with a traceback
    trainer.train(resume_from_checkpoint=checkpoint)
    finish(trainer, script_args)
    return trainer


def finish(trainer: LambdaGRPOTrainer, script_args: LambdaGRPOScriptArguments) -> None:
    """Save model, log history, picture and model card, print the summary, and push if asked."""
    folder, dataset_name = Path(str(trainer.args.output_dir)), script_args.dataset_name
    if Path(str(dataset_name)).exists():  # not on the hub, where the card would link to
        dataset_name = None
    trainer.save_model(str(folder))
    trainer.save_state()  # the log history, for `trl-lambda report`
    if script_args.plot and trainer.accelerator.is_main_process:
        plot_run(trainer.state.log_history, folder / "run.png", title=folder.resolve().name)
    trainer.create_model_card(model_name=folder.name, dataset_name=dataset_name)
    if trainer.accelerator.is_main_process:
        written = [folder / name for name in ("", "lambda.json", "README.md", "run.png") if (folder / name).exists()]
        lines = [*summarize_run(trainer.state.log_history), *(("written", str(path)) for path in written)]
        print(f"\nSummary of {trainer.state.global_step} optimizer steps")
        print("\n".join(f"  {name:<34} {text}" for name, text in lines), flush=True)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    if Version(transformers.__version__) >= Version("5.18.0"):  # ends trackers and the process group
        trainer.end()


def train(arguments: list[str]) -> None:
    """Train in this process, or in those that launch options or several GPUs ask for, as `trl grpo` does."""
    with one_line_errors():
        *parsed, options, on_line = parse(arguments)
    if not options and torch.cuda.device_count() < 2:
        main(*parsed)
        return
    rest = deque(on_line)  # in their order among the arguments
    own = [argument for argument in arguments if not (rest and argument == rest[0] and rest.popleft())]
    launch_command(launch_command_parser().parse_args(["--quiet", *options, "--module", MODULE, *own]))


if __name__ == "__main__":
    with one_line_errors():
        parsed = parse_in_script()
    main(*parsed)
