"""`lambda.json`: λ beside every saved model or adapter, and the settings that a run resumed from it must share."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .learning import Fixed
from .parameter import Folder, LambdaParameter

LAMBDA_FILE = "lambda.json"


def read_lambda_file(folder: Folder) -> dict[str, Any]:
    """
    Read `lambda.json` from the folder of a checkpoint or a model.

    Returns:
        `dict`: as written. `"lambda"` is λ, `None` without one; `"lambdas"` λ of every feature; `"skipped"` a count;
        `"learnable"` whether λ was trained; `"settings"` the weights' settings.

    Raises:
        `ValueError`: the file is missing or damaged.
    """
    path = Path(folder) / LAMBDA_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not torch.tensor(content["lambdas"], dtype=torch.float32).isfinite().all():
            raise ValueError("λ is not a finite float32")
        return content | {"skipped": int(content["skipped"]), "settings": dict(content["settings"])}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}): it is damaged, or the folder is not of "
            f"LambdaGRPOTrainer. {_from_weights(folder)}"
        ) from error


class LambdaFile:
    """
    The file that a run's weights leave in its folders.

    Args:
        parameter ([`LambdaParameter`], *optional*): λ, if f has one.
        settings (`Mapping[str, Any]`): what the weights are, JSON values. A resumed run must have the same.
        is_needed (`bool`): whether there are weights at all.
    """

    def __init__(self, parameter: LambdaParameter | None, settings: Mapping[str, Any], *, is_needed: bool) -> None:
        self._parameter = parameter
        try:
            # As they are read back, without memory addresses, which another process does not have.
            self._settings = json.loads(re.sub(" at 0x[0-9a-fA-F]+", "", json.dumps(settings, allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"length_weight_kwargs and token_weight_kwargs must hold JSON values ({error}): pass others inside a "
                "functools.partial, as the trainer's length_weight= or token_weight=."
            ) from error
        self._is_needed = is_needed

    def write(self, folder: Folder, global_step: int, *, home: str | None = None) -> None:
        """
        Write `lambda.json`, whole or not at all. Call it on one process.

        Args:
            folder (`str`): an existing folder.
            global_step (`int`): optimizer steps so far.
            home (`str`, *optional*): the optimizer that λ is in, where its state is beside the file. A run can only
                be resumed from such a folder.
        """
        if not self._is_needed:
            return Path(folder, LAMBDA_FILE).unlink(missing_ok=True)  # of an earlier run in this folder
        parameter, learning = self._parameter, self._parameter.learning if self._parameter else Fixed()
        content = {
            "lambda": parameter.values[0] if parameter else None,
            "lambdas": parameter.values if parameter else [],
            "skipped": parameter.skipped if parameter else 0,
            "learnable": learning.is_learnable,
            "learning_state": learning.state_dict(),
            "settings": self._settings,
            "global_step": global_step,
            "optimizer": home,
        }
        temporary = Path(folder) / f"{LAMBDA_FILE}.tmp"
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, Path(folder) / LAMBDA_FILE)

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
        if content["optimizer"] is None and self._parameter is not None and self._parameter.learning.is_learnable:
            raise ValueError(
                f"{checkpoint} holds a model and no optimizer state of λ: it is an output folder rather than a "
                f"checkpoint, or one that was cut short. {_from_weights(checkpoint, content['lambda'])}"
            )

    def load(self, folder: Folder, *, home: str | None = None) -> None:
        """
        Set λ from a folder, and with `home`, the optimizer that λ is in now, how it learns too.

        Raises:
            `ValueError`: λ was in another optimizer.
        """
        if self._parameter is None:
            return
        content = read_lambda_file(folder)
        if home is not None and self._parameter.learning.is_learnable and content["optimizer"] != home:
            raise ValueError(
                f"λ is in {home} now, but in {folder} it was in {content['optimizer']}. Resume with the optimizer and "
                f"engine of that run. {_from_weights(folder, content['lambda'])}"
            )
        self._parameter.load(content["lambdas"], content["skipped"])
        if home is not None:
            self._parameter.learning.load_state_dict(content["learning_state"])


def _from_weights(folder: Folder, lam: float | None = None) -> str:
    init = "" if lam is None else f" and lambda_init={lam:g}"
    return f"To start from these weights instead, pass model={str(folder)!r}{init} to a new trainer."
