"""One completion's tokens shaded by weight: HTML and PNG."""

import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from trl_lambda.report import ReportCallback, heatmap, plot_run
from trl_lambda.report.token_heatmap import shade

TOKENS = ["Add", " 47", " and", " $8", "6$:", "\n", "47", "+86", "=", "<b>133", ".\n\n", "wörd", " ", "\t"]
WEIGHTS = [1.0 + 0.4 * i / (len(TOKENS) - 1) for i in range(len(TOKENS))]
SPAN = re.compile(r'<span style="background:rgb\((.*?)\);color:(#\w+)" title="([\d.e+-]+)">(.*?)</span>', re.DOTALL)


def page_of(tmp_path, *args, **options) -> str:
    return heatmap(*args, tmp_path / "new" / "a.html", **options).read_text(encoding="utf-8")


def grounds(page: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, ground.split(","))) for ground, *_ in SPAN.findall(page)]


def grey(color) -> float:
    return float(np.dot((0.299, 0.587, 0.114), color))


def test_the_page_shows_each_token_on_its_ground(tmp_path):
    page = page_of(tmp_path, TOKENS, torch.tensor(WEIGHTS), title="x < y", label="v (no unit)")
    shown = SPAN.findall(page)
    assert [text for *_, text in shown][:6] == ["Add", " 47", " and", " $8", "6$:", "↵\n"]
    assert shown[9][3] == "&lt;b&gt;133" and shown[-1][3] == "→" and "<h1>x &lt; y</h1>" in page
    lightness = [grey(ground) for ground in grounds(page)]
    assert lightness == sorted(lightness, reverse=True) and lightness[0] - lightness[-1] > 150
    assert [float(weight) for *_, weight, _ in shown] == pytest.approx(WEIGHTS, abs=1e-3)
    assert '<div class="ends"><span>1</span><span>v (no unit)</span><span>1.4</span>' in page
    assert "http" not in page and "src=" not in page  # nothing is fetched


def test_the_text_reads_on_every_ground(tmp_path):
    """The ramp grows darker all the way, and its text has at least 4.5 : 1 of contrast (WCAG)."""
    page = page_of(tmp_path, ["a"] * 200, torch.linspace(0, 1, 200))
    assert (np.diff([grey(ground) for ground in grounds(page)]) < 0).all()
    for ground, (_, ink, *_) in zip(grounds(page), SPAN.findall(page), strict=True):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(ground) / 255]
        luminance = np.dot((0.2126, 0.7152, 0.0722), linear)
        assert (1.05 / (luminance + 0.05) if ink == "#ffffff" else (luminance + 0.05) / 0.05) > 4.5


def test_equal_weights_have_one_shade_and_limits_make_pages_compare(tmp_path):
    assert set(grounds(page_of(tmp_path, "abc", [0.7] * 3))) == {shade(0.5)}
    page = page_of(tmp_path, "abc", [0.5, 1.0, 9.0], limits=(0.0, 2.0))
    assert grounds(page) == [shade(0.25), shade(0.5), shade(1.0)]


def test_the_page_hatches_what_the_policy_did_not_write(tmp_path):
    """Their weights, whatever they are, take no part in the shades either."""
    tokens, weights = ["[a]", "<eos>", "(", "</span><b>", ")=", "7"], [1.0, 1.2, float("nan"), 99.0, -99.0, 1.4]
    page = page_of(tmp_path, tokens, weights, mask=torch.tensor([1, 1, 0, 0, 0, 1]))
    unmasked = page_of(tmp_path, ["[a]", "<eos>", "7"], [1.0, 1.2, 1.4])
    assert SPAN.findall(page) == SPAN.findall(unmasked) and "not written by the policy" not in unmasked
    others = re.findall(r'<span class="other">(.*?)</span>', page)
    assert others == ["(", "&lt;/span&gt;&lt;b&gt;", ")=", "hatched: not written by the policy"]


def tags_and_text(page: str) -> tuple[list, str]:
    seen, texts, parser = [], [], HTMLParser()
    parser.handle_starttag = lambda tag, attributes: seen.append((tag, [name for name, _ in attributes]))
    parser.handle_data = texts.append
    parser.feed(page)
    return seen, "".join(texts)


@pytest.mark.parametrize("mask", [0, 1])
@pytest.mark.parametrize(
    "attack", ['" onmouseover="alert(1)', "</style></p></html><svg/onload=alert(1)>", "\x00<!-- &lt;alert(1) {title}"]
)
def test_what_a_tool_answers_stays_text(tmp_path, attack, mask):
    tags, text = tags_and_text(page_of(tmp_path, ["a", attack], [1, 1.2], mask=[1, mask], title=attack, label=attack))
    assert tags == tags_and_text(page_of(tmp_path, "ab", [1, 1.2], mask=[1, mask], title="b", label="b"))[0]
    assert text.count("alert(1)") == 4  # title twice, token, label


@pytest.fixture
def figures(monkeypatch):
    seen, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k)))
    return seen


def test_the_picture_shows_each_token_on_its_ground(tmp_path, figures):
    path = heatmap(TOKENS, WEIGHTS, tmp_path / "new" / "a.png", title="a $tidy title$", label="v (no unit)")
    assert path.read_bytes().startswith(b"\x89PNG")
    axes, bar = figures[0].axes
    assert axes.get_title("left") == "a $tidy title$" and bar.get_xlabel() == "v (no unit)"
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["Add", " 47", " and", " $8", "6$:", "↵", "47", "+86", "=", "<b>133", ".↵", "↵", "wörd", " ", "→"]
    boxes = [(patch.get_x(), int(patch.get_y()), patch.get_width()) for patch in axes.patches]
    assert [line for _, line, _ in boxes] == [0] * 6 + [1] * 5 + [2] + [3] * 3
    for before, box in zip(boxes, boxes[1:], strict=False):  # side by side, no gap and no overlap
        assert box[0] == (before[0] + before[2] if box[1] == before[1] else 0)
    lightness = [sum(patch.get_facecolor()[:3]) for patch in axes.patches]
    assert lightness == sorted(lightness, reverse=True)
    assert not any(text.get_parse_math() for text in axes.texts)  # a $ is a $
    heatmap(["x" * 100, "y", "z"], [1.0, 2.0, 3.0], tmp_path / "b.png", mask=[1, 1, 0])
    axes = figures[1].axes[0]  # long tokens are broken, lines do not overflow, what others wrote is hatched
    texts = [text.get_text() for text in axes.texts]
    assert "".join(texts[:-1]) == "x" * 100 + "yz" and texts[-1] == "hatched: not written by the policy"
    assert max(patch.get_x() + patch.get_width() for patch in axes.patches) <= 88
    assert [patch.get_hatch() is not None for patch in axes.patches] == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("tokens", "weights", "options"),
    [
        (["a"], [1.0, 2.0], {}),
        ([], [], {}),
        (["a", "b"], [1.0, float("inf")], {"mask": [1, 1]}),
        (["a"], [1.0], {"mask": [1, 0]}),
        (["a"], [1.0], {"mask": [0]}),
    ],
)
def test_one_finite_weight_per_token_is_needed(tmp_path, tokens, weights, options):
    with pytest.raises(ValueError, match="need one of each per token, and finite weights where the mask is on"):
        heatmap(tokens, weights, tmp_path / "a.html", **options)
    assert not list(tmp_path.iterdir())


def test_other_endings_are_refused(tmp_path):
    history = [{"step": 1, "reward": 0.5}]
    for write in (lambda path: heatmap(["a"], [1.0], path), lambda path: plot_run(history, path)):
        with pytest.raises(ValueError, match=r"a.pdf'; accepted: a name that ends in .html or .png"):
            write(tmp_path / "a.pdf")


def test_a_page_needs_no_matplotlib_and_a_picture_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert heatmap(["\ud800"], [1.0], tmp_path / "a.html").is_file()
    history, path = [{"step": 1, "reward": 0.5}], tmp_path / "a.png"
    for use in (ReportCallback, lambda: plot_run(history, path), lambda: heatmap(["a"], [1.0], path)):
        with pytest.raises(ImportError, match=r'pip install "trl-lambda\[plots\]"'):
            use()
