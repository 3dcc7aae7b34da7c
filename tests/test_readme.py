"""README: its snippet runs, its commands exist, its versions are those that the package says it was tested on."""

import re
import subprocess
import sys
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


def test_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert {"demo", "test", "setup"} <= targets
    assert set(re.findall(r"`make ([a-z]+)", README)) <= targets
    assert re.findall(r"^make ([a-z]+)", README, re.MULTILINE) == ["demo", "test"]


def test_versions():
    row = re.search(r"^\| TRL \| (.*?) \(", README, re.MULTILINE).group(1)
    assert tuple(row.split(", ")) == TESTED_VERSIONS
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in ("trl", "torch"):
        requirement = re.search(rf'"{name}(.*?)"', declared[declared.index("dependencies") :]).group(1)
        assert f"`{requirement}`" in README


def test_every_logged_metric_is_defined():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "trl_lambda").glob("*.py"))
    logged = set(re.findall(r'"((?:advantage|clipped|lambda|length_weight|token_weight)/[a-z_]+)"', source))
    assert len(logged) == 17
    for name in logged:
        prefix, leaf = name.split("/")
        assert f"`{name}`" in README or (f"`{prefix}/" in README and f"`/{leaf}`" in README), name


def test_the_matrix_was_written_by_its_command():
    block = re.search(r"<!-- matrix: begin -->\n(.*?)<!-- matrix: end -->", README, re.DOTALL).group(1)
    assert block.startswith("| f | v × surrogate × cut |") and "| TRL bnpo |" in block
