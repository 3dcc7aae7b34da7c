"""Tests run offline: nothing may reach a hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # prepared completions come in by way of `rollout_func`

import warnings

import pytest
import torch
from support import build_model, build_tokenizer

# Models this small run faster on one thread, and with one order of summation.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder with a tiny Qwen2 model and its tokenizer, laid out as on a hub."""
    folder = tmp_path_factory.mktemp("model")
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _quiet():
    """TRL's own advice about option pairs that the tests combine on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        yield
