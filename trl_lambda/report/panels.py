"""The panels of the picture of a run. What is told apart is told by lightness and shape, never by hue alone."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..weights import LEARNABLE_AGGREGATIONS, length_weights
from .history import RunLog, reward_functions
from .legend import draw_legend, marker_of, shown, title_pad

# Lightest to darkest, far enough apart to be told in grey.
_RAMP = ("#dce9f6", "#9ac6e3", "#4a90c4", "#0b4083")
_CURVES = (("#7aaedb", ":"), ("#2f73b3", "--"), ("#0a2f66", "-"))
_LINES = (("black", "-"), ("0.45", "--"), ("0.3", ":"), ("0.6", "-."))
_LENGTH_SHARES = tuple(f"share/length_q{q}" for q in (1, 2, 3, 4))
_PROBABILITY_SHARES = tuple(f"share/probability_q{q}" for q in (1, 2, 3, 4))
_CURVE_ROWS = 33  # odd, so that one length is the mean


@dataclass(frozen=True)
class Panel:
    """One metric or one comparison: `needs` are the keys without which there is nothing to draw."""

    title: str
    unit: str
    needs: tuple[str, ...]
    draw: Callable[[Any, RunLog], None]
    shown: Callable[[RunLog], bool] = lambda run: True
    over_steps: bool = True

    def has_data(self, run: RunLog) -> bool:
        return self.shown(run) and any(
            run.held_out(key.removeprefix("eval_")) if key.startswith("eval_") else run.series(key)[0]
            for key in self.needs
        )


def finish_panel(axes: Any, panel: Panel, run: RunLog) -> None:
    """Draw `panel` into `axes`, with title, units and a legend that covers no data."""
    panel.draw(axes, run)
    draw_legend(axes)
    functions = reward_functions(run.history)
    title = f"{panel.title}: {functions[0]}" if panel is REWARD and len(functions) == 1 else panel.title
    axes.set_title(title, loc="left", fontsize=10.5, pad=title_pad(axes), parse_math=False)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.set_xlabel(axes.get_xlabel() or "optimizer step", fontsize=9)
    axes.tick_params(labelsize=8.5)
    left, right = axes.get_xlim()
    if panel.over_steps and right - left < 1:  # one step: whole numbers around it
        axes.set_xlim(round(left) - 1, round(left) + 1)
    axes.grid(True, color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def running_mean(values: list[float], window: int) -> list[float]:
    """Return the mean of each value and up to `window - 1` values before it."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]


def _window(values: list[float]) -> int:
    return max(1, len(values) // 10)


def _draw_metric(axes: Any, run: RunLog, key: str, *, zero: bool = False) -> None:
    """Draw one metric: training as a line, held-out as markers."""
    steps, values = run.series(key)
    if zero:
        axes.axhline(0.0, color="0.6", linewidth=0.8, linestyle="--")
    window = _window(values)
    if values and window == 1:
        label = "training" if run.held_out(key) else None
        axes.plot(steps, values, color="black", linewidth=1.8, label=label)
    elif values:
        axes.plot(steps, values, color="0.75", linewidth=0.9, label="training, as logged")
        axes.plot(steps, running_mean(values, window), color="black", linewidth=1.8, label=f"mean of {window} logs")
    if len(values) == 1:
        axes.plot(steps, values, color="black", marker=".")  # a line through one point is invisible
    _draw_held_out(axes, run, key)


def _draw_held_out(axes: Any, run: RunLog, key: str) -> None:
    """Draw one metric on held-out data: a shape for each data set."""
    for number, (label, steps, values) in enumerate(run.held_out(key)):
        axes.plot(steps, values, color="black", linestyle="none", label=label, **marker_of(number))


def _draw_several(axes: Any, run: RunLog, lines: list[tuple[str, str]]) -> None:
    """Draw running means of several metrics, (label, key), told apart by dash and grey, from the fifth on by shape."""
    for number, (label, key) in enumerate(lines):
        steps, values = run.series(key)
        if not values:
            continue
        color, dash = _LINES[number % len(_LINES)]
        shape = number - len(_LINES) if len(values) > 1 else number  # of one log there is no dash to be seen
        # Each begins its marks elsewhere: lines that lie on each other still show theirs.
        every = max(1, len(values) // 6)
        marks = {**marker_of(shape), "markevery": (number % every, every)} if shape >= 0 else {}
        style = {"color": color, "linestyle": dash, "linewidth": 1.6}
        axes.plot(steps, running_mean(values, _window(values)), label=label, **style, **marks)


def _draw_reward_functions(axes: Any, run: RunLog) -> None:
    names = reward_functions(run.history)
    _draw_several(axes, run, [(shown(name), f"rewards/{name}/mean") for name in names])


def _draw_length(axes: Any, run: RunLog) -> None:
    """Mean length, over the range from the shortest to the longest completion of each log."""
    keys = ("completions/min_length", "completions/max_length")
    (steps, low), (high_steps, high) = (run.series(key) for key in keys)
    if steps and steps == high_steps:
        window = _window(low)
        low, high = running_mean(low, window), running_mean(high, window)
        if len(steps) == 1:  # an area needs two points
            axes.vlines(steps, low, high, color="0.9", linewidth=8, label="shortest to longest")
        else:
            axes.fill_between(steps, low, high, color="0.9", linewidth=0, label="shortest to longest")
    steps, values = run.series("completions/mean_length")
    if values:
        axes.plot(steps, running_mean(values, _window(values)), color="black", linewidth=1.8, label="mean")
    if len(values) == 1:
        axes.plot(steps, values, color="black", marker=".")
    _draw_held_out(axes, run, "completions/mean_length")
    axes.set_ylim(bottom=0)


def _draw_shares(axes: Any, run: RunLog, keys: tuple[str, ...], labels: tuple[str, ...]) -> None:
    """Stack the four quarters' shares, lightest for the lowest; each would be 0.25 if nothing were preferred."""
    only = _complete(run, keys)
    steps = only.series(keys[0])[0]
    shares = [running_mean(values, _window(values)) for _, values in map(only.series, keys)]
    if len(steps) == 1:  # an area needs two points: the one log as a bar
        bottom = 0.0
        for (share,), label, color in zip(shares, labels, _RAMP, strict=True):
            axes.bar(steps, [share], bottom=bottom, label=label, color=color, edgecolor="white", width=0.6)
            bottom += share
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    else:
        axes.stackplot(steps, shares, labels=labels, colors=_RAMP, edgecolor="white", linewidth=0.6)
        axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])


def _complete(run: RunLog, keys: tuple[str, ...]) -> RunLog:
    """Return the logs that have a finite value for each of `keys`: what is stacked has to belong together."""
    steps = [set(run.series(key)[0]) for key in keys]
    common = set.intersection(*steps)
    return RunLog([entry for entry in run.history if entry["step"] in common and keys[0] in entry])


def _curve_lengths(run: RunLog) -> tuple[float, float] | None:
    """Return the shortest and the longest response of the run, in tokens."""
    low, high = (run.series(f"completions/{end}_length")[1] for end in ("min", "max"))
    if not low or not high or not max(high) > max(min(low), 1):
        return None
    return max(min(low), 1.0), max(high)


def _draw_lambda(axes: Any, run: RunLog) -> None:
    steps, values = run.series("lambda/value")
    axes.axhline(0.0, color="0.6", linewidth=0.8, linestyle="--", label="λ = 0: the token mean")
    marker = "." if len(values) == 1 else None
    axes.plot(steps, values, color="black", linewidth=1.8, label="λ after the step", marker=marker)


def _curve_rows(run: RunLog) -> int:
    """Return the size of the group whose f is drawn: the largest that the run's r allows, r·√(G-1) < 1."""
    if run.aggregation != "lambda":
        return _CURVE_ROWS
    return max(rows for rows in range(2, _CURVE_ROWS + 1) if rows == 2 or run.length_scale * math.sqrt(rows - 1) < 1)


def _draw_curves(axes: Any, run: RunLog) -> None:
    """Draw f over the run's lengths, as of one group, for λ at the start, in the middle and at the end."""
    rows = _curve_rows(run)
    # f of the softmax depends on the group: fewer responses than can be read as a curve are shown as what they are.
    few = rows < _CURVE_ROWS
    axes.set_xlabel("response length (tokens)" + f", {rows} in a group" * few)
    values = run.series("lambda/value")[1]
    chosen: dict[str, str] = {}
    for when, index in (("at end", -1), ("at start", 0), ("midway", (len(values) - 1) // 2)):
        chosen.setdefault(f"{values[index]:.2f}", when)  # a λ that stands still is one curve
    chosen = {when: lam for lam, when in chosen.items()}
    chosen = {when: chosen[when] for when in ("at start", "midway", "at end") if when in chosen}
    ends = _curve_lengths(run)
    assert ends is not None and run.aggregation is not None  # `_has_curves` has seen to it
    lengths = torch.linspace(*ends, rows, dtype=torch.float64)
    axes.axhline(1.0, color="0.85", linewidth=2.5)  # f = 1: the token mean
    if run.side != "both":
        _draw_sides(axes, run, lengths, values[-1])
        return
    for (when, lam), (color, dash) in zip(chosen.items(), _CURVES[-len(chosen) :], strict=True):
        weights = length_weights(
            lengths.unsqueeze(0), float(lam), aggregation=run.aggregation, length_scale=run.length_scale
        )
        label = f"λ = {lam} {when}"
        style = {"color": color, "linestyle": dash, "linewidth": 2, "marker": "o" if few else None, "markersize": 4}
        axes.plot(lengths.tolist(), weights[0].tolist(), label=label, **style)


def _draw_sides(axes: Any, run: RunLog, lengths: torch.Tensor, lam: float) -> None:
    """Draw f over the run's lengths at the end, one curve for A > 0 and one for A < 0, half of a group each."""
    if run.length_scale * math.sqrt(2 * len(lengths) - 1) >= 1:  # both halves have to fit into one legal group
        lengths = lengths[::2]
    signs = torch.cat([torch.ones_like(lengths), -torch.ones_like(lengths)]).unsqueeze(0)
    weights = length_weights(
        lengths.repeat(2).unsqueeze(0), lam, aggregation=str(run.aggregation), length_scale=run.length_scale,
        side=run.side, advantages=signs,
    )[0]  # fmt: skip
    for name, values, (color, dash) in (
        ("A > 0", weights[: len(lengths)], _CURVES[-1]),
        ("A < 0", weights[len(lengths) :], _CURVES[0]),
    ):
        axes.plot(lengths.tolist(), values.tolist(), color=color, linestyle=dash, linewidth=2,
                  label=f"{name} (λ = {lam:.2f} at end)")  # fmt: skip


def _has_curves(run: RunLog) -> bool:
    return run.aggregation in LEARNABLE_AGGREGATIONS and _curve_lengths(run) is not None


REWARD = Panel(
    "Reward", "reward per completion", ("reward", "eval_reward"), functools.partial(_draw_metric, key="reward")
)


def _share_panel(by: str, keys: tuple[str, ...], labels: tuple[str, ...]) -> Panel:
    """The panel of a quantity's four quarters, shown where a run has logged all of them."""
    return Panel(
        f"Share of the loss by {by}",
        "part of Σ|f·v·A|",
        keys,
        functools.partial(_draw_shares, keys=keys, labels=labels),
        shown=lambda run: bool(_complete(run, keys).history),
    )


PANELS = (
    REWARD,
    Panel(
        "Reward by function",
        "reward per completion",
        ("reward",),
        _draw_reward_functions,
        shown=lambda run: len(reward_functions(run.history)) > 1,
    ),
    Panel(
        "Length preference λ",
        "λ (no unit)",
        ("lambda/value",),
        _draw_lambda,
    ),
    Panel(
        "What λ prefers beside length",
        "λ (no unit)",
        ("lambda/mean_logp", "lambda/min_logp"),
        functools.partial(
            _draw_several,
            lines=[
                ("length", "lambda/value"),
                ("mean log-probability", "lambda/mean_logp"),
                ("least log-probability", "lambda/min_logp"),
            ],
        ),
    ),
    Panel(
        "Variance of A that λ's regression explains",
        "R²",
        ("lambda/r2",),
        functools.partial(_draw_metric, key="lambda/r2", zero=True),
    ),
    Panel(
        "Mean length against its target",
        "ln(length / target)",
        ("lambda/target_gap",),
        functools.partial(_draw_metric, key="lambda/target_gap", zero=True),
    ),
    Panel(
        "Gradient of λ",
        "dL/dλ, or the rule's (no unit)",
        ("lambda/grad",),
        functools.partial(_draw_metric, key="lambda/grad", zero=True),
    ),
    Panel(
        "Advantage against length, within groups",
        "correlation",
        ("advantage/length_correlation",),
        functools.partial(_draw_metric, key="advantage/length_correlation", zero=True),
    ),
    Panel(
        "Length weight f over the run's lengths",
        "f (no unit)",
        ("lambda/value",),
        _draw_curves,
        shown=_has_curves,
        over_steps=False,
    ),
    _share_panel("response length", _LENGTH_SHARES, ("shortest quarter", "second", "third", "longest")),
    _share_panel("token probability", _PROBABILITY_SHARES, ("least probable quarter", "second", "third", "most")),
    Panel(
        "Tokens at the bounds of v",
        "part of tokens",
        ("token_weight/at_min", "token_weight/at_max"),
        functools.partial(
            _draw_several,
            lines=[("at the largest v", "token_weight/at_max"), ("at the smallest v", "token_weight/at_min")],
        ),
    ),
    Panel("Entropy of the policy", "nats per token", ("entropy",), functools.partial(_draw_metric, key="entropy")),
    Panel(
        "Completion length",
        "tokens",
        ("completions/mean_length", "eval_completions/mean_length"),
        _draw_length,
    ),
    Panel(
        "Mean length by sign of the advantage",
        "tokens",
        ("advantage/positive_mean_length", "advantage/negative_mean_length"),
        functools.partial(
            _draw_several,
            lines=[
                ("A > 0: better than its group", "advantage/positive_mean_length"),
                ("A < 0: worse", "advantage/negative_mean_length"),
            ],
        ),
    ),
)
