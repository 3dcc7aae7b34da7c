"""Tools and environments by dotted path, checked before a model is loaded."""

import inspect
from collections.abc import Callable
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    parse_response,
    supports_tool_calling,
)

from recipes.agents.guard import guard, guard_environment, tool_methods
from trl_lambda.weights.weighing import import_path

# TRL's rewards that read the first message of a completion. With tools, that is the one before the first call.
FIRST_MESSAGE_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")


def load_tools(names: list[str] | str | None, timeout: float | None = None) -> list[Callable[..., Any]]:
    """
    Import tools and guard them.

    Args:
        names (`list[str]` or `str`, *optional*):
            Dotted paths of functions with type hints and a docstring that describes every argument.
        timeout (`float`, *optional*):
            Seconds that a call may take.

    Raises:
        ValueError: one cannot be imported or described to a model, or two have the same name.
    """
    tools = []
    for path in as_list(names):
        tool = import_path(path, "tools")
        if not inspect.isfunction(tool):
            raise ValueError(f"tools has {path!r}, which is a {type(tool).__name__}; accepted: functions.")
        _check_description(f"tools has {path!r}", tool)
        if tool.__name__ in [other.__name__ for other in tools]:
            raise ValueError(f"tools has two functions named {tool.__name__!r}; a model calls a tool by its name.")
        tools.append(guard(tool, timeout=_checked(timeout)))
    return tools


def load_environment(path: str | None, timeout: float | None = None) -> type | None:
    """
    Import an environment class, try it once and guard its tools.

    Args:
        path (`str`, *optional*):
            Dotted path of a class as TRL's `environment_factory` takes it: made without arguments, with `reset`, and
            with public methods that are the tools.
        timeout (`float`, *optional*):
            Seconds that a tool call may take.

    Raises:
        ValueError: it cannot be imported, is not such a class, or cannot be made.
    """
    if path is None:
        return None
    label, environment = f"environment is {path!r}", import_path(path, "environment")
    if not inspect.isclass(environment):
        raise ValueError(f"{label}, which is a {type(environment).__name__}; accepted: a class.")
    if "reset" not in dict(inspect.getmembers(environment, inspect.isfunction)):
        raise ValueError(f"{label}, which has no method reset(self, **row).")
    methods = tool_methods(environment)
    if not methods:
        raise ValueError(f"{label}, which has no tool: no public method beside reset and get_reward.")
    try:
        instance = environment()
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(f"{label}, which cannot be made: {type(error).__name__}: {error}") from error
    for name, _ in methods:
        _check_description(f"{label}: its tool {name!r}", getattr(instance, name))
    return guard_environment(environment, timeout=_checked(timeout))


def check_reward_names(names: list[str] | str | None) -> None:
    """Refuse rewards of TRL that never see an answer given after a call, with a `ValueError`."""
    for name in as_list(names):
        if name in FIRST_MESSAGE_REWARDS:
            raise ValueError(
                f"reward_funcs has {name!r}, which reads the first message of a completion, the one before the first "
                "call. recipes.agents.rewards.final_accuracy reads the last."
            )


def check_tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> None:
    """
    Check that a model's tokenizer can hold a conversation with tools. Only the tokenizer is loaded.

    Raises:
        ValueError: its chat template leaves calls or answers out or rewrites earlier turns, TRL cannot read its calls,
            or calls of an earlier turn would be read again in the next.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    label = f"model_name_or_path is {name!r}"
    if not supports_tool_calling(tokenizer):
        raise ValueError(f"{label}, whose chat template cannot render calls of tools and their answers.")
    if getattr(tokenizer, "response_template", None) is None and getattr(tokenizer, "response_schema", None) is None:
        try:
            tokenizer = add_response_schema(tokenizer)
        except ValueError as error:
            raise ValueError(
                f"{label}, whose calls TRL cannot read: set a response_template on its tokenizer."
            ) from error
    if not is_chat_template_prefix_preserving(tokenizer):
        try:
            get_training_chat_template(tokenizer)
        except ValueError as error:
            raise ValueError(f"{label}, whose chat template rewrites earlier messages once others follow.") from error
    if _reads_earlier_calls(tokenizer):
        raise ValueError(
            f"{label}, whose response_template would read an earlier turn's call again and run it twice: its "
            "start_anchor must occur in every generation prompt."
        )


def check_rows(dataset: Any, environment: type | None, environment_path: str | None) -> None:
    """
    Check the first row of a dataset.

    Raises:
        ValueError: its prompt is not a list of messages (an environment needs no prompt), or the environment's `reset`
            does not take its columns.
    """
    row = next(iter(dataset), None)
    if row is None:
        return
    if not isinstance(row.get("prompt", [] if environment else None), list):
        raise ValueError("tools and environments need conversational prompts: a list of messages, not a text.")
    if environment is not None:
        try:
            inspect.signature(environment.reset).bind(None, **row)
        except TypeError as error:
            raise ValueError(
                f"environment is {environment_path!r}, whose reset does not take the columns of the dataset "
                f"({', '.join(row)}): {error}; **row takes them all."
            ) from error


def as_list(names: list[str] | str | None) -> list[str]:
    """Names as a list: in YAML, one name need not be a list."""
    return [names] if isinstance(names, str) else names or []


def _reads_earlier_calls(tokenizer: Any) -> bool:
    """Parse an empty turn after a call and its answer: any call found is the earlier turn's."""
    if getattr(tokenizer, "response_template", None) is None:  # the older response_schema sees the new turn alone
        return False
    call = {"type": "function", "function": {"name": "tool", "arguments": {"argument": "value"}}}
    messages = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "tool", "content": "answer"},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return bool(parse_response(tokenizer, [tokenizer.eos_token_id], prefix=ids).get("tool_calls"))


def _check_description(label: str, tool: Callable[..., Any]) -> None:
    try:
        get_json_schema(tool)
    except (DocstringParsingException, TypeHintParsingException, ValueError, TypeError) as error:
        raise ValueError(f"{label}, which cannot be described to a model: {error}") from error


def _checked(timeout: float | None) -> float | None:
    if timeout is not None and not timeout > 0:
        raise ValueError(f"tool_timeout={timeout} must be above 0.")
    return timeout
