"""The tables of `README.md`."""

import math
from collections.abc import Callable

from recipes.studies.arena.analysis.comparisons import ALPHA, REFERENCE, Arena, Comparison, resolution
from recipes.studies.arena.analysis.runs import METRICS, Run, values_of
from recipes.studies.shared.arms import BASELINES, LEARNED
from recipes.studies.shared.markdown import markdown_table, mean_and_error

# Metric: its name in tables and figures, its unit there, the factor to that unit, and decimals.
SHOWN: dict[str, tuple[str, str, float, int]] = {
    "auc": ("mean training reward", "points", 100, 2),
    "accuracy_sampled": ("sampled accuracy", "points", 100, 2),
    "accuracy_greedy": ("greedy accuracy", "points", 100, 2),
    "mean_length": ("length", "tokens", 1, 2),
    "mean_length_right": ("length of right answers", "tokens", 1, 2),
    "mean_length_wrong": ("length of wrong answers", "tokens", 1, 2),
    "accuracy_per_token": ("accuracy per token", "points", 100, 3),
    "entropy": ("entropy", "nats", 1, 3),
    "grad_norm_cv": ("variation of the gradient norm", "sd over mean", 1, 3),
}
_ACCURACIES = ("auc", "accuracy_sampled", "accuracy_greedy")
_LENGTHS = ("mean_length", "mean_length_right", "mean_length_wrong", "accuracy_per_token")
_STEPS = (20, 100)


def make_tables(arena: Arena) -> dict[str, str]:
    """Return the tables by the name that their markers carry."""
    return {
        "accuracy": _per_task(arena, lambda study, task: _arm_table(arena, study, task, _ACCURACIES)),
        "lengths": _per_task(arena, lambda study, task: _arm_table(arena, study, task, _LENGTHS)),
        "paired": f"{_count(arena)}\n\n" + _per_task(arena, lambda study, task: _paired_table(arena, study, task)),
        "sign": _sign_table(arena),
        "resolution": _resolution_table(arena),
    }


def task_label(study: str, task: str) -> str:
    return task if study == "main" else f"{task} (study {study})"


def _per_task(arena: Arena, table: Callable[[str, str], str]) -> str:
    return "\n\n".join(f"**{task_label(*key)}**\n\n{table(*key)}" for key in arena.groups)


def difference_cell(comparison: Comparison | None, n: int, factor: float, decimals: int) -> str:
    """
    Return a difference as `+1.20 [+0.30, +2.10] *`.

    Args:
        comparison (`Comparison` or None): None is shown as a dash.
        n (`int`): seeds of the arm; another number of pairs is shown beside the difference.
        factor (`float`): to the unit shown.
        decimals (`int`): of all three numbers.

    Returns:
        `str`: the star where Holm-adjusted p < 0.05; without an interval for a single pair.
    """
    if comparison is None:
        return "–"
    text = f"{factor * comparison.difference:+.{decimals}f}"
    if comparison.low is None or comparison.high is None:
        return f"{text} (1 seed)"
    text += f" [{factor * comparison.low:+.{decimals}f}, {factor * comparison.high:+.{decimals}f}]"
    text += " *" if comparison.significant else ""
    return text if comparison.n == n else f"{text} (n = {comparison.n})"


def by_auc(group: dict[str, dict[int, Run]]) -> list[str]:
    """Return the arms, highest mean training reward first; those without one last."""

    def mean(arm: str) -> float:
        values = values_of(group[arm], "auc")
        return float(values.mean()) if len(values) else -math.inf

    return sorted(group, key=mean, reverse=True)


def _arm_table(arena: Arena, study: str, task: str, metrics: tuple[str, ...]) -> str:
    """One line per arm: for each metric mean ± standard error, and the paired difference to the reference."""
    group = arena.groups[study, task]
    header = ["arm", "seeds"]
    for name, unit, *_ in (SHOWN[metric] for metric in metrics):
        header += [f"{name}, {'%' if unit == 'points' else unit}", f"to {REFERENCE}, {unit} [95 %]"]
    rows = []
    for arm in by_auc(group):
        row = [f"`{arm}`", str(len(group[arm]))]
        for metric in metrics:
            factor, decimals = SHOWN[metric][2:]
            cell = difference_cell(arena.to_reference(study, task, metric, arm), len(group[arm]), factor, decimals)
            row.append(mean_and_error(values_of(group[arm], metric), factor, decimals))
            row.append("" if arm == REFERENCE else cell)
        rows.append(row)
    return markdown_table(header, rows)


def _count(arena: Arena) -> str:
    tested = [c for family in arena.comparisons.values() for c in family.values() if c.p is not None]
    found = sum(comparison.significant for comparison in tested)
    families = sum(any(c.p is not None for c in family.values()) for family in arena.comparisons.values())
    return (
        f"{found} of {len(tested)} comparisons have a Holm-adjusted p < {ALPHA}, in {families} families "
        "(one study, task and metric each)."
    )


def _paired_table(arena: Arena, study: str, task: str) -> str:
    """One line per metric: numbers of comparisons, and which arms differ from which baselines."""
    header = ["metric", "comparisons", f"p < {ALPHA}", f"Holm p < {ALPHA}", "higher than", "lower than"]
    rows = []
    for metric in METRICS:
        tested = [c for c in arena.comparisons[study, task, metric].values() if c.p is not None]
        found = [c for c in tested if c.significant]
        counts = [len(tested), sum(c.p is not None and c.p < ALPHA for c in tested), len(found)]
        sides = [_pairs([c for c in found if sign * c.difference > 0]) for sign in (1, -1)]
        rows.append([SHOWN[metric][0], *map(str, counts), *sides])
    return markdown_table(header, rows)


def _pairs(found: list[Comparison]) -> str:
    """Return `arm` to its baselines, arms with the same baselines together."""
    baselines: dict[str, list[str]] = {}
    for comparison in found:
        baselines.setdefault(comparison.arm, []).append(comparison.baseline)
    arms: dict[str, list[str]] = {}
    for arm, names in baselines.items():
        everyone = set(names) >= set(BASELINES) - {arm}
        label = "all baselines" if everyone else ", ".join(f"`{name}`" for name in sorted(names, key=BASELINES.index))
        arms.setdefault(label, []).append(f"`{arm}`")
    return "; ".join(f"{', '.join(names)}: {label}" for label, names in arms.items())


def _sign_table(arena: Arena) -> str:
    """λ of the learned arms: which way it goes, and on how many seeds."""
    rows = []
    for (study, task), group in arena.groups.items():
        for arm in (name for name in LEARNED if name in group):
            row = [task_label(study, task), f"`{arm}`"]
            for values in (values_of(group[arm], f"lambda_{step}") for step in _STEPS):
                positive = f"{int((values > 0).sum())} of {len(values)}" if len(values) else "–"
                row += [mean_and_error(values, 1, 3), positive]
            rows.append(row)
    return markdown_table(
        ["task", "arm", *(f"{t} step {step}" for step in _STEPS for t in ("λ at", "λ > 0 at"))], rows
    )


def _resolution_table(arena: Arena) -> str:
    """What difference each family can find with power 0.8: medians over its pairs."""
    header = ["task", "metric", "unit", "pairs of arms", "n", "sd of the paired difference", "found at 0.05"]
    rows = []
    for (study, task, metric), comparisons in arena.comparisons.items():
        found = resolution(comparisons)
        if found is not None:
            seeds = sorted({c.n for c in comparisons.values() if c.p is not None})
            n = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
            name, unit, factor, decimals = SHOWN[metric]
            numbers = [f"{factor * value:.{decimals}f}" for value in found[1:]]
            rows.append([task_label(study, task), name, unit, str(found[0]), n, *numbers])
    return markdown_table([*header, "found at Holm's first step"], rows)
