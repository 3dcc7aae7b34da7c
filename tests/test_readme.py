"""README: its snippet runs, and its versions are those that the package says it was tested on."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from launch import HANG

from trl_lambda.trl_seam.contract import TESTED_VERSIONS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_snippet_runs(tmp_path):
    snippet = re.search(r"<!-- snippet.*?-->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len(snippet.splitlines()) <= 13
    snippet = snippet.replace('"runs/snippet"', repr(str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^λ = -?0\.\d{4}$", done.stdout, re.MULTILINE)


def test_the_two_names_of_the_swap_are_imported_from_the_package():
    added = re.search(r"^\+(from trl_lambda .*)$", README, re.MULTILINE).group(1)
    namespace = {}
    exec(added, namespace)
    removed = re.search(r"^-from trl import (.*)$", README, re.MULTILINE).group(1)
    assert set(removed.split(", ")) <= namespace.keys()


def test_versions():
    row = re.search(r"^\| TRL \| (.*?) \(", README, re.MULTILINE).group(1)
    assert tuple(row.split(", ")) == TESTED_VERSIONS
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floors = {re.match(r"[a-z]+", text).group(): text for text in declared["dependencies"]}
    for name in ("trl", "transformers", "accelerate", "datasets", "torch"):
        (row,) = re.findall(rf"^\| {name} \| (.*)$", README, re.MULTILINE | re.IGNORECASE)
        assert row.endswith(f"| `{floors[name].removeprefix(name)}` |")
    (row,) = re.findall(r"^\| Python \| (.*)$", README, re.MULTILINE)
    versions = {text.rpartition(" ")[2] for text in declared["classifiers"] if "Python :: 3." in text}
    assert set(re.findall(r"3\.\d+", row)) == versions


def test_it_is_one_screen_and_every_page_has_its_line():
    before, _, after = README.partition("## Read on")
    assert len(before.splitlines()) <= 85
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert set(re.findall(r"^\| \[[^\]]+\]\(docs/([a-z-]+\.md)\) \|", after, re.MULTILINE)) == pages
