"""The playground's tasks: one plain function per task, and the table `TASKS` that names them.

A task function draws one problem from a `random.Random`. They differ in what the length of an answer is worth. To add
a task, write such a function with a new prompt letter, add it to `TASKS` and give it a base model in
`make_base_model.BASE_MODELS`; the data files pick it up from there.
"""

import random
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

from recipes.playground.knights_and_knaves import KINDS, draw_puzzle
from recipes.playground.lookup_agent import lookup_agent
from recipes.playground.problem import Problem

SPLIT_SIZES = {"train": 4096, "validation": 256, "test": 512}
SMALL_SPLIT_SIZES = {"train": 1024, "validation": 256, "test": 512}  # of tasks with a few thousand problems in all
SEED = 20251006  # of every data file
SLIP = 0.2  # odds that a link of a taught chain slips


def running_sum(rng: random.Random, *, counts: tuple[int, int] = (2, 4)) -> Problem:
    """
    Add two to four two-digit numbers, directly or one addition at a time.

    The direct answer to `A47+86+31=` is `164`; step by step it is `47+86=133;133+31=164`, which is longer, and easier
    for a small model because it never adds more than two numbers at once.

    Args:
        rng (`random.Random`):
            Source of randomness.
        counts (`tuple[int, int]`):
            The fewest and the most numbers.

    Returns:
        `Problem`: its key is the multiset of the numbers, so that another order is the same problem.
    """
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(*counts))]
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total}+{number}={total + number}")
        total += number
    return Problem(
        key=tuple(sorted(numbers)),
        prompt=f"A{'+'.join(map(str, numbers))}=",
        solution=str(total),
        short=str(total),
        long=";".join(steps),
    )


def slippery_chain(rng: random.Random, *, digits: int = 2, max_links: int = 6) -> Problem:
    """
    Add two two-digit numbers, directly or through a chain of totals that may slip: shorter is right more often.

    The direct answer to `B47+36=` is `083`. The chain adds the second number in two to six parts and names the total
    after each, `051;070=083`. Each link of a taught chain slips with odds of one to four, by 1 or 10 either way, and
    takes the error along, so a chain is wrong more often the longer it is. Answers have three digits.

    Args:
        rng (`random.Random`):
            Source of randomness.
        digits (`int`):
            Digits of a number; answers have one more.
        max_links (`int`):
            The most links of a chain.

    Returns:
        `Problem`: its key is the pair of numbers, in either order.
    """
    low, high, width = 10 ** (digits - 1), 10**digits - 1, digits + 1
    first, second = rng.randint(low, high), rng.randint(low, high)
    cuts = sorted(rng.sample(range(1, second), rng.randint(1, max_links - 1)))
    totals, error = [], 0
    for part in (*cuts, second):
        error += rng.choice((-10, -1, 1, 10)) if rng.random() < SLIP else 0
        totals.append(f"{first + part + error:0{width}d}")
    return Problem(
        key=tuple(sorted((first, second))),
        prompt=f"B{first}+{second}=",
        solution=f"{first + second:0{width}d}",
        short=f"{first + second:0{width}d}",
        long=f"{';'.join(totals[:-1])}={totals[-1]}",
    )


def idle_filler(rng: random.Random) -> Problem:
    """
    Add two two-digit numbers after 0 to 20 filler characters, whose number has nothing to do with the problem.

    A possible answer to `C47+86=` is `....=133`.

    Args:
        rng (`random.Random`):
            Source of randomness.

    Returns:
        `Problem`: its key is the pair of numbers, in either order; `short` has up to 10 fillers, `long` has more.
    """
    first, second = rng.randint(10, 99), rng.randint(10, 99)
    answer = f"={first + second:03d}"
    return Problem(
        key=tuple(sorted((first, second))),
        prompt=f"C{first}+{second}=",
        solution=answer[1:],
        short="." * rng.randint(0, 10) + answer,
        long="." * rng.randint(11, 20) + answer,
    )


def knights_and_knaves(rng: random.Random) -> Problem:
    """
    Say who of two or three people is a knight, directly or by going through cases until one fits.

    The prompt `DbN;a~b=` reads: a says "b is a knave", b says "a and b are of one kind"; who is what? The direct
    answer is `KN`. The search names one case after another, in any order, and whether it is refuted (`-`) or fits
    (`=`): `KK-NN-KN=KN`.

    Args:
        rng (`random.Random`):
            Source of randomness.

    Returns:
        `Problem`: its key is its statements; it has exactly one solution.
    """
    num_people = rng.choice((2, 3))
    statements, solution = draw_puzzle(rng, num_people)
    cases = {"".join(rng.choice(KINDS) for _ in range(num_people)) for _ in range(2 * num_people)} - {solution}
    refuted = rng.sample(sorted(cases), rng.randint(0, len(cases)))
    return Problem(
        key=tuple(statements),
        prompt=f"D{';'.join(statements)}=",
        solution=solution,
        short=solution,
        long="".join(f"{case}-" for case in refuted) + f"{solution}={solution}",
    )


def checked_sum(rng: random.Random) -> Problem:
    """
    Add two to five digits modulo 10, in one token or step by step, the steps written out up to four times.

    The direct answer to `E7+8+6=` is `1`. Step by step it is `7+8=5;5+6=1`, and one or more checks may follow, each
    the same steps again: `7+8=5;5+6=1?7+8=5;5+6=1`. The steps help; the checks only make the answer longer. Lengths
    taught span 1 to 47 characters, and can grow to whatever limit is set.

    Args:
        rng (`random.Random`):
            Source of randomness.

    Returns:
        `Problem`: its key is the multiset of the digits.
    """
    digits = [rng.randint(0, 9) for _ in range(rng.randint(2, 5))]
    total, steps = digits[0], []
    for digit in digits[1:]:
        steps.append(f"{total}+{digit}={(total + digit) % 10}")
        total = (total + digit) % 10
    work = ";".join(steps)
    repeats = min(rng.randint(1, 4), 50 // len(work))
    return Problem(
        key=tuple(sorted(digits)),
        prompt=f"E{'+'.join(map(str, digits))}=",
        solution=str(total),
        short=str(total),
        long="?".join([work] * repeats),
    )


TASKS: dict[str, Callable[[random.Random], Problem]] = {
    "running_sum": running_sum,
    "slippery_chain": slippery_chain,
    "idle_filler": idle_filler,
    "knights_and_knaves": knights_and_knaves,
    "checked_sum": checked_sum,
    "lookup_agent": lookup_agent,
}
# The first two with longer answers, up to 100 characters and more, for `recipes/studies/arena/large.py`.
LONG_TASKS: dict[str, Callable[[random.Random], Problem]] = {
    "long_sum": partial(running_sum, counts=(4, 10)),
    "long_chain": partial(slippery_chain, digits=3, max_links=20),
}


def find_task(task: str) -> Callable[[random.Random], Problem]:
    """
    The function of a task of either table.

    Raises:
        ValueError: if there is none of that name.
    """
    tasks = TASKS | LONG_TASKS
    if task not in tasks:
        raise ValueError(f"task is {task!r}; accepted: {', '.join(tasks)}.")
    return tasks[task]


def environment_of(task: str) -> Callable[[], Any] | None:
    """What TRL's `environment_factory` takes for a task, or `None` where answers are plain text."""
    return find_task(task)(random.Random(0)).environment


def make_splits(task: str, seed: int = SEED, sizes: dict[str, int] | None = None) -> dict[str, list[Problem]]:
    """
    Draw disjoint splits of a task.

    Args:
        task (`str`):
            A name in `TASKS` or `LONG_TASKS`.
        seed (`int`):
            Seed of the draw; equal seeds give equal splits.
        sizes (`dict[str, int]`, *optional*):
            Number of problems per split: if `None`, `SPLIT_SIZES` for `running_sum` and the long tasks, and
            `SMALL_SPLIT_SIZES` for the others.

    Returns:
        `dict[str, list[Problem]]`: the problems per split; no key occurs twice, within a split or across splits.

    Raises:
        ValueError: if there is no such task.
    """
    draw = find_task(task)
    if sizes is None:
        sizes = SPLIT_SIZES if task in ("running_sum", *LONG_TASKS) else SMALL_SPLIT_SIZES
    rng = random.Random(seed)
    problems: dict[Hashable, Problem] = {}
    while len(problems) < sum(sizes.values()):
        problem = draw(rng)
        problems.setdefault(problem.key, problem)
    # Small problems repeat sooner, so they get rarer along the draw; unshuffled, the last split would be harder.
    shuffled = list(problems.values())
    rng.shuffle(shuffled)
    splits, start = {}, 0
    for split, size in sizes.items():
        splits[split] = shuffled[start : start + size]
        start += size
    return splits
