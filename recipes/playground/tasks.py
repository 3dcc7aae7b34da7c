"""The playground's tasks: one plain function per task, and the table `TASKS` that names them.

A task function draws one problem from a `random.Random`. To add a task, write such a function with a new prompt letter
and add it to `TASKS`; the data files and the base model pick it up from there.
"""

import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass

SPLIT_SIZES = {"train": 4096, "validation": 256, "test": 512}
SEED = 20251006  # of every data file


@dataclass(frozen=True)
class Problem:
    """
    One verifiable problem with the two ways of answering it that the base model is taught.

    Args:
        key (`Hashable`):
            Identity of the problem. Two problems with equal keys count as the same and never sit in different splits.
        prompt (`str`):
            Text the model is given; its first character is the task's letter.
        solution (`str`):
            The right answer.
        short (`str`):
            The shorter way to answer.
        long (`str`):
            The longer way to answer.
    """

    key: Hashable
    prompt: str
    solution: str
    short: str
    long: str


def running_sum(rng: random.Random) -> Problem:
    """
    Add two to four two-digit numbers, directly or one addition at a time.

    The direct answer to `A47+86+31=` is `164`; step by step it is `47+86=133;133+31=164`, which is longer, and easier
    for a small model because it never adds more than two numbers at once.

    Args:
        rng (`random.Random`):
            Source of randomness.

    Returns:
        `Problem`: its key is the multiset of the numbers, so that another order is the same problem.
    """
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(2, 4))]
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


TASKS: dict[str, Callable[[random.Random], Problem]] = {"running_sum": running_sum}


def make_splits(task: str, seed: int = SEED, sizes: dict[str, int] = SPLIT_SIZES) -> dict[str, list[Problem]]:
    """
    Draw disjoint splits of a task.

    Args:
        task (`str`):
            A name in `TASKS`.
        seed (`int`):
            Seed of the draw; equal seeds give equal splits.
        sizes (`dict[str, int]`):
            Number of problems per split.

    Returns:
        `dict[str, list[Problem]]`: the problems per split; no key occurs twice, within a split or across splits.

    Raises:
        ValueError: if `task` is not in `TASKS`.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; accepted: {', '.join(TASKS)}.")
    rng = random.Random(seed)
    problems: dict[Hashable, Problem] = {}
    while len(problems) < sum(sizes.values()):
        problem = TASKS[task](rng)
        problems.setdefault(problem.key, problem)
    # Small problems repeat sooner, so they get rarer along the draw; unshuffled, the last split would be harder.
    shuffled = list(problems.values())
    rng.shuffle(shuffled)
    splits, start = {}, 0
    for split, size in sizes.items():
        splits[split] = shuffled[start : start + size]
        start += size
    return splits
