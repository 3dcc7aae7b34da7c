"""TRL's own GRPO script, the installed one, trains with this package once the two class names are replaced."""

import json
import re
import subprocess
import sys
from pathlib import Path

import trl

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(trl.__file__).parent / "scripts" / "grpo.py"
ARGUMENTS = """
    --model_name_or_path recipes/playground/base_model --dataset_name recipes/playground/data/running_sum
    --reward_funcs recipes.playground.rewards.exact_answer --use_cpu --bf16 false --max_steps 2
    --per_device_train_batch_size 16 --num_generations 8 --max_completion_length 48 --learning_rate 1e-4
    --gradient_checkpointing false --logging_steps 1 --save_strategy no --report_to none --lambda_init 0.25
""".split()


def swapped(text: str) -> str:
    """The script with both classes taken from `trl_lambda`: their imports, and their names where they are used."""
    for old in ("GRPOTrainer", "GRPOConfig"):
        line = re.search(rf"^( *)from trl import .*\b{old}\b.*$", text, flags=re.MULTILINE)
        assert line, f"TRL's script no longer imports {old} on a line of its own"
        others = re.sub(rf"\b{old}\b(, )?", "", line[0]).rstrip(", ")
        text = text.replace(line[0], f"{line[1]}from trl_lambda import Lambda{old}\n{others}")
        text = re.sub(rf"\b{old}\b", f"Lambda{old}", text)
    return text


def test_trls_script_trains_with_the_swapped_classes(tmp_path):
    before, after = SCRIPT.read_text(), swapped(SCRIPT.read_text())
    assert (
        len(after.splitlines()) == len(before.splitlines()) + 2 and after.count("Lambda") == before.count("Lambda") + 4
    )
    (tmp_path / "grpo.py").write_text(after)
    command = [sys.executable, str(tmp_path / "grpo.py"), *ARGUMENTS, "--output_dir", str(tmp_path / "output")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    said = process.stdout + process.stderr
    assert "Training completed" in process.stdout  # TRL's own last lines
    assert len(re.findall(r"'lambda/value': '?-?[\d.e-]+", said)) == 2 and "'length_weight/ess'" in said
    content = json.loads((tmp_path / "output" / "lambda.json").read_text())
    assert content["global_step"] == 2 and content["settings"]["length_weight"] == "lambda_grpo"
    # λ started from the option that only the swapped configuration has, and was trained.
    assert content["lambda"] != 0.25 and abs(content["lambda"] - 0.25) < 0.2
