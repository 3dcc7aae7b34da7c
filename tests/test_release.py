"""Wheel and sdist: what is in them, and that a user without a checkout can train, draw and launch with the wheel."""

import re
import zipfile
from pathlib import Path

import pytest
import release
import yaml

import trl_lambda

ROOT = Path(__file__).parent.parent
PROJECT = release.PROJECT


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    return release.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def printed(built, tmp_path_factory) -> dict[str, str]:
    bin_folder = release.clean_environment(tmp_path_factory.mktemp("env"), built[0])
    return release.use(bin_folder, tmp_path_factory.mktemp("empty"))


def test_the_wheel_holds_the_package_and_nothing_else(built):
    wheel, sdist = built
    version = trl_lambda.__version__
    assert wheel.name == f"trl_lambda-{version}-py3-none-any.whl" and sdist.name == f"trl_lambda-{version}.tar.gz"
    tracked = release.run("git", "ls-files", "trl_lambda", cwd=ROOT).split()
    held = {name for name in release.names(wheel) if not name.startswith(f"trl_lambda-{version}.dist-info/")}
    assert held == set(tracked) and "trl_lambda/py.typed" in held
    assert {*tracked, "LICENSE", "README.md", "pyproject.toml"} <= release.names(sdist)


def test_the_links_of_the_description_hold_on_a_package_index(built):
    metadata = f"trl_lambda-{trl_lambda.__version__}.dist-info/METADATA"
    links = re.findall(r"\]\(([^)]*)\)", zipfile.ZipFile(built[0]).read(metadata).decode())
    assert links and all(link.startswith(("https://", "#")) for link in links)


def test_a_user_without_a_checkout_trains_draws_and_launches(printed):
    assert str(ROOT) not in printed["where"] and "site-packages/trl_lambda/__init__.py" in printed["where"]
    assert printed["version"] == f"trl-lambda {trl_lambda.__version__}\n"
    for name in ("train", "launch"):  # one process; two
        assert printed[name].count("Summary of 2 optimizer steps") == 1
    assert "out/report.html" in printed["report"]


def test_the_version_stands_in_one_place_and_citation_and_changelog_follow_it():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == trl_lambda.__version__ and citation["license"] == PROJECT["license"]
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line[:3] == "## "]
    assert headings[0] == f"## {trl_lambda.__version__}"
