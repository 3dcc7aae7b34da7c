"""Every comparison of an arm with a baseline, paired by seed."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from recipes.studies.arena.analysis.runs import METRICS, Group, paired_differences, read_runs
from recipes.studies.shared.arms import BASELINES
from recipes.studies.shared.paired_statistics import (
    bootstrap_interval,
    holm,
    paired_t_p,
    resolvable_difference,
    sign_flip_ps,
)

REFERENCE = "dapo"  # the arm that tables and figures show differences to
ALPHA = 0.05


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


def compare(arm: str, baseline: str, differences: np.ndarray) -> Comparison:
    """Return the comparison, without the p that need others beside it; `differences` has at least one value."""
    mean, n = float(differences.mean()), len(differences)
    if n == 1:
        return Comparison(arm, baseline, n, mean)
    low, high = bootstrap_interval(differences)
    return Comparison(arm, baseline, n, mean, float(differences.std(ddof=1)), low, high, p=paired_t_p(differences))


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
    differences = {}
    for arm, baseline in pairs:
        values = paired_differences(group[arm], group[baseline], metric)
        if len(values):
            differences[arm, baseline] = values
    found = {pair: compare(pair[0], pair[1], values) for pair, values in differences.items()}
    for n in {comparison.n for comparison in found.values()} - {1}:
        alike = [pair for pair in found if found[pair].n == n]
        for pair, exact in zip(alike, sign_flip_ps([differences[pair] for pair in alike]), strict=True):
            found[pair] = replace(found[pair], p_sign_flip=exact)
    p_values = {pair: comparison.p for pair, comparison in found.items() if comparison.p is not None}
    for pair, adjusted in zip(p_values, holm(list(p_values.values())), strict=True):
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
    tested = [(comparison.sd, comparison.n) for comparison in comparisons.values() if comparison.sd is not None]
    if not tested:
        return None
    m = len(tested)

    def median_resolved(alpha: float) -> float:
        return float(np.median([resolvable_difference(sd, n, alpha=alpha) for sd, n in tested]))

    return m, float(np.median([sd for sd, _ in tested])), median_resolved(ALPHA), median_resolved(ALPHA / m)
