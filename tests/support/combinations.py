"""
The table of legal combinations in docs/choosing.md: the options that each length weight accepts.

    python tests/support/combinations.py --write docs/choosing.md
"""

import argparse
import tempfile
from pathlib import Path

from trl_lambda import LambdaGRPOConfig
from trl_lambda.weights import LENGTH_WEIGHTS

BEGIN, END = "<!-- combinations: begin -->\n", "<!-- combinations: end -->"
# Column -> the option, with the others that it needs.
OPTIONS = {
    "`lambda_side`": {"lambda_side": "positive"},
    "`lambda_features`": {"lambda_side": "positive", "lambda_features": ["length", "mean_logp"]},
    "`length_target`": {"length_target": 0.6},
    "`lambda_bounds`": {"lambda_bounds": [-1.0, 1.0]},
    "`length_weight_scope`, `drop_tied_groups`": {"length_weight_scope": "prompt", "drop_tied_groups": True},
    '`loss_type="grpo"`': {"loss_type": "grpo"},
}
OF_ALL = {"positive_weight": 3.0, "token_weight": "tr_grpo"}


def is_legal(**options: object) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            LambdaGRPOConfig(folder, use_cpu=True, bf16=False, **options)
        except ValueError:
            return False
    return True


def table() -> str:
    """Markdown, one row per option and one column per set of length weights that accept the same options."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for name in (*LENGTH_WEIGHTS, None):
        accepts = ["yes" if is_legal(length_weight=name, **options) else "–" for options in OPTIONS.values()]
        columns.setdefault(tuple(accepts), []).append("`None`" if name is None else f'`"{name}"`')
    lines = [f"| option | {' | '.join(map(', '.join, columns.values()))} |", "|---" * (len(columns) + 1) + "|"]
    rows = zip(OPTIONS, zip(*columns, strict=True), strict=True)
    return "\n".join([*lines, *(f"| {option} | {' | '.join(cells)} |" for option, cells in rows)]) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", type=Path, required=True)
    path = parser.parse_args().write
    head, rest = path.read_text(encoding="utf-8").split(BEGIN)
    path.write_text(f"{head}{BEGIN}{table()}{END}{rest.split(END)[1]}", encoding="utf-8")
