"""Tools and environments by dotted path, checked before a model is loaded: what TRL would stumble over later."""

import inspect
from collections.abc import Callable
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException
from trl import GRPOTrainer

from .agent_rewards import TRL_FIRST_MESSAGE
from .guard import guard, guard_environment, tool_methods
from .loading import import_function


def load_tools(names: list[str] | str | None, timeout: float | None = None) -> list[Callable[..., Any]]:
    """
    Import tools and guard them.

    Args:
        names (`list[str]` or `str`, *optional*):
            Dotted paths of functions with type hints and a docstring that describes every argument.
        timeout (`float`, *optional*):
            Seconds that a call may take.

    Raises:
        ValueError: if one cannot be imported or described to a model, or two have one name.
    """
    _check_timeout(timeout)
    names = as_list(names)
    tools = [import_function("tools has", name, "a dotted path to a function") for name in names]
    for name, tool in zip(names, tools, strict=True):
        if not inspect.isfunction(tool):
            raise ValueError(f"tools has {name!r}, which is a {type(tool).__name__}; accepted: a function.")
        _check_description(f"tools has {name!r}", tool)
    if repeated := [tool.__name__ for tool in tools if [t.__name__ for t in tools].count(tool.__name__) > 1]:
        raise ValueError(f"tools has several functions of the name {repeated[0]!r}; a model calls a tool by its name.")
    return [guard(tool, timeout=timeout) for tool in tools]


def load_environment(name: str | None, timeout: float | None = None) -> type | None:
    """
    Import an environment class, try it once and guard its tools.

    Args:
        name (`str`, *optional*):
            Dotted path of a class as TRL's `environment_factory` takes it: made without arguments, with `reset` and
            with public methods that are the tools.
        timeout (`float`, *optional*):
            Seconds that a call of a tool may take.

    Raises:
        ValueError: if it cannot be imported, is not such a class, or cannot be made.
    """
    _check_timeout(timeout)
    if name is None:
        return None
    label = f"environment is {name!r}"
    environment = import_function("environment is", name, "a dotted path to a class")
    if not inspect.isclass(environment):
        raise ValueError(f"{label}, which is a {type(environment).__name__}; accepted: a dotted path to a class.")
    if "environment_factory" not in inspect.signature(GRPOTrainer.__init__).parameters:
        raise ValueError(f"{label}, which needs a TRL whose GRPOTrainer takes environment_factory; update trl.")
    reset = getattr(environment, "reset", None)
    if not inspect.isfunction(reset) or inspect.iscoroutinefunction(reset):
        raise ValueError(f"{label}, which has no method reset(self, **row).")
    methods = tool_methods(environment)
    if not methods:
        raise ValueError(f"{label}, which has no tool: no public method beside reset and get_reward.")
    try:
        instance = environment()
    except Exception as error:  # whatever the user's own code raises
        raise ValueError(f"{label}, which cannot be made: {type(error).__name__}: {error}") from error
    for method_name, _ in methods:
        _check_description(f"{label}: its tool {method_name!r}", getattr(instance, method_name))
    return guard_environment(environment, timeout=timeout)


def as_list(names: list[str] | str | None) -> list[str]:
    """Names as a list: in YAML one name need not be one."""
    return [names] if isinstance(names, str) else names or []


def owns_reward(environment: type | None) -> bool:
    """Whether an environment scores its rollouts itself."""
    return hasattr(environment, "get_reward")


def check_reward_names(names: list[str] | str | None) -> None:
    """
    Refuse those of TRL's rewards that would never see an answer given after a call.

    Raises:
        ValueError: if one is named.
    """
    for name in as_list(names):
        if name in TRL_FIRST_MESSAGE:
            raise ValueError(
                f"reward_funcs has {name!r}, which reads the first message of a completion: with tools, the one "
                "before the first call; trl_lambda.training.agent_rewards.final_accuracy reads the last."
            )


def check_tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> None:
    """
    Check that a model's tokenizer can hold a conversation with tools, by the tokenizer alone.

    Raises:
        ValueError: if its chat template leaves calls or answers out, nobody knows how to read calls, or an earlier
            turn's calls would be read again in the next.
    """
    try:  # here, so that the script itself needs no more of TRL than it did
        from trl.chat_template_utils import (
            add_response_schema,
            get_training_chat_template,
            is_chat_template_prefix_preserving,
            supports_tool_calling,
        )
    except ImportError as error:
        raise ValueError(f"tools and environment need a newer TRL ({error}); 1.16.0 has been tried.") from error
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
            raise ValueError(
                f"{label}, whose chat template renders earlier messages differently once others follow; tools need "
                "one that does not."
            ) from error
    if _reads_earlier_calls(tokenizer):
        raise ValueError(
            f"{label}, whose response_template would read an earlier turn's call again and run it twice: its "
            "start_anchor has to occur in every generation prompt."
        )


def _reads_earlier_calls(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Parse an empty turn after a call and its answer: whatever calls come out are the earlier turn's."""
    from trl.chat_template_utils import parse_response

    if getattr(tokenizer, "response_template", None) is None:  # the older response_schema sees the new turn alone
        return False
    call = {"type": "function", "function": {"name": "tool", "arguments": {"argument": "value"}}}
    messages = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "tool", "content": "answer"},
    ]
    ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    end: Any = tokenizer.eos_token_id
    return bool(parse_response(tokenizer, [end], prefix=ids).get("tool_calls"))


def check_rows(dataset: Any, environment: type | None, environment_name: str | None) -> None:
    """
    Check the first row of a dataset: tools need a conversation, and the environment has to take the columns.

    Raises:
        ValueError: if the prompt is not a list of messages, or `reset` does not take the row's columns.
    """
    row = next(iter(dataset), None)
    if row is None:
        return
    if not isinstance(row["prompt"], list):
        raise ValueError("tools and environments need conversational prompts: a list of messages, not a text.")
    if environment is not None:
        try:
            inspect.signature(environment.reset).bind(None, **row)
        except TypeError as error:
            columns = ", ".join(row)
            raise ValueError(
                f"environment is {environment_name!r}, whose reset does not take the columns of the dataset "
                f"({columns}): {error}; **row takes them all."
            ) from error


def _check_description(label: str, tool: Callable[..., Any]) -> None:
    try:
        get_json_schema(tool)
    except (DocstringParsingException, TypeHintParsingException, ValueError, TypeError) as error:
        raise ValueError(f"{label}, which cannot be described to a model: {error}") from error


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and not timeout > 0:
        raise ValueError(f"tool_timeout={timeout} must be above 0.")
