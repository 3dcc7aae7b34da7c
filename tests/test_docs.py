"""README and pages: built without a warning, no dead link, every public name and metric, code that runs."""

import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import FunctionType

import combinations
import pytest
import torch
from accelerate import Accelerator
from documents import MORE_PAGES, PAGES, REPOSITORY, ROOT, anchors, fences, links, name
from launch import HANG

import trl_lambda
import trl_lambda.report
import trl_lambda.weights
from trl_lambda.generation_batch import GenerationBatch
from trl_lambda.lambda_parameter import LambdaParameter, Regression, Target
from trl_lambda.metrics.loss_metrics import LossMetrics, lambda_metrics
from trl_lambda.scripts.grpo import LambdaGRPOScriptArguments
from trl_lambda.trl_seam.contract import TESTED_VERSIONS

DOCS, README = ROOT / "docs", ROOT / "README.md"
# Exported for the package's own rooms.
INTERNAL = {
    *("LENGTH_WEIGHTS", "SCOPES", "SIDES", "TOKEN_WEIGHTS", "groups_with_signal", "probabilities", "main"),
    *("require_matplotlib", "sequence_mean_weights", "weight_from_name"),
}


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="trl_lambda.LambdaGRPOConfig"' in page and "*optional*" not in page
    fetched = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', page)
    assert not fetched, "a reader without a network would miss these"


def test_the_picture_shows_the_formulas(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import pictures

    _, softmax, tokens = pictures.draw().axes
    assert all(sum(line.get_ydata()) == pytest.approx(8, rel=1e-5) for line in softmax.lines)  # f of a group, its size
    assert (min(tokens.lines[0].get_ydata()), max(tokens.lines[0].get_ydata())) == pytest.approx((1.0, 1.4))  # v


@pytest.mark.parametrize("path", [*PAGES, *MORE_PAGES], ids=name)
def test_no_internal_link_is_dead(path: Path):
    for link in links(path):
        target, _, anchor = link.partition("#")
        raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com")
        inside = re.match(rf"(?:{REPOSITORY}/(?:blob|tree)|{raw})/main/(.*)", target)
        if inside:
            file = ROOT / inside[1]
        elif "://" in target:
            continue
        else:
            file = path.parent / target if target else path
        assert file.exists(), f"{name(path)} links to {link}"
        if anchor:
            assert anchor in anchors(file), f"{name(path)} links to {link}: {sorted(anchors(file))}"


def test_every_public_name_has_a_docstring_and_is_on_the_page_of_the_api():
    shown = re.findall(r"^::: ([\w.]+)$", read("api.md"), re.MULTILINE)
    modules = (trl_lambda, trl_lambda.weights, trl_lambda.report)
    public = {n: getattr(module, n) for module in modules for n in module.__all__ if n not in INTERNAL}
    assert {path.rpartition(".")[2] for path in shown} == {*public, "LambdaGRPOScriptArguments"}
    for label, thing in public.items():
        assert inspect.getdoc(thing), label
        for key, member in vars(thing).items() if inspect.isclass(thing) else ():
            if isinstance(member, FunctionType | property) and not key.startswith("_"):
                assert inspect.getdoc(getattr(thing, key)), f"{label}.{key}"


def test_every_field_of_the_configuration_is_documented():
    config = trl_lambda.LambdaGRPOConfig
    own = [key for key in config.__annotations__ if key not in config.__mro__[1].__dataclass_fields__]
    assert own and all(re.search(rf"^\s*{key} \(`", inspect.getdoc(config), re.MULTILINE) for key in own)
    script = LambdaGRPOScriptArguments.__dataclass_fields__
    assert all(script[key].metadata["help"] for key in LambdaGRPOScriptArguments.__annotations__)


def logged_names() -> set[str]:
    lengths = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]], dtype=torch.int32)
    advantages = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1]])
    statistics = {key: -torch.rand(2, 4) for key in ("mean_logp", "min_logp", "rewards")}
    batch = GenerationBatch(torch.arange(8), lengths, lengths.sum().double(), advantages, statistics)
    places, mask, f = torch.arange(8), torch.ones(8, 4), torch.ones(2, 4)
    metrics = LossMetrics()
    metrics.add_generation_batch(batch)
    metrics.add_length_weights(f, batch, has_factor=True)
    metrics.add_tokens(batch, places, f, advantages.view(8, 1), -mask, mask, mask, (1.0, 1.4))
    names = set(metrics.flush(Accelerator(cpu=True)))
    features, cpu = ("length", "mean_logp", "min_logp"), torch.device("cpu")
    for learning in (Regression(features, 2.0, "positive"), Target(2.0, 1, "positive", (-3.0, 3.0))):
        learning.observe(batch, 2.5)
        names |= set(lambda_metrics(LambdaParameter(0.0, learning, bounds=None, device=cpu, features=features)))
    return names


def test_every_logged_metric_is_on_its_page():
    cells = "\n".join(re.findall(r"^\| (`.*?) \| ", read("metrics.md"), re.MULTILINE))
    on_page = set(re.findall(r"`([\w/]+)`", cells))
    logged = logged_names()
    assert len(logged) > 30 and not logged - on_page
    rooms = {key.partition("/")[0] for key in logged}
    assert not {key for key in on_page if key.partition("/")[0] in rooms} - logged, "these are gone"


CODE = [path for path in PAGES if path.parent == DOCS and fences(path, "python")]


@pytest.mark.parametrize("path", CODE, ids=name)
def test_the_code_of_a_page_runs_from_top_to_bottom(path: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")  # as from the root of the repository, with its output here
    code = "\n".join(fences(path, "python"))
    # TRL's default precision needs a GPU, and a model of a hub a network. Nothing else is replaced.
    if "use_cpu" not in code:
        code = re.sub(r'(GRPOConfig\(\s*"out")', r"\1, use_cpu=True, bf16=False", code)
    code = re.sub(r'model="[\w.-]+/[\w.-]+"', 'model="recipes/playground/base_model"', code)
    exec(compile(code, path.name, "exec"), {})


def test_the_table_of_legal_combinations_is_the_codes():
    written = read("choosing.md").partition(combinations.BEGIN)[2].partition(combinations.END)[0]
    assert written == combinations.table() and "yes" in written and "–" in written
    for length_weight in (*trl_lambda.weights.LENGTH_WEIGHTS, None):
        assert combinations.is_legal(length_weight=length_weight, **combinations.OF_ALL)


STUDIES = ("arena/README.md", "arena/first_round.md", "tokens/README.md", "smollm2/README.md")


def test_the_answers_of_the_study_stand_in_its_tables():
    """Every interval on the page of evidence is one of the studies' own tables or of their text."""
    studies = [ROOT / "recipes" / "studies" / path for path in STUDIES]
    text = "\n".join(path.read_text(encoding="utf-8") for path in studies)
    quoted = re.findall(r"[+-][\d.]+ (?:points )?(\[[+-][\d.]+, [+-][\d.]+\])", read("evidence.md"))
    assert len(quoted) >= 8
    assert not [interval for interval in quoted if interval not in text]


def test_the_snippet_runs(tmp_path):
    (snippet,) = fences(README, "python")
    assert len(snippet.splitlines()) <= 13
    assert snippet in fences(DOCS / "index.md", "python")
    model = f"model={str(ROOT / 'recipes/playground/base_model')!r}"
    code, replaced = re.subn(r'model="[\w.-]+/[\w.-]+"', model, snippet)
    assert replaced == 1
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r})\n{code}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^λ = -?0\.\d{4}$", done.stdout, re.MULTILINE)


def test_it_links_to_the_pages():
    """All but the reference pages, which the site's menu has."""
    linked = {link.partition("#")[0].rpartition("/")[2] for link in links(README)}
    pages = {path.name for path in DOCS.glob("*.md")}
    assert pages - linked <= {"index.md", "api.md", "engines.md", "cost.md", "length-target.md", "your-own.md"}


def test_versions():
    page = (DOCS / "verification.md").read_text(encoding="utf-8")
    row = re.search(r"^\| TRL \| (.*?) \|", page, re.MULTILINE).group(1)
    assert tuple(row.split(", ")) == TESTED_VERSIONS
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floors = {re.match(r"[a-z]+", text).group(): text for text in declared["dependencies"]}
    for library in ("trl", "transformers", "accelerate", "datasets", "torch"):
        (row,) = re.findall(rf"^\| {library} \| (.*)$", page, re.MULTILINE | re.IGNORECASE)
        assert row.endswith(f"| `{floors[library].removeprefix(library)}` |")
    (row,) = re.findall(r"^\| Python \| (3.*)$", page, re.MULTILINE)
    versions = {text.rpartition(" ")[2] for text in declared["classifiers"] if "Python :: 3." in text}
    assert set(re.findall(r"3\.\d+", row)) == versions
