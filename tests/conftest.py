"""Tests run offline: nothing may reach a hub."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # prepared completions come in by way of `rollout_func`

import pytest
import torch
from support import build_model, build_tokenizer

# Models this small run faster on one thread, and with one order of summation.
torch.set_num_threads(1)
# `Trainer` collects garbage before each run, a fifth of a second over everything that the imports have left.
gc.freeze()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder with a tiny Qwen2 model and its tokenizer, laid out as on a hub."""
    folder = tmp_path_factory.mktemp("model")
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)
