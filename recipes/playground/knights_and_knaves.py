"""
Knights & Knaves in a compact notation: knights (`K`) say only what is true, knaves (`N`) only what is false.

People are `a`, `b`, `c`; each makes one statement. `bK` reads "b is a knight", `bN` "b is a knave", `bK&cN` and
`bK|cN` join two of these by "and" and "or", `b~c` reads "b and c are of one kind", `b^c` "of different kinds".
"""

import itertools
import random

PEOPLE = "abc"
KINDS = "KN"


def is_true(statement: str, kinds: str) -> bool:
    """
    Evaluate a statement.

    Args:
        statement (`str`):
            In the notation of this module, such as `aK|cN`.
        kinds (`str`):
            One letter per person, `K` or `N`, in the order of `PEOPLE`.

    Returns:
        `bool`: whether the statement holds if the people are of these kinds.
    """
    for joint, combine in (("&", all), ("|", any)):
        if joint in statement:
            return combine(is_true(part, kinds) for part in statement.split(joint))
    if statement[1] in "~^":
        same = kinds[PEOPLE.index(statement[0])] == kinds[PEOPLE.index(statement[2])]
        return same == (statement[1] == "~")
    return kinds[PEOPLE.index(statement[0])] == statement[1]


def is_consistent(statements: list[str], kinds: str) -> bool:
    """Whether every knight's statement is true and every knave's false; one statement and one kind per person."""
    return all(is_true(statement, kinds) == (kind == "K") for statement, kind in zip(statements, kinds, strict=True))


def solutions(statements: list[str]) -> list[str]:
    """All assignments of kinds that are consistent with the statements, such as `["KNK"]`."""
    assignments = ("".join(kinds) for kinds in itertools.product(KINDS, repeat=len(statements)))
    return [kinds for kinds in assignments if is_consistent(statements, kinds)]


def draw_statement(rng: random.Random, people: str) -> str:
    """Draw a statement about one or two of `people`: plain, joined or about their kinds being equal."""
    first, second = rng.sample(people, 2)
    form = rng.choice("plain and or same different".split())
    if form == "plain":
        return first + rng.choice(KINDS)
    if form in ("same", "different"):
        return first + ("~" if form == "same" else "^") + second
    return first + rng.choice(KINDS) + ("&" if form == "and" else "|") + second + rng.choice(KINDS)


def draw_puzzle(rng: random.Random, num_people: int) -> tuple[list[str], str]:
    """
    Draw a puzzle with exactly one solution.

    Args:
        rng (`random.Random`):
            Source of randomness.
        num_people (`int`):
            2 or 3.

    Returns:
        `tuple[list[str], str]`: one statement per person, and the solution.
    """
    while True:
        statements = [draw_statement(rng, PEOPLE[:num_people]) for _ in range(num_people)]
        found = solutions(statements)
        if len(found) == 1:
            return statements, found[0]
