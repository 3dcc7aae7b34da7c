"""
The playground's agent: follow a hidden chain of pointers with a tool, and say which digit it ends at.

Each of the keys `a` to `h` points to another key or to a digit. The table is hidden in the environment; the model sees
the first key and may look keys up. The right answer takes one to three look-ups; an answer that comes sooner is a
guess. A conversation reads

    Fa=[a]<eos>(c)=[c]<eos>(7)=7<eos>

where the model writes `[a]<eos>`, `[c]<eos>` and `7<eos>`, and everything else comes from the prompt or the tool.
"""

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from recipes.playground.problem import EOS, Problem

KEYS = "abcdefgh"
DIGITS = "0123456789"
MAX_HOPS = 3
EARLY_STOP = 0.22  # odds that a taught conversation guesses instead of looking the next key up

# `=` is the generation prompt of every turn. A tool's answer stands in round brackets.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '=' + message['content'] -}}
{%- for call in message['tool_calls'] or [] -%}
{%- if call['function']['name'] == 'look_up' -%}
{{- '[' + (call['function']['arguments']['key'] or '') + ']' -}}
{%- else -%}
{{- '[' + call['function']['name'] + (call['function']['arguments'] | tojson) + ']' -}}
{%- endif -%}
{%- endfor -%}
{{- eos_token -}}
{%- elif message['role'] == 'tool' -%}
{{- '(' + message['content'] + ')' -}}
{%- else -%}
{{- message['content'] -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '=' -}}{%- endif -%}
"""

# The anchor has to occur in the generation prompt of every turn: what follows its last occurrence is parsed, and
# without one the whole conversation is, so that its earlier calls would be made again.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "=",
    "fields": {
        "tool_calls": {
            "open": "[",
            "close": "]",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "look_up", "arguments": {"key": "{content}"}}},
        },
        "content": {"close": EOS, "content": "text"},
    },
}


class LookUp:
    """The environment: one table at a time, and the tool that reads it."""

    def __init__(self) -> None:
        self._table: dict[str, str] = {}

    def reset(self, table: str, **row: Any) -> None:
        """
        Take the table of a problem; the prompt stays as it is.

        Args:
            table: What the keys point to, one character each in the order of `KEYS`.
            **row: The row's other columns.
        """
        self._table = dict(zip(KEYS, table, strict=True))

    def look_up(self, key: str) -> str:
        """
        Say what a key points to.

        Args:
            key: One of a to h.

        Returns:
            A key or a digit.
        """
        if key not in self._table:
            raise ValueError("?")  # TRL tells the model and counts the failure
        return self._table[key]


@dataclass(frozen=True)
class LookupProblem(Problem):
    """
    A problem whose row carries the table for the environment.

    Args:
        table (`str`):
            What the keys point to, one character each in the order of `KEYS`.
    """

    table: str = ""

    environment: ClassVar = LookUp

    def row(self) -> dict[str, Any]:
        """The prompt as a message, since tools need a conversation; its `=` is the template's."""
        message = {"role": "user", "content": self.prompt.removesuffix("=")}
        return {"prompt": [message], "solution": self.solution, "table": self.table}

    def demonstration(self, rng: random.Random) -> list[tuple[str, bool]]:
        """Look keys up to the digit, or stop early somewhere and guess."""
        pieces, current = [], self.prompt[1]
        while current not in DIGITS:
            if rng.random() < EARLY_STOP:
                return [*pieces, (rng.choice(DIGITS) + EOS, True)]
            answer = self.table[KEYS.index(current)]
            pieces += [(f"[{current}]{EOS}", True), (f"({answer})=", False)]
            current = answer
        return [*pieces, (current + EOS, True)]


def lookup_agent(rng: random.Random) -> LookupProblem:
    """
    Follow one to three pointers to a digit, with a tool that follows one; or guess.

    Returns:
        `LookupProblem`: its key is the first key with the table. `short` is a lucky guess; `long` looks everything
        up, with the tool's answers as the model sees them.
    """
    hops = rng.randint(1, MAX_HOPS)
    chain = [*rng.sample(KEYS, hops), rng.choice(DIGITS)]
    table = {key: rng.choice(KEYS + DIGITS) for key in KEYS}
    table |= dict(zip(chain, chain[1:], strict=False))
    text, digit = "".join(table[key] for key in KEYS), chain[-1]
    looked_up = "=".join(f"[{key}]({answer})" for key, answer in zip(chain, chain[1:], strict=False))
    return LookupProblem(
        key=(chain[0], text),
        prompt=f"F{chain[0]}=",
        solution=digit,
        short=digit,
        long=f"{looked_up}={digit}",
        table=text,
    )
