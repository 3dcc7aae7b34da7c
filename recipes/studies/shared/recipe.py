"""A recipe trained by its own command, in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.studies.shared.machine import ROOT


def train_recipe(
    command: Sequence[str], options: Sequence[str] = (), *, pythonpath: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """
    Train with one thread, without a hub and without a picture.

    Args:
        command (`Sequence[str]`): the script and its arguments, as in `["recipes/train.py", "--config", FILE]`.
        options (`Sequence[str]`): more arguments.
        pythonpath (`Sequence[str]`): folders that come before the repository.

    Returns:
        `list[dict]`: the log history.

    Raises:
        RuntimeError: the command failed. The message has the end of what it wrote.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    folders = [*pythonpath, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--output_dir", folder, "--plot", "false", "--disable_tqdm", "true"]
        run = [sys.executable, *command, *quiet, *options]
        done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(run[1:])}:\n{done.stderr[-6000:]}")
        return json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
