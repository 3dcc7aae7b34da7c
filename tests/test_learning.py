"""Half of the playground recipe: held-out accuracy rises, and λ goes to where longer answers are right more often."""

import json
import subprocess
import sys
from pathlib import Path

from launch import HANG

ROOT = Path(__file__).parent.parent


def test_the_playground_learns_and_lambda_ends_positive(tmp_path):
    command = [sys.executable, "recipes/train.py", "--config", "recipes/configs/playground.yaml"]
    command += ["--max_steps", "50", "--output_dir", str(tmp_path), "--plot", "false"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    before, after = (entry["eval_reward"] for entry in history if "eval_reward" in entry)
    # One sample of 512 problems has a standard error of 0.02; seeds 0 to 3 gained 0.07 to 0.2 by then.
    assert after > before + 0.05
    lambdas = [entry["lambda/value"] for entry in history if "lambda/value" in entry]
    assert len(lambdas) == 50 and 0 < lambdas[0] < 0.02
    assert lambdas[-1] > 0.08 and lambdas[-1] == json.loads((tmp_path / "lambda.json").read_text())["lambda"]
