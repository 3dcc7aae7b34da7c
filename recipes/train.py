"""
`trl-lambda train` with tools, environments and tasks of reasoning-gym, as a script for `accelerate launch` in a clone.

    accelerate launch recipes/train.py --config recipes/configs/playground/demo.yaml
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers.trainer
from transformers import ProgressCallback

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:  # Python puts the folder of a script there instead
    sys.path.insert(0, ROOT)

from recipes.agents.checks import (  # noqa: E402
    check_reward_names,
    check_rows,
    check_tokenizer,
    load_environment,
    load_tools,
)
from recipes.reasoning_gym_tasks import ReasoningGymArguments, trainer_datasets  # noqa: E402
from trl_lambda.scripts import grpo  # noqa: E402


@dataclass
class RecipeArguments(ReasoningGymArguments, grpo.LambdaGRPOScriptArguments):
    """
    Arguments of a recipe: those of `trl-lambda train`, of [`ReasoningGymArguments`], and those of agents.

    Args:
        tools (`list[str]`, *optional*):
            Dotted paths of functions, the trainer's `tools`.
        environment (`str`, *optional*):
            Dotted path of a class, the trainer's `environment_factory`.
        tool_timeout (`float`, *optional*):
            Seconds after which a tool call is stopped and counted as a failure.
        short_progress (`bool`, *optional*, defaults to `False`):
            Show a few figures beside the progress bar instead of all metrics of each logged step.
    """

    tools: list[str] | None = field(
        default=None,
        metadata={
            "help": "Dotted paths of functions that the model may call, such as `recipes.agents.calculator.calculate`."
        },
    )
    environment: str | None = field(
        default=None,
        metadata={
            "help": "Dotted path of a class whose public methods the model may call, such as "
            "`recipes.playground.lookup_agent.LookUp`. `reset(**row)` starts a conversation, and `get_reward()`, if "
            "there is one, scores it."
        },
    )
    tool_timeout: float | None = field(
        default=None,
        metadata={"help": "Seconds after which a tool call is stopped and counted as a failure."},
    )
    short_progress: bool = field(
        default=False,
        metadata={"help": "Show reward, length and λ beside the progress bar, not all metrics of each logged step."},
    )


class ShortProgress(ProgressCallback):
    """The progress bar with the latest reward, length and λ beside it."""

    FIGURES = {"reward": "reward", "completions/mean_length": "length", "lambda/value": "lambda"}

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show what this log holds."""
        if self.training_bar is not None and logs is not None:
            shown = {label: f"{logs[key]:.3f}" for key, label in self.FIGURES.items() if logs.get(key) is not None}
            if shown:
                self.training_bar.set_postfix(shown)


def agent_kwargs(
    script_args: RecipeArguments, training_args: Any, model_args: Any, dataset_args: Any
) -> dict[str, Any]:
    """
    Load tools, environment and their dataset as arguments of the trainer; empty without tools and environment.

    Raises:
        ValueError: one of them cannot be used, or the model's tokenizer cannot hold a conversation with tools.
    """
    timeout, named = script_args.tool_timeout, script_args.dataset_name or dataset_args.datasets
    tools, environment = load_tools(script_args.tools, timeout), load_environment(script_args.environment, timeout)
    if not tools and not environment:
        if timeout is not None:
            raise ValueError("tool_timeout has no effect without tools or environment.")
        return {}
    check_reward_names(script_args.reward_funcs)
    kwargs: dict[str, Any] = {"tools": tools or None}
    if environment:
        kwargs["environment_factory"] = environment
    if named or not (environment or script_args.reasoning_gym):  # an environment may own the data
        evaluate = training_args.eval_strategy != "no"
        kwargs["train_dataset"], kwargs["eval_dataset"] = grpo.load_splits(script_args, dataset_args, evaluate)
        check_rows(kwargs["train_dataset"], environment, script_args.environment)
    if model_args.model_name_or_path:
        check_tokenizer(model_args.model_name_or_path, model_args.model_revision, training_args.trust_remote_code)
    return kwargs


def main() -> Any:
    """Train as the command line of this process says, and return the trainer."""
    with grpo.one_line_errors():
        parsed = grpo.parse_in_script(RecipeArguments)
        kwargs = agent_kwargs(*parsed) | trainer_datasets(parsed[0], parsed[3].datasets)
    if parsed[0].short_progress:
        transformers.trainer.DEFAULT_PROGRESS_CALLBACK = ShortProgress
    return grpo.main(*parsed, **kwargs)


if __name__ == "__main__":
    main()
