"""The runs of `results/runs.csv`, and every comparison of an arm with a baseline, paired by seed."""

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .arms import ARMS, BASELINES
from .statistics import bootstrap_interval, holm, paired_t_p, resolvable_difference, sign_flip_p

REFERENCE = "dapo"  # the arm that tables and figures show differences to
ALPHA = 0.05
METRICS = (
    "accuracy_greedy", "accuracy_sampled", "auc", "mean_length", "mean_length_right", "mean_length_wrong",
    "accuracy_per_token", "entropy", "grad_norm_cv",
)  # fmt: skip
# Of `summary.csv` only: a mean gradient norm depends on the loss's scale, the others are not of every arm.
_SUMMARIZED = (*METRICS, "grad_norm_mean", "token_weight_mean", "lambda_20", "lambda_100", "seconds")
_CURVES = ("reward_curve", "length_curve", "lambda_curve")
_KEYS = ("study", "task", "arm", "seed")
_SETTINGS = (
    "learning_rate",
    "max_steps",
    "steps_per_generation",
)  # one value within a cell, or its mean means nothing


@dataclass(frozen=True)
class Run:
    """One row. `values` and `curves` hold what the row has: an empty field is absent."""

    study: str
    task: str
    arm: str
    seed: int
    settings: tuple[str, ...]
    values: dict[str, float]
    curves: dict[str, np.ndarray]


# Of one study and one task: arm, then seed.
Group = dict[str, dict[int, Run]]


@dataclass(frozen=True)
class Comparison:
    """
    Arm minus baseline over the seeds that both have.

    With one seed there is a difference and nothing else: `sd`, `low`, `high` and all p are None.
    """

    arm: str
    baseline: str
    n: int
    difference: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_sign_flip: float | None = None
    p_holm: float | None = None

    @property
    def significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < ALPHA


def read_runs(path: str | Path) -> dict[tuple[str, str], Group]:
    """
    Read the runs, grouped by study and task in the order of the file, their arms in the order of `ARMS`.

    Args:
        path (`str` or `Path`): `runs.csv`. A last line without its end is not read.

    Returns:
        `dict`: (study, task) to arm to seed to run.

    Raises:
        ValueError: if a column is missing, a run is there twice, a number is not one, or the runs of one study, task
            and arm differ in learning rate, number of steps or steps per generation.
    """
    text = Path(path).read_text(encoding="utf-8")
    text = text[: text.rfind("\n") + 1]  # a study may be writing its next row
    reader = csv.DictReader(io.StringIO(text))
    missing = {*_KEYS, *_SETTINGS, *METRICS, *_CURVES} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{path} lacks the columns {sorted(missing)}")
    runs = [_read_run(row) for row in reader]
    groups: dict[tuple[str, str], Group] = {}
    for run in runs:
        seeds = groups.setdefault((run.study, run.task), {}).setdefault(run.arm, {})
        where = f"{path}: {run.study}, {run.task}, {run.arm}"
        if run.seed in seeds:
            raise ValueError(f"{where} has seed {run.seed} twice")
        if any(other.settings != run.settings for other in seeds.values()):
            raise ValueError(f"{where} mixes several values of {', '.join(_SETTINGS)}")
        seeds[run.seed] = run
    return {key: {arm: group[arm] for arm in sorted(group, key=place_of)} for key, group in groups.items()}


def place_of(arm: str) -> tuple[int, str]:
    """Order arms as `ARMS` does; one that is not listed there any more comes last."""
    return (list(ARMS).index(arm) if arm in ARMS else len(ARMS), arm)


def _read_run(row: dict[str, str]) -> Run:
    numbers = {name: float(row[name]) for name in _SUMMARIZED if row.get(name)}
    curves = {name: np.array([float(value) for value in row[name].split()]) for name in _CURVES if row[name]}
    return Run(
        row["study"], row["task"], row["arm"], int(row["seed"]), tuple(row[name] for name in _SETTINGS),
        {name: value for name, value in numbers.items() if math.isfinite(value)}, curves,
    )  # fmt: skip


def values_of(runs: dict[int, Run], metric: str) -> np.ndarray:
    """Return the metric of every seed that has it, in the order of the seeds."""
    return np.array([runs[seed].values[metric] for seed in sorted(runs) if metric in runs[seed].values])


def paired_differences(arm: dict[int, Run], baseline: dict[int, Run], metric: str) -> np.ndarray:
    """Return arm minus baseline for each seed that has the metric in both, in the order of the seeds."""
    seeds = [s for s in sorted(arm) if s in baseline and metric in arm[s].values and metric in baseline[s].values]
    return np.array([arm[seed].values[metric] - baseline[seed].values[metric] for seed in seeds])


def compare(arm: str, baseline: str, differences: np.ndarray) -> Comparison:
    """Return the comparison, before Holm's correction; `differences` has at least one value."""
    mean, n = float(differences.mean()), len(differences)
    if n == 1:
        return Comparison(arm, baseline, n, mean)
    low, high = bootstrap_interval(differences)
    tests = {"p": paired_t_p(differences), "p_sign_flip": sign_flip_p(differences)}
    return Comparison(arm, baseline, n, mean, float(differences.std(ddof=1)), low, high, **tests)


def compare_all(group: Group, metric: str) -> dict[tuple[str, str], Comparison]:
    """
    Compare every arm with every baseline, and the baselines among themselves: one family of Holm's correction.

    Each pair is there once, with the reference always as baseline. A pair without a common seed is left out.

    Args:
        group (`dict`): of one study and task, from `read_runs`.
        metric (`str`): a column of the runs.

    Returns:
        `dict`: (arm, baseline) to comparison.
    """
    baselines = sorted((name for name in BASELINES if name in group), key=lambda name: name != REFERENCE)
    others = [name for name in group if name not in BASELINES]
    pairs = [(arm, baseline) for i, baseline in enumerate(baselines) for arm in (*baselines[i + 1 :], *others)]
    found = {}
    for arm, baseline in pairs:
        differences = paired_differences(group[arm], group[baseline], metric)
        if len(differences):
            found[arm, baseline] = compare(arm, baseline, differences)
    tested = [pair for pair, comparison in found.items() if comparison.p is not None]
    for pair, adjusted in zip(tested, holm([found[pair].p for pair in tested]), strict=True):
        found[pair] = replace(found[pair], p_holm=adjusted)
    return found


@dataclass(frozen=True)
class Arena:
    """All runs, and all comparisons by (study, task, metric)."""

    groups: dict[tuple[str, str], Group]
    comparisons: dict[tuple[str, str, str], dict[tuple[str, str], Comparison]]

    @classmethod
    def read(cls, path: str | Path) -> "Arena":
        groups = read_runs(path)
        return cls(
            groups, {(*key, name): compare_all(group, name) for key, group in groups.items() for name in METRICS}
        )

    def studies(self) -> list[str]:
        return list(dict.fromkeys(study for study, _ in self.groups))

    def tasks(self, study: str) -> list[str]:
        return [task for other, task in self.groups if other == study]

    def to_reference(self, study: str, task: str, metric: str, arm: str) -> Comparison | None:
        return self.comparisons[study, task, metric].get((arm, REFERENCE))


def resolution(comparisons: dict[tuple[str, str], Comparison]) -> tuple[int, float, float, float] | None:
    """
    Return what one family can resolve with power 0.8, as medians over its pairs.

    Args:
        comparisons (`dict`): from `compare_all`.

    Returns:
        `tuple` or None: number of tests m, standard deviation of the paired differences, difference resolved at
        0.05, and at 0.05/m, Holm's strictest step; None if nothing was tested.
    """
    tested = [comparison for comparison in comparisons.values() if comparison.sd is not None]
    if not tested:
        return None
    m = len(tested)

    def median(value: Callable[[Comparison], float]) -> float:
        return float(np.median([value(comparison) for comparison in tested]))

    return (
        m,
        median(lambda c: c.sd),
        median(lambda c: resolvable_difference(c.sd, c.n, alpha=ALPHA)),
        median(lambda c: resolvable_difference(c.sd, c.n, alpha=ALPHA / m)),
    )


def write_summary(arena: Arena, path: Path) -> None:
    """Write mean and standard deviation over seeds of every metric, one line per study, task and arm."""
    columns = [f"{name}_{part}" for name in _SUMMARIZED for part in ("mean", "sd")]
    rows = []
    for (study, task), group in arena.groups.items():
        for arm, runs in group.items():
            row = [study, task, arm, len(runs), next(iter(runs.values())).settings[0]]
            for values in (values_of(runs, name) for name in _SUMMARIZED):
                row += [values.mean() if len(values) else None, values.std(ddof=1) if len(values) > 1 else None]
            rows.append(row)
    _write(path, ["study", "task", "arm", "n", "learning_rate", *columns], rows)


def write_paired(arena: Arena, path: Path) -> None:
    """Write every comparison, one line each."""
    fields = ("n", "difference", "sd", "low", "high", "p", "p_holm", "p_sign_flip")
    rows = []
    for key, comparisons in arena.comparisons.items():
        for (arm, baseline), comparison in comparisons.items():
            rows.append([*key, arm, baseline, *(getattr(comparison, field) for field in fields)])
    _write(path, ["study", "task", "metric", "arm", "baseline", *fields], rows)


def _write(path: Path, header: list[str], rows: list[list]) -> None:
    """Write a CSV, numbers to six digits so that rounding on another machine changes no line, empty where None."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row])
