"""Rows of the arena's CSV files as tests make them."""

import csv
from pathlib import Path

import numpy as np

from recipes.studies.arena.analysis.runs import SUMMARIZED


def study_row(task: str, arm: str, seed: int, rewards: np.ndarray, study: str = "main", **values) -> dict:
    """One run with these training rewards, every figure 0.5 but `values`."""
    row = {"study": study, "task": task, "arm": arm, "seed": seed, "learning_rate": 3e-4, "max_steps": 100}
    row |= {"steps_per_generation": 4, **dict.fromkeys(SUMMARIZED, 0.5), "lambda_curve": ""}
    row |= {"auc": float(np.mean(rewards)), "reward_curve": " ".join(f"{value:.4f}" for value in rewards)}
    return row | {"length_curve": " ".join(["10"] * len(rewards))} | values


def write_rows(rows: list[dict], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path
