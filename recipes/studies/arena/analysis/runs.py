"""The runs of `results/runs.csv`, grouped by study and task."""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recipes.studies.shared.arms import ARMS, CONTROLS

METRICS = (
    "accuracy_greedy", "accuracy_sampled", "auc", "mean_length", "mean_length_right", "mean_length_wrong",
    "accuracy_per_token", "entropy", "grad_norm_cv",
)  # fmt: skip
# Of `summary.csv` only: a mean gradient norm depends on the loss's scale, the others are not of every arm.
SUMMARIZED = (*METRICS, "grad_norm_mean", "token_weight_mean", "lambda_20", "lambda_100", "seconds")
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
    """Order arms as `ARMS` and `CONTROLS` do; one that is not listed there any more comes last."""
    order = (*ARMS, *CONTROLS)
    return (order.index(arm) if arm in order else len(order), arm)


def _read_run(row: dict[str, str]) -> Run:
    numbers = {name: float(row[name]) for name in SUMMARIZED if row.get(name)}
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
