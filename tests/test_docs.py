"""The pages: built without a warning, no dead link, every public name, code that runs, figures of the arena."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import MORE_PAGES, PAGES, REPOSITORY, ROOT, anchors, fences, links, name

import trl_lambda
import trl_lambda.report
import trl_lambda.training
import trl_lambda.weights

DOCS = ROOT / "docs"
# What is exported beside the public names, for the package's own rooms.
INTERNAL = {
    "LEARNABLE_AGGREGATIONS", "LENGTH_AGGREGATIONS", "SCOPES", "TOKEN_REGULATIONS", "SIDES", "make_length_weight",
    "make_token_weight", "sequence_mean_weights", "main", "require_matplotlib", "FEATURES", "Power",
}  # fmt: skip


def run(*command: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run([str(x) for x in command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_site_is_built_without_a_warning(tmp_path):
    done = run(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert {path.parent.name for path in tmp_path.glob("*/index.html")} == pages
    page = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="trl_lambda.LambdaGRPOConfig"' in page and "*optional*" not in page
    fetched = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', page)
    assert not fetched, "a reader without a network would miss these"


def test_the_pictures_are_drawn(tmp_path):
    done = run(sys.executable, "docs/pictures.py", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"f_and_v.png"} <= {path.name for path in (DOCS / "images").iterdir()}
    assert all((tmp_path / picture).read_bytes().startswith(b"\x89PNG") for picture in drawn)


def test_the_picture_shows_what_its_labels_say():
    """λ = -1 gives every response the same weight times length, λ = 0 is 1 everywhere, v runs from 1 to 1.4."""
    sys.path.insert(0, str(DOCS))
    try:
        import pictures
    finally:
        sys.path.remove(str(DOCS))
    left, right = pictures.draw().axes
    curves = {line.get_linestyle(): line for line in right.lines[:2]}
    by_label = dict(zip([text.get_text() for text in left.texts], left.lines, strict=True))
    lengths, weights = by_label["λ = -1: GRPO"].get_data()
    assert max(lengths * weights) == pytest.approx(min(lengths * weights), rel=1e-5)
    assert set(by_label["λ = 0: DAPO"].get_ydata()) == {1.0}
    sigmoid = curves["-"].get_ydata()
    assert (min(sigmoid), max(sigmoid)) == pytest.approx((1.0, 1.4))


# ---- Links ----


@pytest.mark.parametrize("path", [*PAGES, *MORE_PAGES], ids=name)
def test_no_internal_link_is_dead(path: Path):
    for link in links(path):
        target, _, anchor = link.partition("#")
        if target.startswith(f"{REPOSITORY}/blob/main/"):
            file = ROOT / target.removeprefix(f"{REPOSITORY}/blob/main/")
        elif "://" in target:
            continue
        else:
            file = path.parent / target if target else path
        assert file.exists(), f"{name(path)} links to {link}"
        if anchor:
            assert anchor in anchors(file), f"{name(path)} links to {link}: {sorted(anchors(file))}"


def test_the_pages_of_the_site_link_to_no_file_outside_it():
    """Such a link works in a checkout and is dead on the site."""
    for path in DOCS.glob("*.md"):
        for link in links(path):
            assert "://" in link or (DOCS / link.partition("#")[0]).resolve().is_relative_to(DOCS), (path.name, link)


# ---- Public names ----


def public_names() -> set[str]:
    modules = (trl_lambda, trl_lambda.weights, trl_lambda.report)
    return {n for module in modules for n in module.__all__} - INTERNAL


def test_every_public_name_is_on_the_page_of_the_api():
    shown = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {path.rpartition(".")[2] for path in shown} - {"LambdaGRPOScriptArguments"} == public_names()


def undocumented(thing: object, label: str) -> list[str]:
    """Names without a docstring: the thing's, and those of its own public methods."""
    missing = [] if (inspect.getdoc(thing) or "").strip() else [label]
    if inspect.isclass(thing):
        for key, member in vars(thing).items():
            is_method = inspect.isfunction(member) or isinstance(member, property)
            if is_method and not key.startswith("_") and not inspect.getdoc(getattr(thing, key)):
                missing.append(f"{label}.{key}")
    return missing


def test_every_public_name_has_a_docstring():
    modules = (trl_lambda, trl_lambda.weights, trl_lambda.report)
    things = {n: getattr(module, n) for module in modules for n in module.__all__ if n not in INTERNAL}
    assert not [text for label, thing in things.items() for text in undocumented(thing, label)]

    def bare(): ...

    assert undocumented(bare, "bare") == ["bare"]


def test_every_field_of_the_configuration_is_documented():
    for config in (trl_lambda.LambdaGRPOConfig, trl_lambda.training.LambdaGRPOScriptArguments):
        own = [key for key in config.__annotations__ if key not in config.__mro__[1].__dataclass_fields__]
        text = inspect.getdoc(config)
        assert own and not [key for key in own if not re.search(rf"^\s*{key} \(`", text, re.MULTILINE)]


# ---- Code ----

CODE = [path for path in PAGES if path.parent == DOCS and fences(path, "python")]


@pytest.mark.parametrize("path", CODE, ids=name)
def test_the_code_of_a_page_runs_from_top_to_bottom(path: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")  # as from the root of the repository; output goes here
    code = "\n".join(fences(path, "python"))
    # TRL's default precision needs a GPU; nothing else is replaced.
    code = re.sub(r'(GRPOConfig\(\s*"out")', r"\1, use_cpu=True, bf16=False", code)
    exec(compile(code, path.name, "exec"), {})


# ---- Figures ----


def test_what_the_papers_did_here_stands_in_the_arenas_tables():
    arena = (ROOT / "recipes" / "arena" / "first_round.md").read_text(encoding="utf-8")
    table = arena.partition("<!-- table: accuracy -->")[2].partition("<!-- end -->")[0]
    parts = dict(re.findall(r"^\*\*(\w+)\*\*\n(.*?)(?=^\*\*|\Z)", table, re.MULTILINE | re.DOTALL))
    row = re.compile(r"^\| `([\w+.-]+)` \| \d+ \| [^|]+ \| ([^|]*?) \|", re.MULTILINE)
    rows = {task: dict(row.findall(part)) for task, part in parts.items()}
    page = " ".join((DOCS / "papers.md").read_text(encoding="utf-8").replace("\\*", "*").split())
    cell = r"([+-][\d.]+ \[[^\]]+\](?: \*)?)"
    said = re.findall(rf"`([a-z_]+)` {cell} on `running_sum`, {cell} on `slippery_chain`", page)
    assert len(said) == page.count("on `running_sum`") >= 9
    for arm, first, second in said:
        assert (first, second) == (rows["running_sum"][arm], rows["slippery_chain"][arm]), arm


@pytest.mark.parametrize("page", ["verification.md", "cost.md"])
def test_machine_written_tables_are_where_their_commands_write(page: str):
    kind = {"verification.md": "matrix", "cost.md": "bench"}[page]
    text = (DOCS / page).read_text(encoding="utf-8")
    block = re.search(rf"<!-- {kind}: begin -->\n(.*?)<!-- {kind}: end -->", text, re.DOTALL).group(1)
    assert block.count("\n|") > 5
    assert f"docs/{page}" in (ROOT / "Makefile").read_text(encoding="utf-8")
