"""A tool that goes wrong in every way that is asked of it."""

import sys


class Unwritable(dict):
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


def raises(error: BaseException) -> None:
    raise error


MISBEHAVIOUR = {
    "raises": lambda: raises(ValueError("wrong")),
    "raises a megabyte": lambda: raises(ValueError("x" * 10**6)),
    "raises what has no text": lambda: raises(ValueError(Unwritable())),
    "exits": lambda: sys.exit(1),
    "recurses": lambda: (lambda f: f(f))(lambda f: f(f)),
    "loops": lambda: [None for _ in iter(int, 1)],
    "bytes": lambda: b"bytes",
    "object": object,
    "a megabyte": lambda: "x" * 10**6,
    "a list of a megabyte": lambda: ["x" * 10**6],
    "parts of a megabyte": lambda: [{"type": "text", "text": "x" * 10**6}],
    "a number too long to write": lambda: 10**100_000,
    "what has no text": Unwritable,
}


def misbehave(how: str) -> str:
    """
    Go wrong.

    Args:
        how: In which way.
    """
    return MISBEHAVIOUR[how]()
