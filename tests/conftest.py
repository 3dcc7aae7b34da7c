"""Tests run offline: nothing may reach a hub. Markers follow from a test's folder."""

import gc
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))  # the tests' own tools, by name

import offline  # noqa: F401
import pytest
from harness import build_model, build_tokenizer

# `Trainer` collects garbage before each run, a fifth of a second over everything that the imports have left.
gc.freeze()

# Tests of the package itself, by folder: `make test-package`.
PACKAGE = {"weights", "lambda_parameter", "trl_seam", "metrics", "trainer", "scripts", "report"}
# Tests whose figures another processor rounds otherwise: `make numerical`. Folders and modules.
NUMERICAL = {
    *("weights", "lambda_parameter", "metrics"),
    *("test_loss", "test_parity", "test_matrix", "test_resume"),
    *("test_subclasses", "test_tools_exact", "test_alignment"),
}


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="run one of N parts of the tests, such as 2/3, chosen by name")


def pytest_collection_modifyitems(config, items):
    part, parts = map(int, config.getoption("--part").split("/"))
    chosen = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts == part - 1]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen] if parts > 1 else [])
    items[:] = chosen
    for item in items:
        names = {item.path.parent.name, item.path.stem}
        if names & PACKAGE:
            item.add_marker(pytest.mark.package)
        if names & NUMERICAL:
            item.add_marker(pytest.mark.numerical)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder with a tiny Qwen2 model and its tokenizer, laid out as on a hub."""
    folder = tmp_path_factory.mktemp("model")
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)
