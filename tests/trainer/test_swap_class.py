"""TRL's own GRPO script, the installed one, trains with this package once the two class names are replaced."""

import difflib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trl

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(trl.__file__).parent / "scripts" / "grpo.py"
SWAPS = {"GRPOTrainer": "LambdaGRPOTrainer", "GRPOConfig": "LambdaGRPOConfig"}
ARGUMENTS = """
    --model_name_or_path recipes/playground/base_model --dataset_name recipes/playground/data/running_sum
    --reward_funcs recipes.playground.rewards.exact_answer --use_cpu --bf16 false --max_steps 2
    --per_device_train_batch_size 16 --num_generations 8 --max_completion_length 48 --learning_rate 1e-4
    --gradient_checkpointing false --logging_steps 1 --save_strategy no --report_to none
""".split()


def swapped(text: str) -> str:
    """The script with both classes taken from `trl_lambda`: their imports, and their names where they are used."""
    for old, new in SWAPS.items():
        line = re.search(rf"^( *)from trl import .*\b{old}\b.*$", text, flags=re.MULTILINE)
        assert line, f"TRL's script no longer imports {old} on a line of its own"
        others = re.sub(rf"\b{old}\b(, )?", "", line[0]).rstrip(", ")
        text = text.replace(line[0], f"{line[1]}from trl_lambda import {new}\n{others}")
        text = re.sub(rf"\b{old}\b", new, text)
    return text


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    folder = tmp_path_factory.mktemp("swap")
    script, output_dir = folder / "grpo.py", folder / "output"
    script.write_text(swapped(SCRIPT.read_text()))
    command = [sys.executable, str(script), *ARGUMENTS, "--output_dir", str(output_dir), "--lambda_init", "0.25"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True), output_dir


def test_nothing_but_the_two_classes_differs():
    before, after = SCRIPT.read_text().splitlines(), swapped(SCRIPT.read_text()).splitlines()
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    removed = [line[2:].strip() for line in changed if line[0] == "-"]
    added = [line[2:].strip() for line in changed if line[0] == "+"]
    assert len(removed) == 4 and len(added) == 6  # two imports, each now two lines, and two uses
    assert [line for line in added if line.startswith("from trl_lambda import")] == [
        "from trl_lambda import LambdaGRPOTrainer",
        "from trl_lambda import LambdaGRPOConfig",
    ]
    assert "trainer = LambdaGRPOTrainer(" in added
    assert not any("LambdaGRPOScriptArguments" in line for line in after)


def test_trls_script_trains_with_the_swapped_classes(run):
    process, output_dir = run
    assert process.returncode == 0, process.stderr[-4000:]
    assert "Training completed" in process.stdout  # TRL's own last lines
    content = json.loads((output_dir / "lambda.json").read_text())
    assert content["global_step"] == 2 and content["settings"]["length_weight"] == "lambda_grpo"
    # λ started from the option that only the swapped configuration has, and was trained.
    assert content["lambda"] != 0.25 and abs(content["lambda"] - 0.25) < 0.2


def test_the_swapped_script_logs_the_weights(run):
    process, _ = run
    logged = re.findall(r"'lambda/value': '?(-?[\d.e-]+)", process.stdout + process.stderr)
    assert len(logged) == 2
    assert "'length_weight/ess'" in process.stdout + process.stderr
