"""λ's state on disk: JSON written whole or not at all, and read with a message that says how to go on without it."""

import json
import math
import os
from pathlib import Path

import torch

LAMBDA_FILE = "lambda.json"
COMPANION_FILE = "lambda_optimizer.json"


def write_json(folder: str | os.PathLike, name: str, content: dict) -> Path:
    """
    Write a JSON file into `folder`, whole or not at all.

    Args:
        folder (`str` or `os.PathLike`): An existing folder.
        name (`str`): The file's name.
        content (`dict`): JSON-serialisable; floats survive exactly.

    Returns:
        `Path`: the file written.
    """
    path = Path(folder) / name
    temporary = path.with_suffix(".json.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def read_lambda_file(folder: str | os.PathLike) -> dict:
    """
    Read `lambda.json` from a checkpoint.

    Args:
        folder (`str` or `os.PathLike`): A checkpoint or model folder.

    Returns:
        `dict`: as written; `"lambda"` is a finite float, `"skipped"` a count, `"aggregation"` the member's name.

    Raises:
        `ValueError`: the file is missing or damaged; the message says how to start λ afresh.
    """
    path = Path(folder) / LAMBDA_FILE
    afresh = f"To start λ afresh from these weights, pass model={str(folder)!r} to a new trainer instead of resuming."
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: this checkpoint was not written by LambdaGRPOTrainer with a λ (a plain GRPOTrainer "
            f"has none). {afresh}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        value, skipped, aggregation = float(content["lambda"]), int(content["skipped"]), str(content["aggregation"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). {afresh}") from error
    if not math.isfinite(value):
        raise ValueError(f"{path} is damaged (λ = {value}). {afresh}")
    return {**content, "lambda": value, "skipped": skipped, "aggregation": aggregation}


def companion_state_to_json(state: dict) -> dict:
    """`optimizer.state_dict()` with every tensor as dtype, shape and values; floats survive exactly."""

    def plain(value):
        if torch.is_tensor(value):
            dtype = str(value.dtype).removeprefix("torch.")
            return {"dtype": dtype, "shape": list(value.shape), "values": value.flatten().tolist()}
        return value

    slots = {
        str(index): {name: plain(value) for name, value in slot.items()} for index, slot in state["state"].items()
    }
    return {"state": slots, "param_groups": state["param_groups"]}


def read_companion_state(folder: str | os.PathLike) -> dict:
    """
    Read the state of λ's companion optimizer from a checkpoint.

    Args:
        folder (`str` or `os.PathLike`): A checkpoint folder.

    Returns:
        `dict`: for `optimizer.load_state_dict`.

    Raises:
        `ValueError`: the file is missing or damaged.
    """
    path = Path(folder) / COMPANION_FILE
    again = "Resume under the engine and the optimizer that the checkpoint was written with."
    if not path.is_file():
        raise ValueError(f"{path} is missing: λ's optimizer state is not in this checkpoint. {again}")

    def tensor(value):
        if isinstance(value, dict) and "dtype" in value:
            return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"])).reshape(value["shape"])
        return value

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        slots = {int(i): {name: tensor(value) for name, value in slot.items()} for i, slot in content["state"].items()}
        return {"state": slots, "param_groups": content["param_groups"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). {again}") from error
