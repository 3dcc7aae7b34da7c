"""The studies are apart: nothing that a user launches imports one."""

import re

from recipes.studies.shared.machine import ROOT


def test_nothing_outside_the_studies_imports_one():
    files = [*(ROOT / "trl_lambda").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    outside = [path for path in files if "studies" not in path.parts]
    assert outside and not [path for path in outside if re.search(r"(from|import) recipes\.studies", path.read_text())]
