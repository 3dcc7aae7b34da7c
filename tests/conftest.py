"""Tests run offline: nothing may reach a hub."""

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tools"))  # the tests' own tools, by name

import offline  # noqa: F401
import pytest
from support import build_model, build_tokenizer

# `Trainer` collects garbage before each run, a fifth of a second over everything that the imports have left.
gc.freeze()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder with a tiny Qwen2 model and its tokenizer, laid out as on a hub."""
    folder = tmp_path_factory.mktemp("model")
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)
