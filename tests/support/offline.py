"""Settings of every test process: nothing may reach a hub, and one order of summation."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # prepared completions come in by way of `rollout_func`

import torch

# Models this small run faster on one thread.
torch.set_num_threads(1)
