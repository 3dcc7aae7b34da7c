"""`lambda.json`: λ beside every saved model or adapter, and the settings that a run resumed from it must share."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .parameter import LambdaParameter

LAMBDA_FILE = "lambda.json"
OPTIMIZER_FILE = "lambda_optimizer.pt"  # of λ's own optimizer, where it has one
Folder = str | os.PathLike[str]


def read_lambda_file(folder: Folder) -> dict[str, Any]:
    """
    Read `lambda.json` from the folder of a checkpoint or a model.

    Returns:
        `dict`: as written. `"lambda"` is λ, `None` without one; `"lambdas"` λ of every feature where there are
        several; `"skipped"` a count; `"learnable"` whether λ was trained; `"settings"` the weights' settings.

    Raises:
        `ValueError`: the file is missing or damaged.
    """
    path = Path(folder) / LAMBDA_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        values = [*(content.get("lambdas") or []), *([] if content["lambda"] is None else [content["lambda"]])]
        if not torch.tensor(values, dtype=torch.float32).isfinite().all():
            raise ValueError("λ is not a finite float32")
        return {**content, "skipped": int(content["skipped"]), "settings": dict(content["settings"])}
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is missing: this folder was not written by LambdaGRPOTrainer. {_from_weights(folder)}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). {_from_weights(folder)}") from error


class LambdaFile:
    """
    The files that a run's weights leave in its folders.

    Args:
        parameter ([`LambdaParameter`], *optional*): λ, if f has one.
        settings (`Mapping[str, Any]`): what the weights are, JSON values. A resumed run must have the same.
        is_needed (`bool`): whether the weights leave a file: those with a λ and those of the user's own do.
    """

    def __init__(self, parameter: LambdaParameter | None, settings: Mapping[str, Any], *, is_needed: bool) -> None:
        self._parameter = parameter
        self._settings = dict(settings)
        self._is_needed = is_needed

    def write(self, folder: Folder, global_step: int, *, home: str | None = None) -> None:
        """
        Write `lambda.json`, whole or not at all. Call it on one process.

        Args:
            folder (`str`): an existing folder.
            global_step (`int`): optimizer steps so far.
            home (`str`, *optional*): the optimizer that λ is in, where its state is beside the file; a run can only
                be resumed from such a folder.
        """
        if not self._is_needed:
            return
        content: dict[str, Any] = {"format": 2, "lambda": None, "skipped": 0, "learnable": False}
        if (parameter := self._parameter) is not None:
            content |= {"lambda": parameter.value, "skipped": parameter.skipped, "learnable": parameter.learnable}
            content |= {"lambdas": parameter.values} if len(parameter.values) > 1 else {}
            content["learning_state"] = parameter.learning.state_dict()
        content |= {"settings": self._settings, "global_step": global_step, "optimizer": home}
        path = Path(folder) / LAMBDA_FILE
        temporary = path.with_suffix(".json.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def copy_for_push(self, checkpoint: Folder, output_dir: Folder) -> None:
        """Copy the file to where TRL pushes from."""
        source = Path(checkpoint) / LAMBDA_FILE
        if self._is_needed and source.is_file():
            shutil.copy(source, output_dir)

    def load_value(self, folder: Folder) -> dict[str, Any]:
        """Set λ to a folder's, without its optimizer, and return the file's content."""
        content = read_lambda_file(folder)
        if self._parameter is not None and content["lambda"] is not None:
            self._parameter.load(content.get("lambdas") or [content["lambda"]], content["skipped"])
        return content

    def check(self, checkpoint: Folder) -> None:
        """
        Refuse to resume from a checkpoint that this run cannot go on from bit for bit.

        Raises:
            `ValueError`: the checkpoint has other weights or other settings of them, its file is missing or damaged,
                or the folder is no whole checkpoint.
        """
        if not Path(checkpoint, "trainer_state.json").is_file():
            raise ValueError(
                f"{checkpoint} has no trainer_state.json: it is no checkpoint, or one that was cut short. Resume from "
                "an earlier one."
            )
        if not self._is_needed and not Path(checkpoint, LAMBDA_FILE).is_file():
            return
        content = read_lambda_file(checkpoint)
        for key in sorted({*content["settings"], *self._settings}):
            saved, mine = content["settings"].get(key), self._settings.get(key)
            if saved != mine:
                raise ValueError(
                    f"{key}={mine!r}, but {checkpoint} was trained with {saved!r}. Resume with that one. "
                    f"{_from_weights(checkpoint, content['lambda'])}"
                )
        if self._parameter is not None and content["optimizer"] is None:
            raise ValueError(
                f"{checkpoint} holds a model and λ, and no optimizer state of λ: it is an output folder rather than a "
                f"checkpoint, or one that was cut short. {_from_weights(checkpoint, content['lambda'])}"
            )

    def load(self, checkpoint: Folder, home: str) -> None:
        """
        Set λ and the state of how it learns from a checkpoint that `check` has passed.

        Raises:
            `ValueError`: λ is in another optimizer now.
        """
        if self._parameter is None:
            return
        content = self.load_value(checkpoint)
        if content["optimizer"] != home:
            raise ValueError(
                f"λ is in {home} now, but in {checkpoint} it was in {content['optimizer']}. Resume with the optimizer "
                f"and engine of that run. {_from_weights(checkpoint, content['lambda'])}"
            )
        self._parameter.learning.load_state_dict(content["learning_state"])


def _from_weights(folder: Folder, lam: float | None = None) -> str:
    init = "" if lam is None else f" and lambda_init={lam:g}"
    return f"To start from these weights instead, pass model={str(folder)!r}{init} to a new trainer."
