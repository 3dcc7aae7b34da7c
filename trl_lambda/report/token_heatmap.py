"""One completion as a heat map: the darker a token's ground, the larger its weight, in colour and in grey."""

import html
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .pages import html_page, png_of, require_matplotlib, write_file

_LIGHT, _DARK = np.array((247, 251, 255)), np.array((8, 48, 107))
_COLUMNS = 88  # characters in a line of the PNG
_OTHERS = "hatched: not written by the policy"
_OTHER_LOOK = {"facecolor": "#f6f6f6", "edgecolor": "#cfcfcf", "hatch": "////", "linewidth": 0}

Limits = tuple[float, float]


def heatmap(
    tokens: Sequence[str] | str,
    weights: Any,
    path: str | Path,
    *,
    title: str = "",
    label: str = "token weight v",
    limits: Limits | None = None,
    mask: Any = None,
) -> Path:
    """
    Show one completion, each token on a ground that is darker the larger its weight.

    Args:
        tokens (`list[str]` or `str`):
            Text of each token, (T,), such as `[tokenizer.decode(i) for i in ids]`. A string is its characters.
        weights (`torch.Tensor` or `list[float]`):
            Weight of each token, (T,), finite where the mask is on.
        path (`str` or `Path`):
            File to write: a page (`.html`) or a picture (`.png`, needs matplotlib).
        title (`str`, *optional*):
            Line above the tokens.
        label (`str`, *optional*):
            Name of the weight, below the colour bar.
        limits (`tuple[float, float]`, *optional*):
            Weights of the lightest and the darkest ground, which make several heat maps comparable. The smallest and
            the largest weight if not given.
        mask (`torch.Tensor` or `list`, *optional*):
            Tokens that the policy wrote, (T,), such as a row of TRL's `tool_mask`. The others, of tools and of the
            chat template, are hatched. All if not given.

    Returns:
        `Path`: the file written.

    Raises:
        ImportError: for a `.png` without matplotlib.
        ValueError: if `tokens`, `weights` and `mask` do not have the same length, a weight under the mask is not
            finite or there is none, or `path` has another ending.
    """
    own = np.ones(len(tokens), bool) if mask is None else np.asarray(mask).astype(bool)
    values = np.asarray(weights, dtype=float)
    if not (values.shape == own.shape == (len(tokens),) and own.any() and np.isfinite(values[own]).all()):
        raise ValueError(
            f"got {len(tokens)} tokens, weights of shape {values.shape} and a mask of shape {own.shape}; need one of "
            "each per token, and finite weights where the mask is on (at least once)."
        )
    low, high = limits or (values[own].min(), values[own].max())
    fractions = np.clip((values - low) / (high - low), 0, 1) if high > low else np.full(len(values), 0.5)
    shades = [fraction if mine else None for fraction, mine in zip(fractions, own, strict=True)]
    body = f'<p class="tokens">{token_spans(tokens, shades, values.tolist())}</p>{colour_bar(label, (low, high))}'
    body += f'<p><span class="other">{_OTHERS}</span></p>' if None in shades else ""
    return write_file(
        path,
        png=partial(_picture, tokens, shades, (low, high), title, label),
        page=partial(html_page, title or "Token weights", body),
    )


def shade(fraction: float) -> tuple[int, ...]:
    """Return the ground's red, green and blue, 0..255, for a fraction from 0 (light) to 1 (dark)."""
    return tuple(np.rint(_LIGHT + fraction * (_DARK - _LIGHT)).astype(int).tolist())


def _ink(fraction: float) -> str:
    """Return the text colour of the larger contrast on `shade(fraction)`."""
    return "#000000" if fraction < 0.65 else "#ffffff"


def token_spans(tokens: Sequence[str], shades: Sequence[float | None], values: Sequence[float]) -> str:
    """Return the tokens as HTML, hatched where the shade is `None`."""
    looks = [
        'class="other"' if fraction is None else
        f'style="background:rgb{shade(fraction)};color:{_ink(fraction)}" title="{value:.4g}"'
        for fraction, value in zip(shades, values, strict=True)
    ]  # fmt: skip
    return "".join(f"<span {look}>{html.escape(_visible(t))}</span>" for look, t in zip(looks, tokens, strict=True))


def colour_bar(label: str, limits: Limits) -> str:
    """Return the key of the grounds as HTML."""
    low, high = (f"<span>{value:.4g}</span>" for value in limits)
    ramp = f'<div class="bar" style="background:linear-gradient(to right, rgb{shade(0)}, rgb{shade(1)})"></div>'
    return f'{ramp}<div class="ends">{low}<span>{html.escape(label)}</span>{high}</div>'


def _visible(token: str) -> str:
    """Return the token with its line breaks and other controls shown. A break is still made after `↵`."""
    text = token.replace("\r\n", "\n").replace("\t", "→").replace("\n", "↵\n")
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)


def _place(tokens: Sequence[str]) -> Iterator[tuple[int, int, str, int]]:
    """Lay the tokens out: yields line, column, text and the token's number for each part of a token."""
    line = column = 0
    for number, token in enumerate(tokens):
        for part in re.findall(f".{{1,{_COLUMNS // 2}}}\n?", _visible(token)):
            text = part.removesuffix("\n")
            if column + len(text) > _COLUMNS:
                line, column = line + 1, 0
            yield line, column, text, number
            line, column = (line + 1, 0) if part != text else (line, column + len(text))


def _picture(tokens: Sequence[str], shades: Sequence[float | None], limits: Limits, title: str, label: str) -> bytes:
    """Draw the PNG: a box and a text for each part of a token, the colour bar below."""
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    parts = list(_place(tokens))
    lines, columns = parts[-1][0] + 1, max(column + len(text) for _, column, text, _ in parts)
    height = lines * 0.26  # inches
    figure = Figure(figsize=(columns * 0.0845, height), dpi=120)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(lines, 0))
    axes.axis("off")
    for line, column, text, number in parts:
        look, ink, fraction = _OTHER_LOOK, "#555555", shades[number]
        if fraction is not None:
            look = {"facecolor": [value / 255 for value in shade(fraction)], "edgecolor": "white", "linewidth": 0.8}
            ink = _ink(fraction)
        axes.add_patch(Rectangle((column, line + 0.06), len(text), 0.88, **look))
        style = {"family": "DejaVu Sans Mono", "fontsize": 10, "va": "center_baseline", "parse_math": False}
        axes.text(column + 0.1, line + 0.5, text, color=ink, **style)
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    bar = figure.add_axes((0, -0.28 / height, 2.4 / (columns * 0.0845), 0.13 / height), yticks=(), xticks=(0, 1))
    bar.imshow([[shade(fraction) for fraction in np.linspace(0, 1, 200)]], aspect="auto", extent=(0, 1, 0, 1))
    bar.set_xticklabels([f"{limit:.3g}" for limit in limits])
    bar.set_xlabel(label, fontsize=9, labelpad=-8)
    if None in shades:
        axes.text(30, lines + 1, _OTHERS, fontsize=9, color="#555555")
    return png_of(figure, bbox_inches="tight", pad_inches=0.15)
