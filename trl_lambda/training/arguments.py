"""The options of the training command: TRL's, this package's, and what prepares dataset, rewards and the picture."""

import difflib
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from ..lambda_grpo_config import LambdaGRPOConfig
from .config_file import check_config_file


@dataclass
class LambdaGRPOScriptArguments(ScriptArguments):
    """
    Script arguments: TRL's, and what prepares the dataset, rewards and the picture.

    `dataset_train_split` and `dataset_test_split` may name several splits, joined by `+`.

    Args:
        dataset_preparation (`str`, *optional*):
            Dotted path to a function of one row, such as `trl_lambda.training.preparations.gsm8k`, that can be
            imported from the current directory. Its parameters are the columns that it needs, what it returns replaces
            all columns.
        dataset_test_config (`str`, *optional*):
            Configuration that the test split is in, where it is not `dataset_config`.
        reward_model_name_or_path (`str`, *optional*):
            Reward model: hub id or local folder.
        reward_funcs (`list[str]`, *optional*):
            Reward functions: `"accuracy_reward"`, `"reasoning_accuracy_reward"`, `"think_format_reward"`,
            `"get_soft_overlong_punishment"` (with `max_completion_len=1280`, `soft_punish_cache=256`, as in TRL's
            script), or a dotted path that can be imported from the current directory.
        tools (`list[str]`, *optional*):
            Tools of the policy: dotted paths to functions with type hints and a docstring for every argument, such as
            `recipes.agents.calculator.calculate`.
        environment (`str`, *optional*):
            Environment of the policy: dotted path to a class as TRL's `environment_factory` takes it, such as
            `recipes.playground.lookup_agent.LookUp`. Its public methods are tools, `reset(**row)` starts a rollout,
            and `get_reward()`, if it has one, scores it.
        tool_timeout (`float`, *optional*):
            Seconds after which a call of a tool is broken off and counted as a failure.
        length_weight (`str`, *optional*):
            Dotted path to a function or an object, in place of `aggregation`: see the trainer's `length_weight`.
        token_weight (`str`, *optional*):
            The same in place of `token_regulation`: see the trainer's `token_weight`.
        plot (`bool`, *optional*, defaults to `False`):
            Write `run.png` (λ, reward and length over steps) into the output folder; needs `trl-lambda[plots]`.
        short_progress (`bool`, *optional*, defaults to `False`):
            Show reward, length and λ beside the progress bar, in place of a line of all metrics per logged step.
    """

    dataset_preparation: str | None = field(
        default=None,
        metadata={
            "help": "Dotted path to a function of one row, such as `trl_lambda.training.preparations.gsm8k`, that can "
            "be imported from the current directory. Its parameters are the columns that it needs, what it returns "
            "replaces all columns."
        },
    )
    dataset_test_config: str | None = field(
        default=None,
        metadata={"help": "Configuration that the test split is in, where it is not dataset_config."},
    )
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
    tools: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tools of the policy: dotted paths to functions with type hints and a docstring for every "
            "argument, such as `recipes.agents.calculator.calculate`."
        },
    )
    environment: str | None = field(
        default=None,
        metadata={
            "help": "Environment of the policy: dotted path to a class as TRL's `environment_factory` takes it, such "
            "as `recipes.playground.lookup_agent.LookUp`. Its public methods are tools, `reset(**row)` starts a "
            "rollout, and `get_reward()`, if it has one, scores it."
        },
    )
    tool_timeout: float | None = field(
        default=None,
        metadata={"help": "Seconds after which a call of a tool is broken off and counted as a failure."},
    )
    length_weight: str | None = field(
        default=None,
        metadata={
            "help": "Dotted path to a function or an object, in place of `aggregation`: see the trainer's "
            "`length_weight`."
        },
    )
    token_weight: str | None = field(
        default=None,
        metadata={"help": "The same in place of `token_regulation`: see the trainer's `token_weight`."},
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


DATACLASSES = (LambdaGRPOScriptArguments, LambdaGRPOConfig, ModelConfig, DatasetMixtureConfig)


def parse(args: list[str]) -> tuple[LambdaGRPOScriptArguments, LambdaGRPOConfig, ModelConfig, DatasetMixtureConfig]:
    """
    Parse the command line and the YAML file that `--config` names.

    Raises:
        ValueError: if an argument is unknown, has a value that is not accepted, or the file is no YAML mapping.
    """
    if args[-1:] == ["--config"]:
        raise ValueError("--config needs the path of a YAML file.")
    if "--config" in args:
        check_config_file(args[args.index("--config") + 1], DATACLASSES)
    types: Any = DATACLASSES  # more than TRL's annotation allows, as in TRL's own script
    parser = Parser(types, prog="trl-lambda train")
    try:
        parsed: Any
        *parsed, unknown = parser.parse_args_and_config(args, return_remaining_strings=True)
    except (TypeError, AttributeError, OverflowError) as error:  # from a check that a value of another kind gets into
        given = ", ".join(text for text in args if text.startswith("--"))
        raise ValueError(f"an option has a value of a wrong type or size ({error}); look at {given}.") from error
    if unknown:
        name = unknown[0].removeprefix("--")
        known = {known_field.name for dataclass_type in DATACLASSES for known_field in fields(dataclass_type)}
        close = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"unknown argument {name!r}" + (f"; did you mean {close[0]!r}?" if close else "."))
    return tuple(parsed)
