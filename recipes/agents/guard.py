"""
A guard around tools, so that none can stop a training run. TRL tells the model of a failed call and counts it.

TRL itself catches a tool's exceptions, but not an answer that the tokenizer or the chat template rejects, an answer of
a megabyte, `sys.exit`, or a tool that never returns.
"""

import asyncio
import functools
import inspect
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

MAX_CHARACTERS = 20_000  # of an answer: more than fits into any recipe's completion
MAX_ERROR_CHARACTERS = 200


class ToolError(Exception):
    """A call that failed; its text is what the model is told."""


def guard(
    tool: Callable[..., Any], *, timeout: float | None = None, max_characters: int = MAX_CHARACTERS
) -> Callable[..., Any]:
    """
    Wrap a tool so that every call ends in an answer that TRL can use, or in a [`ToolError`].

    Args:
        tool (`Callable`):
            The tool, sync or async. Its name, signature and docstring stay: the model is told of it by them.
        timeout (`float`, *optional*):
            Seconds after which a call is broken off. A sync tool is broken off by a signal, which Python acts on
            between two of its own instructions: a call that is stuck in C code is not. Where there are no such
            signals (Windows, or a thread other than the main one) a call is not broken off.
        max_characters (`int`):
            The longest answer.

    Returns:
        `Callable`: the guarded tool.
    """
    if inspect.iscoroutinefunction(tool):

        async def attempt(*args: Any, **kwargs: Any) -> Any:
            try:
                return await tool(*args, **kwargs)
            except (Exception, SystemExit) as error:  # in here: a task that exits takes the event loop with it
                raise _failure(tool, error) from error

        @functools.wraps(tool)
        async def guarded_coroutine(*args: Any, **kwargs: Any) -> Any:
            try:
                answer = await asyncio.wait_for(attempt(*args, **kwargs), timeout)
            except TimeoutError as error:
                raise _failure(tool, _too_long(timeout or 0.0)) from error
            return check_answer(tool.__name__, answer, max_characters)

        return guarded_coroutine

    @functools.wraps(tool)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            with time_limit(timeout):
                answer = tool(*args, **kwargs)
        except (Exception, SystemExit) as error:
            raise _failure(tool, error) from error
        return check_answer(tool.__name__, answer, max_characters)

    return guarded


def guard_environment(environment: type, *, timeout: float | None = None) -> type:
    """
    Make a subclass of an environment whose tools are guarded. `reset` and `get_reward` are the user's own code on the
    user's own data, not on what a model wrote: an error there ends the run, as one in a reward function does.
    """
    tools = {}
    for name, method in tool_methods(environment):
        tools[name] = guard(method, timeout=timeout)
        if isinstance(inspect.getattr_static(environment, name), staticmethod):
            tools[name] = staticmethod(tools[name])
    return type(environment.__name__, (environment,), {**tools, "__doc__": environment.__doc__})


def tool_methods(environment: type) -> list[tuple[str, Callable[..., Any]]]:
    """The methods of an environment that TRL offers as tools: the public ones beside `reset` and `get_reward`."""
    methods = inspect.getmembers(environment, inspect.isfunction)
    return [(name, method) for name, method in methods if name not in ("reset", "get_reward") and name[0] != "_"]


def check_answer(name: str, answer: Any, max_characters: int = MAX_CHARACTERS) -> Any:
    """
    Return a tool's answer as TRL can use it: as text, or as the list of content parts that it was.

    Raises:
        ToolError: if it is no text, number, list or mapping, cannot be written as text, or is too long.
    """
    if isinstance(answer, list) and answer and all(isinstance(part, dict) and "type" in part for part in answer):
        texts = [part["text"] for part in answer if isinstance(part.get("text"), str)]
        if sum(map(len, texts)) > max_characters:
            raise ToolError(f"{name}: the answer is longer than {max_characters} characters.")
        return answer
    if not isinstance(answer, str | int | float | list | tuple | dict | None):
        raise ToolError(f"{name}: the answer is of type {type(answer).__name__}, not text.")
    try:
        text = str(answer)
    except Exception as error:
        raise ToolError(f"{name}: the answer cannot be written as text.") from error
    if len(text) > max_characters:
        raise ToolError(f"{name}: the answer is longer than {max_characters} characters.")
    return _encodable(text)


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `ToolError` in the block once it has taken this long, where signals allow."""
    if (
        seconds is None
        or not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _too_long(seconds)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before if before is not None else signal.SIG_DFL)


def _too_long(seconds: float) -> ToolError:
    return ToolError(f"no answer within {seconds:g} s.")


def _failure(tool: Callable[..., Any], error: BaseException) -> ToolError:
    try:
        text = _encodable(str(error))
    except Exception:
        text = ""
    text = text if len(text) <= MAX_ERROR_CHARACTERS else f"{text[:MAX_ERROR_CHARACTERS]}…"
    kind = "" if isinstance(error, ToolError | ValueError) else f"{type(error).__name__}: "
    return ToolError(f"{tool.__name__}: {kind}{text}".rstrip(": "))


def _encodable(text: str) -> str:
    """Replace what no tokenizer can encode: half of a surrogate pair."""
    return text.encode("utf-8", "replace").decode("utf-8")
