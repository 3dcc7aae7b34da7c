"""λ's state on disk: JSON written whole or not at all, and read with a message that says how to go on without it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

LAMBDA_FILE = "lambda.json"
COMPANION_FILE = "lambda_optimizer.json"
LARGEST_FLOAT32 = 3.4028234663852886e38


def write_json(folder: str | os.PathLike[str], name: str, content: dict[str, Any]) -> Path:
    """Write a JSON file into an existing folder, whole or not at all; floats survive exactly."""
    path = Path(folder) / name
    temporary = path.with_suffix(".json.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def read_lambda_file(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """
    Read `lambda.json` from the folder of a checkpoint or a model.

    Returns:
        `dict`: as written. `"lambda"` is a finite float that float32 holds, `None` for an f without λ; `"skipped"` a
        count; `"aggregation"` the member's name; `"learnable"` whether λ was trained; `"lambdas"` λ of every feature
        where there are several, else empty.

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
    with _damaged(path, afresh):
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            **content,
            "lambda": None if content["lambda"] is None else _float32(content["lambda"]),
            "lambdas": [_float32(value) for value in content.get("lambdas") or ()],
            "skipped": int(content["skipped"]),
            "aggregation": None if content["aggregation"] is None else str(content["aggregation"]),
            "learnable": bool(content.get("learnable", True)),
        }


def companion_state_to_json(state: dict[str, Any]) -> dict[str, Any]:
    """`optimizer.state_dict()` with every tensor as dtype, shape and values; floats survive exactly."""

    def plain(value: Any) -> Any:
        if torch.is_tensor(value):
            dtype = str(value.dtype).removeprefix("torch.")
            return {"dtype": dtype, "shape": list(value.shape), "values": value.flatten().tolist()}
        return value

    slots = {
        str(index): {name: plain(value) for name, value in slot.items()} for index, slot in state["state"].items()
    }
    return {"state": slots, "param_groups": state["param_groups"]}


def read_companion_state(folder: str | os.PathLike[str], size: int = 1) -> dict[str, Any]:
    """
    Read the state of λ's companion optimizer, of `size` λ, from a checkpoint that has one: for
    `optimizer.load_state_dict`, one group of one parameter, and its slot if it was ever stepped.

    Raises:
        `ValueError`: the file is damaged.
    """
    path = Path(folder) / COMPANION_FILE
    afresh = (
        f"To start λ's optimizer afresh, pass model={str(folder)!r} and lambda_init, as lambda.json has it, to a new "
        "trainer instead of resuming."
    )

    def value_of(value: Any) -> Any:
        if not isinstance(value, dict):
            return value if isinstance(value, str | bool) or value is None else _float32(value)
        tensor = torch.tensor(value["values"], dtype=getattr(torch, value["dtype"])).reshape(value["shape"])
        if not tensor.isfinite().all():
            raise ValueError("a value is not finite")
        return tensor

    with _damaged(path, afresh):
        content = json.loads(path.read_text(encoding="utf-8"))
        groups, slots = content["param_groups"], content["state"]
        if len(groups) != 1 or not isinstance(groups[0], dict) or len(groups[0]["params"]) != 1 or len(slots) > 1:
            raise ValueError("λ has one group of one parameter")
        state = {int(i): {name: value_of(value) for name, value in slot.items()} for i, slot in slots.items()}
        for slot in state.values():
            for name, value in slot.items():
                if torch.is_tensor(value) and value.numel() not in (1, size):
                    raise ValueError(f"{name} has {value.numel()} values for {size} λ")
        return {"state": state, "param_groups": groups}


@contextmanager
def _damaged(path: Path, advice: str) -> Iterator[None]:
    """Tell whatever is wrong inside a file in one way."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {text}). {advice}") from error


def _float32(value: Any) -> float:
    """`value` as a float, if it is a finite number that float32, λ's dtype, can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_FLOAT32:
        raise ValueError(f"{str(value)[:40]} is no finite float32")
    return float(value)
