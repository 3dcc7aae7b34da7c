"""A new f or v is its class, its entry in the table and its formula in `reference.py`: all else then knows it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LENGTH_CLASS = '''
@dataclass(frozen=True)
class Root(LengthWeight):
    """f_i = (|o_i|/μ)^(λ/20), without a normaliser: no member of the package."""

    length_scale: float = field(default=1 / 9, metadata={"symbol": "r"})

    name = "root"
    formula = "(length/μ)^(λ/20)"
    source = "a test"
    has_lambda = True

    def check(self, group_size: int) -> None:
        if self.length_scale > 0.5:
            raise ValueError(f"length_scale={self.length_scale} is too large for a root.")

    def __call__(self, lengths: torch.Tensor, lam: torch.Tensor, has_tokens: torch.Tensor, dim: Any) -> torch.Tensor:
        count = has_tokens.sum(dim=dim, keepdim=True).clamp(min=1)
        mean = one_where_zero(lengths.sum(dim=dim, keepdim=True)) / count
        return (one_where_zero(lengths) / mean) ** (lam / 20)


'''
TOKEN_CLASS = '''
@dataclass(frozen=True)
class Square(TokenWeight):
    """v = α·π² + 1: no member of the package."""

    alpha: float = field(default=3.0, metadata={"symbol": "α"})

    name = "square"
    formula = "α·π² + 1"
    source = "a test"

    def check(self, prefix: str = "") -> None:
        if self.alpha > 5:
            raise ValueError(f"{prefix}alpha={self.alpha} is too large for a square.")

    def __call__(self, probs: torch.Tensor) -> torch.Tensor:
        return self.alpha * probs**2 + 1


'''
LENGTH_REFERENCE = """
            elif aggregation == "root":
                of = everyone if scope == "batch" else present
                f = (n / (math.fsum(of) / len(of))) ** (lam / 20)
"""
TOKEN_REFERENCE = """
    if regulation == "square":
        return (3.0 if alpha is None else alpha) * pi**2 + 1
"""
# Each part of the package that knows members, asked for the new ones.
CHECK = r"""
import json
from pathlib import Path

import pytest
from support import Batch, build, config

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
from trl_lambda.report import plot_run
from trl_lambda.report.folder import read_run
from trl_lambda.report.panels import PANELS


def test_the_configuration_checks_them():
    for options, message in [
        ({"aggregation": "mean"}, "accepted: lambda, power, .*root"),
        ({"aggregation": "root", "length_scale": 0.75}, "length_scale=0.75 is too large for a root"),
        ({"aggregation": "root", "loss_type": "grpo"}, "aggregation='root' would replace"),
        ({"aggregation": "dapo", "length_scale": 0.2}, "no effect with aggregation='dapo'"),
        ({"token_regulation": "cubic"}, "accepted: 'sigmoid', 'linear', 'square'"),
        ({"token_regulation": "square", "regulation_alpha": 6.0}, "regulation_alpha=6.0 is too large for a square"),
        ({"token_regulation": "square", "regulation_slope": 2.0}, "no effect with token_regulation='square'"),
    ]:
        with pytest.raises(ValueError, match=message):
            config(LambdaGRPOConfig, Batch(), **options)


def test_a_run_shows_them_everywhere(tmp_path):
    batch = Batch()
    options = {"aggregation": "root", "token_regulation": "square", "lambda_init": 1.0, "length_scale": 0.25}
    args = config(
        LambdaGRPOConfig, batch, output_dir=str(tmp_path), max_steps=2, save_strategy="steps", save_steps=1,
        log_completions=True, lambda_learning_rate=0.5, **options,
    )
    trainer = build(LambdaGRPOTrainer, args, batch)
    trainer.train()
    assert trainer.lambda_value != 1.0
    table = trainer._logs["extra"]["length_weight"]
    assert len(table) == 12 and len({round(f, 6) for f in table}) == 10  # of twelve rows with ten lengths
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| (length/μ)^(λ/20) (a test) |" in card and "| r (`length_scale`) | 0.25 |" in card
    assert "| α·π² + 1 (a test) |" in card and "| its parameters | α = 3 |" in card
    assert json.loads((tmp_path / "lambda.json").read_text())["aggregation"] == "root"
    run = read_run(tmp_path)
    assert run.aggregation == "root"
    assert "Length weight f over the run's lengths" in [panel.title for panel in PANELS if panel.has_data(run)]
    plot_run(tmp_path, tmp_path / "run.png")
    other = config(LambdaGRPOConfig, batch, output_dir=str(tmp_path), aggregation="power", token_regulation="square")
    with pytest.raises(ValueError, match="aggregation='power', but .* was trained with 'root'"):
        build(LambdaGRPOTrainer, other, batch).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
"""


def insert(path: Path, text: str, before: str) -> None:
    """Put `text` before the first line that matches `before`."""
    old = path.read_text(encoding="utf-8")
    place = re.search(before, old, re.MULTILINE).start()
    path.write_text(old[:place] + text.lstrip("\n") + old[place:], encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository with two more members, by three insertions each."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("trl_lambda", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    members = folder / "trl_lambda" / "weights"
    insert(members / "length_weight.py", LENGTH_CLASS, r"^# The one table")
    insert(members / "token_weight.py", TOKEN_CLASS, r"^# The one table")
    insert(members / "length_weight.py", ", Root", r"\)\n\}")
    insert(members / "token_weight.py", ", Square", r"(?<=for member in \(Sigmoid, Linear)\)")
    insert(folder / "tests" / "tools" / "reference.py", LENGTH_REFERENCE, r'^            if scope == "prompt" and')
    insert(folder / "tests" / "tools" / "reference.py", TOKEN_REFERENCE, r'^    if regulation == "linear"')
    (folder / "tests" / "test_its_members.py").write_text(CHECK, encoding="utf-8")
    return folder


def test_the_package_and_the_property_tests_know_a_new_member(copy):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-rA",
         "tests/test_its_members.py", "tests/test_weights.py"],
        cwd=copy, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(copy)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "test_length_weights_equal_the_reference[paper-root-prompt]" in done.stdout
    assert "test_probability_weights_equal_the_reference[None-square]" in done.stdout
