"""One completion's tokens coloured by weight: HTML and PNG."""

import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from trl_lambda.report import heatmap
from trl_lambda.report.token_heatmap import shade

TOKENS = ["Add", " 47", " and", " $8", "6$:", "\n", "47", "+86", "=", "<b>133", ".\n\n", "wörd", " ", "\t"]
WEIGHTS = [1.0 + 0.4 * i / (len(TOKENS) - 1) for i in range(len(TOKENS))]


def spans(page: str) -> list[tuple[str, str, str, str]]:
    return re.findall(
        r'<span style="background:(#\w+);color:(#\w+)" title="([\d.e+-]+)">(.*?)</span>', page, re.DOTALL
    )


def grey(color: str) -> float:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_the_ramp_grows_darker_all_the_way():
    values = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in map(shade, np.linspace(0, 1, 101))]
    assert all(a - b > 0.5 for a, b in zip(values, values[1:], strict=False))
    assert values[0] > 240 and values[-1] < 60


def test_the_page_shows_each_token_on_its_ground(tmp_path):
    path = heatmap(TOKENS, torch.tensor(WEIGHTS), tmp_path / "new" / "a.html", title="x < y", label="v (no unit)")
    page = path.read_text(encoding="utf-8")
    shown = spans(page)
    assert [text for *_, text in shown][:6] == ["Add", " 47", " and", " $8", "6$:", "↵\n"]
    assert shown[9][3] == "&lt;b&gt;133" and shown[-1][3] == "→" and "<h1>x &lt; y</h1>" in page
    lightness = [grey(ground) for ground, *_ in shown]
    assert lightness == sorted(lightness, reverse=True) and lightness[0] - lightness[-1] > 150
    assert [float(title) for *_, title, _ in shown] == pytest.approx(WEIGHTS, abs=1e-3)
    assert re.search(r'<div class="ends"><span>1</span><span>v \(no unit\)</span><span>1.4</span>', page)
    assert "http" not in page and "src=" not in page  # nothing is fetched


def test_the_text_reads_on_every_ground(tmp_path):
    """WCAG contrast of at least 4.5 : 1."""

    def luminance(color: str) -> float:
        channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    page = heatmap(["a"] * 200, torch.linspace(0, 1, 200), tmp_path / "a.html").read_text(encoding="utf-8")
    for ground, ink, *_ in spans(page):
        light, dark = sorted((luminance(ground), luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    seen = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k))[1])
    return seen


def test_the_picture_shows_each_token_on_its_ground(tmp_path, figures):
    path = heatmap(TOKENS, WEIGHTS, tmp_path / "new" / "a.png", title="a $tidy title$", label="v (no unit)")
    assert path.read_bytes().startswith(b"\x89PNG")
    axes, bar = figures[0].axes
    assert bar.get_xlabel() == "v (no unit)" and [tick.get_text() for tick in bar.get_xticklabels()] == [
        "1",
        "1.2",
        "1.4",
    ]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["Add", " 47", " and", " $8", "6$:", "↵", "47", "+86", "=", "<b>133", ".↵", "↵", "wörd", " ", "→"]
    boxes = [(patch.get_x(), patch.get_y(), patch.get_width()) for patch in axes.patches]
    lines = [int(y) for _, y, _ in boxes]
    assert lines == [0] * 6 + [1] * 5 + [2] + [3] * 3
    for i in range(1, len(boxes)):  # side by side, no gap and no overlap
        expected = boxes[i - 1][0] + boxes[i - 1][2] if lines[i] == lines[i - 1] else 0
        assert boxes[i][0] == expected
    darkness = [sum(patch.get_facecolor()[:3]) for patch in axes.patches]
    assert darkness == sorted(darkness, reverse=True)
    assert not any(text.get_parse_math() for text in [*axes.texts, *figures[0].texts])  # a $ is a $
    renderer = figures[0].canvas.get_renderer()
    for text, patch in zip(axes.texts, axes.patches, strict=True):
        inside, box = text.get_window_extent(renderer), patch.get_window_extent(renderer)
        assert box.x0 - 1 <= inside.x0 and inside.x1 <= box.x1 + 1, text.get_text()


@pytest.mark.filterwarnings("ignore:Glyph")
def test_lines_are_broken_between_tokens_and_within_only_one_that_is_longer(tmp_path, figures):
    # matplotlib has no glyph for the last one, and says so
    tokens = ["x" * 60, "y" * 40, "z" * 200, "字" * 30]
    heatmap(tokens, [1.0, 2.0, 3.0, 4.0], tmp_path / "a.png")
    axes = figures[0].axes[0]
    assert [len(text.get_text()) for text in axes.texts] == [60, 40, 48, 88, 64, 30]  # 30 wide characters
    assert max(patch.get_x() + patch.get_width() for patch in axes.patches) <= 88


@pytest.mark.parametrize("name", ["a.png", "a.html"])
def test_equal_weights_have_one_colour_and_limits_make_pictures_compare(tmp_path, name):
    heatmap("abc", [0.7] * 3, tmp_path / name)
    if name.endswith("html"):
        page = (tmp_path / name).read_text(encoding="utf-8")
        assert {ground for ground, *_ in spans(page)} == {"#{:02x}{:02x}{:02x}".format(*shade(0.5))}
        page = heatmap("abc", [0.5, 1.0, 9.0], tmp_path / name, limits=(0.0, 2.0)).read_text(encoding="utf-8")
        expected = ["#{:02x}{:02x}{:02x}".format(*shade(x)) for x in (0.25, 0.5, 1.0)]
        assert [ground for ground, *_ in spans(page)] == expected
    else:
        with Image.open(tmp_path / name) as image:
            assert image.size[0] > 400


OWN = [1, 1, 0, 0, 0, 1]
TRAJECTORY = ["[a]", "<eos>", "(", "</span><script>alert(1)</script>", ")=", "7"]


def test_the_page_greys_what_is_not_the_policys_own(tmp_path):
    """Their weights, whatever they are, take no part in the colours either."""
    weights = [1.0, 1.2, float("nan"), 99.0, -99.0, 1.4]
    page = heatmap(TRAJECTORY, weights, tmp_path / "a.html", mask=torch.tensor(OWN)).read_text(encoding="utf-8")
    assert [text for *_, text in spans(page)] == ["[a]", "&lt;eos&gt;", "7"]
    unmasked = heatmap(["[a]", "<eos>", "7"], [1.0, 1.2, 1.4], tmp_path / "b.html").read_text(encoding="utf-8")
    assert spans(page) == spans(unmasked)
    others = re.findall(r'<span class="other">(.*?)</span>', page)
    assert others[:3] == ["(", "&lt;/span&gt;&lt;script&gt;alert(1)&lt;/script&gt;", ")="]
    assert others[3:] == ["grey: not the policy&#x27;s own"] and "not the policy" not in unmasked
    everything = re.findall(r"<span [^>]*>(.*?)</span>", page.partition("<p class")[2].partition("</p>")[0])
    assert len(everything) == len(TRAJECTORY) and everything[3] == others[1]  # in their order
    assert "<script" not in page


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "</p></body></html><svg/onload=alert(1)>",
    "&lt;script&gt;",
    "\x00<b>\x1b[31m",
    "{title}{0}",
    "<!--",
]


@pytest.mark.parametrize("mask", [0, 1])
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_a_tool_answers_stays_text(tmp_path, attack, mask):
    """As a greyed token, as a token of the policy, as title and as label."""
    path = heatmap(["a", attack], [1.0, 1.2], tmp_path / "a.html", mask=[1, mask], title=attack, label=attack)
    harmless = heatmap(["a", "b"], [1.0, 1.2], tmp_path / "b.html", mask=[1, mask], title="b", label="b")

    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.seen, self.text = [], ""

        def handle_starttag(self, tag, attributes):
            self.seen.append((tag, [name for name, _ in attributes]))

        def handle_data(self, data):
            self.text += data

    parsers = []
    for page in (path, harmless):
        parsers.append(Tags())
        parsers[-1].feed(page.read_text(encoding="utf-8"))
    assert parsers[0].seen == parsers[1].seen
    assert parsers[0].text.count("alert(1)") == 4 * attack.count("alert(1)")  # title twice, token, label


def test_the_picture_greys_what_is_not_the_policys_own(tmp_path, figures):
    heatmap(TRAJECTORY, [1.0, 1.2, 5.0, 5.0, 5.0, 1.4], tmp_path / "a.png", mask=OWN, title="t")
    axes, bar = figures[0].axes
    assert [patch.get_hatch() is not None for patch in axes.patches] == [not own for own in OWN]
    assert [tick.get_text() for tick in bar.get_xticklabels()] == ["1", "1.2", "1.4"]
    key = [text.get_text() for text in figures[0].texts]
    assert key == ["grey: not the policy's own", "t"]
    renderer = figures[0].canvas.get_renderer()
    edge = figures[0].texts[0].get_window_extent(renderer).x1
    assert edge <= figures[0].get_window_extent().x1
    ground = bar.get_window_extent(renderer)
    assert figures[0].artists[0].get_window_extent(renderer).x0 > ground.x1  # beside the bar, not on it


@pytest.mark.parametrize(
    ("tokens", "weights", "name", "options", "message"),
    [
        (["a"], [1.0, 2.0], "a.png", {}, "weights has 2 entries for 1 tokens"),
        ([], [], "a.png", {}, "weights has 0 entries for 0 tokens"),
        (["a"], [float("nan")], "a.html", {}, "not finite"),
        (["a"], [1.0], "a.pdf", {}, r"accepted: a name that ends in .html or .png"),
        (["a"], [1.0], "a.html", {"mask": [1, 0]}, "mask has 2 entries for 1 tokens"),
        (["a"], [1.0], "a.html", {"mask": [0]}, "mask is off everywhere"),
        (["a"], [1.0], "a.html", {"mask": ["x"]}, "mask must be one number for each"),
        (["a", "b"], [1.0, float("inf")], "a.html", {"mask": [1, 1]}, "not finite"),
        (["a"], [1.0], "a.png", {"limits": (2.0, 1.0)}, r"limits=\(2.0, 1.0\) must be \(low, high\)"),
        (["\n"] * 2001, [1.0] * 2001, "a.png", {}, "a PNG holds 2000; write .html instead"),
        (None, [1.0], "a.html", {}, "tokens has None; accepted: the text of each token"),
        ([17], [1.0], "a.html", {}, "tokens has 17; accepted: the text of each token"),
        (b"a", [1.0], "a.html", {}, "tokens has 97; accepted: the text of each token"),
        (["a"], None, "a.html", {}, "weights must be one number for each"),
        (["a"], [None], "a.html", {}, "weights must be one number for each"),
        (["a"], torch.ones(1, 1), "a.html", {}, "weights must be one number for each"),
        (["a"], torch.tensor(1.0), "a.html", {}, "weights must be one number for each"),
        (["a"], [1j], "a.html", {}, "weights must be one number for each"),
        (["a"], ["x"], "a.html", {}, "weights must be one number for each"),
        (["a"], [10**400], "a.html", {}, "weights has an entry that is not finite"),
        (["a"], [1.0], "a.html", {"limits": (1.0,)}, r"limits=\(1.0,\) must be \(low, high\)"),
        (["a"], [1.0], "a.html", {"limits": 1.0}, "limits must be one number for each"),
        (["a"], [1.0], "a.html", {"limits": (None, 1.0)}, "limits must be one number for each"),
        (["a"], [1.0], "a.html", {"limits": (0.0, float("inf"))}, "limits has an entry that is not finite"),
        (["a"], [1.0], "a", {}, "accepted: a name that ends in .html or .png"),
    ],
)
def test_refusals(tmp_path, tokens, weights, name, options, message):
    with pytest.raises(ValueError, match=message):
        heatmap(tokens, weights, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_none_is_refused():
    with pytest.raises(ValueError, match="path is None; accepted: a name that ends in .html or .png"):
        heatmap(["a"], [1.0], None)


@pytest.mark.parametrize("name", ["a.htm", "a.png"])
def test_tokens_that_utf_8_cannot_hold_and_weights_at_the_ends_of_what_a_float_holds(tmp_path, name):
    path = heatmap(["\ud800", "b", "c"], [-1.5e308, 0.0, 1.5e308], tmp_path / name, title="\udfff", label="\ud801")
    if name == "a.htm":
        page = path.read_text(encoding="utf-8")
        expected = ["#{:02x}{:02x}{:02x}".format(*shade(x)) for x in (0.0, 0.5, 1.0)]
        assert [ground for ground, *_ in spans(page)] == expected and spans(page)[0][3] == "\\ud800"


def test_a_page_needs_no_matplotlib_and_a_picture_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert heatmap(["a"], [1.0], tmp_path / "a.html").is_file()
    with pytest.raises(ImportError, match=r'pip install "trl-lambda\[plots\]"'):
        heatmap(["a"], [1.0], tmp_path / "a.png")
