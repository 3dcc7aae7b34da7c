"""The settings of each rival that the ladder keeps: the rule of README.md, on the rows of `tune`."""

import statistics

from recipes.studies.tokens.rows import BASELINE, Rows, cells, split_name

LOSS = 5.0  # points of accuracy below dapo's that a setting with few tokens may have


def kept_settings(rows: Rows) -> dict[tuple[str, str], list[str]]:
    """
    (way, task) -> the settings kept, those with more tokens first.

    A setting goes that another one of its way and task beats in accuracy with no more tokens, means over seeds. Of the
    rest the most accurate is kept, and the one with the fewest tokens whose accuracy is not below dapo's by more than
    `LOSS` points; where the two are one, the one with the next fewer tokens, or, without such, with the next more.
    """
    found = cells(rows, "tune")
    points: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for (task, name), runs in found.items():
        way, setting = split_name(name)
        tokens, accuracy = (
            statistics.fmean(float(row[column]) for row in runs.values())
            for column in ("mean_length", "accuracy_sampled")
        )
        points.setdefault((way, task), {})[setting] = tokens, 100 * accuracy
    kept = {}
    for (way, task), settings in points.items():
        if way == BASELINE:
            continue
        ((_, of_dapo),) = points[BASELINE, task].values()
        rest = {
            name: (tokens, accuracy)
            for name, (tokens, accuracy) in settings.items()
            if not any(t <= tokens and a > accuracy for t, a in settings.values())
        }
        by_tokens = sorted(rest, key=lambda name: rest[name])  # fewest first, and with them the least accurate
        best = by_tokens[-1]
        few = next((name for name in by_tokens if rest[name][1] >= of_dapo - LOSS), best)
        if few == best:
            neighbours = by_tokens[:-1]
            few = neighbours[-1] if neighbours else best
        kept[way, task] = list(dict.fromkeys((best, few)))
    return kept
