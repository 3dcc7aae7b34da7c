"""One completion as a picture: its tokens coloured by weight."""

import html
import math
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .history import readable
from .names import PAGES, PICTURES, check_ending

# Light to dark: the darker, the heavier, in colour and in grey.
_STOPS = ((247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))
_COLUMNS = 88  # characters in a line of the PNG
# Tokens that have no weight: light and hatched, so that no grey is taken for a weight.
_OTHER_INK, _OTHER_LOOK = "#555555", {"facecolor": "#f6f6f6", "edgecolor": "#cfcfcf", "hatch": "////", "linewidth": 0}
_OTHERS = "grey: not the policy's own"
_MAX_LINES = 2000  # 60 000 pixels high, about what the PNG canvas can hold

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 1.5em auto; padding: 0 1em; color: #222 }}
.tokens {{ font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
.tokens span {{ padding: .15em 0; border-right: 1px solid #fff }}
.other {{ color: #555; background: repeating-linear-gradient(45deg, #f6f6f6 0 3px, #cfcfcf 3px 4px) }}
.bar {{ height: 1em; max-width: 24em; border: 1px solid #888; background: linear-gradient(to right, {stops}) }}
.ends {{ display: flex; justify-content: space-between; max-width: 24em; font-variant-numeric: tabular-nums }}
</style></head><body>
<h1>{title}</h1>
<p class="tokens">{tokens}</p>
<div class="bar"></div><div class="ends"><span>{low}</span><span>{label}</span><span>{high}</span></div>{others}
</body></html>
"""


def heatmap(
    tokens: Sequence[str] | str,
    weights: Any,
    path: str | Path,
    *,
    title: str = "",
    label: str = "token weight (no unit)",
    limits: tuple[float, float] | None = None,
    mask: Any = None,
) -> Path:
    """
    Show one completion with each token on a ground that is the darker the more it weighs.

    In a conversation with tools only the policy's own tokens have a weight: with `mask`, those of the tools and of the
    chat template are grey and hatched.

    Args:
        tokens (`list[str]` or `str`):
            Text of each token, (T,), such as `[tokenizer.decode(i) for i in ids]`; a string is its characters.
        weights (`torch.Tensor` or `list[float]`):
            Weight of each token, (T,), finite where the mask is on.
        path (`str` or `Path`):
            File to write: an HTML page if it ends in `.html` or `.htm`, a PNG if in `.png` (needs matplotlib, which
            has no glyphs for some scripts). Its folder is made if need be.
        title (`str`, *optional*):
            Line above the tokens.
        label (`str`, *optional*):
            What the colour bar shows, with its unit.
        limits (`tuple[float, float]`, *optional*):
            Weights of the lightest and the darkest ground, so that several pictures compare; the smallest and the
            largest weight if not given.
        mask (`torch.Tensor` or `list`, *optional*):
            Which tokens are the policy's own, (T,): true or 1, such as a row of TRL's `tool_mask`. All, if not given.

    Returns:
        `Path`: the file written.

    Raises:
        ImportError: for a PNG without matplotlib.
        ValueError: if there are no tokens or one is no text, not one finite weight for each, the mask has another
            length or leaves no token, the limits are not `(low, high)`, the file name ends in neither, or the
            completion is too long for a PNG.
    """
    path = check_ending("path", path, PAGES + PICTURES)
    tokens = _texts(tokens)
    own = [True] * len(tokens) if mask is None else [number != 0 for number in _numbers("mask", mask)]
    values = _numbers("weights", weights, own)
    for name, entries in (("weights", values), ("mask", own)):
        if len(tokens) != len(entries) or not tokens:
            raise ValueError(
                f"{name} has {len(entries)} entries for {len(tokens)} tokens; need one each, and at least one."
            )
    if not any(own):
        raise ValueError("mask is off everywhere; need at least one token of the policy's own.")
    weighed = [value for value, mine in zip(values, own, strict=True) if mine]
    low, high = (min(weighed), max(weighed)) if limits is None else _limits(limits)
    title, label = readable(title), readable(label)
    # Halves, so that a range which is itself beyond the largest float has fractions too.
    spread = high / 2 - low / 2
    fractions = [min(max((value / 2 - low / 2) / spread, 0.0), 1.0) if spread > 0 else 0.5 for value in values]
    fractions = [fraction if mine else None for fraction, mine in zip(fractions, own, strict=True)]
    if path.suffix.lower() in PAGES:
        content = _page(tokens, values, fractions, (low, high), title, label)
    else:
        content = _picture(tokens, fractions, (low, high), title, label)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _texts(tokens: Any) -> list[str]:
    """Check the tokens and return them as text that can be written."""
    try:
        found = next((token for token in tokens if not isinstance(token, str)), "")
    except TypeError:
        found = tokens
    if not isinstance(found, str):
        raise ValueError(f"tokens has {found!r:.60}; accepted: the text of each token, a list of str.")
    return [readable(token) for token in tokens]


def _numbers(argument: str, numbers: Any, counted: Sequence[bool] = ()) -> list[float]:
    """Check numbers and return them as floats; 0 for those that do not count, whatever they are."""
    try:
        values = [float(value) for value in (numbers.tolist() if hasattr(numbers, "tolist") else numbers)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} must be one number for each, in a list or a tensor (T,): {error}.") from error
    except OverflowError:
        values = [math.inf]
    if len(counted) == len(values):
        values = [value if counts else 0.0 for value, counts in zip(values, counted, strict=True)]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{argument} has an entry that is not finite.")
    return values


def _limits(limits: Any) -> tuple[float, float]:
    values = _numbers("limits", limits)
    if len(values) != 2 or not values[0] <= values[1]:
        raise ValueError(f"limits={limits} must be (low, high) with low <= high.")
    return values[0], values[1]


def shade(fraction: float) -> tuple[int, int, int]:
    """Return the ground's red, green and blue, 0..255, for a fraction from 0 (light) to 1 (dark)."""
    place = fraction * (len(_STOPS) - 1)
    i = min(int(place), len(_STOPS) - 2)
    red, green, blue = (round(a + (place - i) * (b - a)) for a, b in zip(_STOPS[i], _STOPS[i + 1], strict=True))
    return red, green, blue


def _ink(fraction: float) -> str:
    """Return the text colour that reads on `shade(fraction)`: the one with the larger contrast (WCAG)."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in shade(fraction)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def _visible(token: str) -> str:
    """Return the token with its line breaks and other controls shown; a break is still made after `↵`."""
    shown = token.replace("\r\n", "\n").replace("\t", "→")
    shown = "".join("·" if unicodedata.category(c) == "Cc" and c != "\n" else c for c in shown)
    return shown.replace("\n", "↵\n")


def _page(
    tokens: list[str],
    values: list[float],
    fractions: list[float | None],
    limits: tuple[float, float],
    title: str,
    label: str,
) -> bytes:
    spans = []
    for token, value, fraction in zip(tokens, values, fractions, strict=True):
        if fraction is None:
            spans.append(f'<span class="other">{html.escape(_visible(token))}</span>')
            continue
        ground = "#{:02x}{:02x}{:02x}".format(*shade(fraction))
        style = f"background:{ground};color:{_ink(fraction)}"
        spans.append(f'<span style="{style}" title="{value:.4g}">{html.escape(_visible(token))}</span>')
    low, high = (f"{value:.4g}" for value in limits)
    # One weight has one colour: the bar is then all of it, as the tokens are.
    ends = [shade(0.5)] * 2 if limits[0] == limits[1] else _STOPS
    page = _PAGE.format(
        title=html.escape(title or "Token weights"),
        stops=", ".join("#{:02x}{:02x}{:02x}".format(*stop) for stop in ends),
        tokens="".join(spans),
        low=low,
        high=high,
        label=html.escape(label),
        others=f'<p><span class="other">{html.escape(_OTHERS)}</span></p>' if None in fractions else "",
    )
    return page.encode("utf-8")


def _cells(text: str) -> int:
    """Return how many monospace cells `text` takes: wide characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text
    )


def _place(tokens: list[str]) -> Iterator[tuple[int, int, int, str, int]]:
    """Lay the tokens out: yields line, column, width, text and the token's number for each part of a token."""
    line = column = 0
    for number, token in enumerate(tokens):
        shown = _visible(token)
        if column and column + _cells(shown.rstrip("\n")) > _COLUMNS >= _cells(shown):
            line, column = line + 1, 0  # a token is not split where the next line can hold it
        text, start = "", column
        for character in shown:
            width = _cells(character)
            if character != "\n" and column + width <= _COLUMNS:
                text, column = text + character, column + width
                continue
            if text:
                yield line, start, column - start, text, number
            line, start = line + 1, 0
            text, column = ("", 0) if character == "\n" else (character, width)
        if text:
            yield line, start, column - start, text, number


def _picture(
    tokens: list[str], fractions: list[float | None], limits: tuple[float, float], title: str, label: str
) -> bytes:
    """Draw the PNG: one box and one text per part of a token, and the colour bar below."""
    from io import BytesIO

    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap, Normalize
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "trl-lambda[plots]"') from error

    parts = list(_place(tokens))
    lines = max(line for line, *_ in parts) + 1 if parts else 1
    if lines > _MAX_LINES:
        raise ValueError(f"the completion takes {lines} lines, a PNG holds {_MAX_LINES}; write .html instead.")
    columns = max([column + width for _, column, width, *_ in parts], default=1)
    columns = max(columns, 70 if None in fractions else 48)  # room for the colour bar's label, and the other key
    left, top, bottom, cell, height = 0.15, 0.42 if title else 0.15, 0.72, 0.088, 0.26  # inches
    size = (columns * cell + 2 * left, top + lines * height + bottom)
    figure = Figure(figsize=size, dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((left / size[0], bottom / size[1], 1 - 2 * left / size[0], lines * height / size[1]))
    axes.set(xlim=(0, columns), ylim=(lines, 0))
    axes.axis("off")
    for line, column, width, text, number in parts:
        fraction, look, ink = fractions[number], _OTHER_LOOK, _OTHER_INK
        if fraction is not None:
            color = tuple(value / 255 for value in shade(fraction))
            look, ink = {"facecolor": color, "edgecolor": "white", "linewidth": 0.8}, _ink(fraction)
        axes.add_patch(Rectangle((column, line + 0.06), width, 0.88, **look))
        style = {"family": "DejaVu Sans Mono", "fontsize": 10, "va": "center_baseline", "parse_math": False}
        axes.text(column + 0.1, line + 0.5, text, color=ink, **style)
    if None in fractions:
        place = ((left + 3.75) / size[0], 0.46 / size[1])
        key = Rectangle(place, 0.3 / size[0], 0.13 / size[1], transform=figure.transFigure, **_OTHER_LOOK)
        figure.add_artist(key)
        figure.text((left + 4.13) / size[0], place[1], _OTHERS, fontsize=9, color=_OTHER_INK)
    if title:
        figure.text(left / size[0], 1 - 0.14 / size[1], title, fontsize=11, va="top", parse_math=False)
    stops = [shade(0.5)] * 2 if limits[0] == limits[1] else _STOPS
    ramp = LinearSegmentedColormap.from_list("weights", [tuple(value / 255 for value in stop) for stop in stops])
    bar_axes = figure.add_axes((left / size[0], 0.46 / size[1], 3.4 / size[0], 0.13 / size[1]))
    # Drawn from 0 to 1, named by the weights, whose range may be beyond the largest float.
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), ramp), cax=bar_axes, orientation="horizontal")
    ticks = {0.0: limits[0], 0.5: limits[0] / 2 + limits[1] / 2, 1.0: limits[1]}
    ticks = {0.5: limits[0]} if limits[0] == limits[1] else ticks
    bar.set_ticks(list(ticks), labels=[f"{value:.3g}" for value in ticks.values()])
    bar.ax.tick_params(labelsize=8.5)
    bar.set_label(label, fontsize=9, labelpad=1)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
