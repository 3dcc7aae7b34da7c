"""README: its snippet runs and is the start page's, it links to every page, and the versions are those of the code."""

import re
import subprocess
import sys
import tomllib

from documents import ROOT, fences, links
from launch import HANG

from trl_lambda.trl_seam.contract import TESTED_VERSIONS

README = ROOT / "README.md"


def test_the_snippet_runs(tmp_path):
    (snippet,) = fences(README, "python")
    assert len(snippet.splitlines()) <= 13
    assert snippet in fences(ROOT / "docs" / "index.md", "python")
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
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages - linked <= {"index.md", "api.md", "engines.md", "cost.md", "length-target.md", "your-own.md"}


def test_versions():
    page = (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")
    row = re.search(r"^\| TRL \| (.*?) \|", page, re.MULTILINE).group(1)
    assert tuple(row.split(", ")) == TESTED_VERSIONS
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floors = {re.match(r"[a-z]+", text).group(): text for text in declared["dependencies"]}
    for name in ("trl", "transformers", "accelerate", "datasets", "torch"):
        (row,) = re.findall(rf"^\| {name} \| (.*)$", page, re.MULTILINE | re.IGNORECASE)
        assert row.endswith(f"| `{floors[name].removeprefix(name)}` |")
    (row,) = re.findall(r"^\| Python \| (3.*)$", page, re.MULTILINE)
    versions = {text.rpartition(" ")[2] for text in declared["classifiers"] if "Python :: 3." in text}
    assert set(re.findall(r"3\.\d+", row)) == versions
