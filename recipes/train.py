"""
Train with `LambdaGRPOTrainer`: what TRL's GRPO script does, with the class swapped, and more checks before it starts.

Model, dataset and rewards are named as in `trl grpo`, on the command line or in YAML; hub names and local folders are
given in the same way. Whatever `LambdaGRPOConfig` and `trl.ModelConfig` know is an option here. Beyond TRL's script:
what the user can mend ends in one line; datasets are prepared by a function of one row (`recipes/loading.py`), from
several splits and with the test split in a configuration of its own; a summary, a picture and a short progress bar.

    accelerate launch recipes/train.py --config recipes/configs/playground.yaml
    python recipes/train.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/DeepMath-103K \
        --reward_funcs accuracy_reward --lambda_init 0.0 --output_dir runs/deepmath
"""

import difflib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import transformers
from packaging.version import Version
from transformers import AutoConfig, ProgressCallback
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
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
from trl_lambda.preference.files import read_lambda_file
from trl_lambda.report import plot_run, require_matplotlib, summarize_run
from trl_lambda.weights import LengthWeight, TokenWeight, as_length_weight, as_token_weight
from trl_lambda.weights.custom import import_function as import_weight

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:  # run as a script, Python puts this file's own folder there instead
    sys.path.insert(0, ROOT)

from recipes.agents.loading import (  # noqa: E402
    check_reward_names,
    check_rows,
    check_tokenizer,
    load_environment,
    load_tools,
    owns_reward,
)
from recipes.config_file import check_config_file  # noqa: E402
from recipes.loading import import_function, load_splits  # noqa: E402

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
    Script arguments: TRL's, and what prepares the dataset, rewards and the picture.

    `dataset_train_split` and `dataset_test_split` may name several splits, joined by `+`.

    Args:
        dataset_preparation (`str`, *optional*):
            Dotted path to a function of one row, such as `recipes.preparations.gsm8k`, that can be imported from the
            current directory. Its parameters are the columns that it needs, what it returns replaces all columns.
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
            "help": "Dotted path to a function of one row, such as `recipes.preparations.gsm8k`, that can be imported "
            "from the current directory. Its parameters are the columns that it needs, what it returns replaces all "
            "columns."
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
    if "--config" in args:
        check_config_file(args[args.index("--config") + 1], DATACLASSES)
    parser = Parser(DATACLASSES)
    try:
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


def load_rewards(script_args: LambdaGRPOScriptArguments, environment: type | None = None) -> list[str | Callable]:
    """
    Resolve the names of reward model and reward functions to what the trainer takes as `reward_funcs`.

    Raises:
        ValueError: if none is given and the environment has none of its own, or a name cannot be resolved.
    """
    rewards: list[str | Callable] = []
    if script_args.reward_model_name_or_path:
        rewards.append(script_args.reward_model_name_or_path)
    names = script_args.reward_funcs or []
    for name in [names] if isinstance(names, str) else names:  # in YAML one name need not be a list
        if name in MATH_REWARDS and importlib.util.find_spec("math_verify") is None:
            raise ValueError(f'reward_funcs has {name!r}, which needs math-verify: pip install "trl[math_verify]"')
        accepted = f"{', '.join(REWARD_FUNCS)}, or a dotted path to a function"
        known = name in REWARD_FUNCS
        rewards.append(REWARD_FUNCS[name] if known else import_function("reward_funcs has", name, accepted))
    if not rewards and not owns_reward(environment):
        raise ValueError("no reward: set reward_funcs, reward_model_name_or_path, or both.")
    return rewards


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


def load_agent(script_args: LambdaGRPOScriptArguments) -> tuple[list[Callable], type | None]:
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
        name, revision = model_args.model_name_or_path, model_args.model_revision
        check_tokenizer(name, revision, training_args.trust_remote_code)
        check_rows(train_dataset, environment, script_args.environment)
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
        **({"tools": tools} if tools else {}),
        **({"environment_factory": environment} if environment else {}),
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
    on_hub = script_args.dataset_name if not Path(script_args.dataset_name or "").exists() else None
    trainer.create_model_card(model_name=Path(args.output_dir).name, dataset_name=on_hub)
    if trainer.accelerator.is_main_process:
        history, output_dir = trainer.state.log_history, Path(args.output_dir)
        lines = [*summarize_run(history), lambda_line(args, trainer.lambda_value)]
        files = [
            ("model", output_dir),
            ("lambda", output_dir / "lambda.json"),
            ("model card", output_dir / "README.md"),
        ]
        if script_args.plot:
            files.append(("plot", plot_run(output_dir, output_dir / "run.png")))
        files = [(name, path) for name, path in files if path.exists()]
        print(f"\nSummary of {trainer.state.global_step} optimizer steps")
        print("\n".join(f"  {name:<34} {text}" for name, text in lines))
        print("Files written")
        print("\n".join(f"  {name:<34} {path}" for name, path in files), flush=True)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=on_hub)
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
