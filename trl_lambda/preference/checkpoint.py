"""λ in checkpoints, beside saved models, and back."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..lambda_grpo_config import LambdaGRPOConfig
from ..weights import LengthWeight, TokenWeight
from .files import COMPANION_FILE, LAMBDA_FILE, companion_state_to_json, read_lambda_file, write_json
from .lambda_parameter import LambdaParameter, unwrap_optimizer
from .optimizer_state import LambdaState, fit_scheduler, widen_scheduler

# What says what λ is, with what a file that does not name it means.
_PREFERENCE = {"lambda_side": "both", "lambda_features": ["length"], "lambda_rule": "descent"}
Folder = str | os.PathLike[str]


def identity_of(args: LambdaGRPOConfig, f: LengthWeight | None, v: TokenWeight | None) -> dict[str, Any]:
    """What `lambda.json` says of f and of `v`, a token weight of the user's: weights that differ in it are others."""
    identity = {
        "aggregation": f and f.name,
        "aggregation_scope": args.aggregation_scope,
        "length_scale": getattr(f, "length_scale", None),
        "token_weight": v and v.name,
    }
    if f is not None and f.has_lambda:
        identity["lambda_side"] = getattr(f, "side", "both")
        identity["lambda_features"] = list(f.lambda_features)
        identity["lambda_rule"] = args.rule_of(f) if args.lambda_learnable else None
    return identity


class LambdaCheckpoint:
    """
    What a run's weights leave in its folders.

    `lambda.json` goes beside every saved model or adapter and holds λ, or the names of the user's functions. λ's
    optimizer state is in the trainer's own `optimizer.pt`, or, for a companion, in `lambda_optimizer.json`.

    Args:
        parameter ([`LambdaParameter`], *optional*): λ, if f has one.
        identity (`Mapping[str, Any]`): what the weights are, from `identity_of`.
        is_custom (`bool`): whether f or v is the user's, so that the file is written without a λ too.
    """

    def __init__(self, parameter: LambdaParameter | None, identity: Mapping[str, Any], *, is_custom: bool) -> None:
        self._parameter = parameter
        self._identity = dict(identity)
        self._is_written = parameter is not None or is_custom

    def write(self, folder: Folder, global_step: int) -> None:
        """Write `lambda.json`; call it on one process."""
        if not self._is_written:
            return
        parameter = self._parameter
        own: dict[str, Any] = {"lambda": None, "skipped": 0, "learnable": False}
        if parameter is not None:
            own = {"lambda": parameter.value, "skipped": parameter.skipped, "learnable": parameter.learnable}
            if len(parameter.values) > 1:
                own["lambdas"] = parameter.values
            if parameter.rule is not None:
                own["rule_state"] = parameter.rule.state_dict()
        write_json(folder, LAMBDA_FILE, {"format": 1, **own, **self._identity, "global_step": global_step})

    def write_optimizer(self, folder: Folder) -> None:
        """Write the companion's state, if there is one; call it on one process."""
        if self._parameter is not None and self._parameter.companion is not None:
            state = companion_state_to_json(self._parameter.companion.state_dict())
            write_json(folder, COMPANION_FILE, state)

    def copy_for_push(self, checkpoint: Folder, output_dir: Folder) -> None:
        """TRL pushes `output_dir` with the files it knows copied there; λ goes with them."""
        source = Path(checkpoint) / LAMBDA_FILE
        if self._is_written and source.is_file():
            shutil.copy(source, output_dir)

    def load_value(self, checkpoint: Folder) -> None:
        """Set λ to a checkpoint's, without its optimizer."""
        if self._parameter is not None:
            content = read_lambda_file(checkpoint)
            self._parameter.load(content["lambdas"] or [content["lambda"]], content["skipped"])

    def load(
        self, checkpoint: Folder, optimizer: Any, scheduler: Any, load: Callable[[], None], *, owned: bool
    ) -> None:
        """
        Load a checkpoint's optimizer and scheduler, maybe wrapped, with λ's part moved where λ lives now.

        `load` is the trainer's own method for them; `owned` says whether an engine owns the optimizer, and with it the
        way it is loaded.

        Raises:
            `ValueError`: the checkpoint's weights and this trainer's are not the same quantity, its files are damaged,
                or the optimizer cannot take the state; the message says how to go on.
        """
        content = self._check(checkpoint)
        parameter, optimizer = self._parameter, unwrap_optimizer(optimizer)
        if parameter is None:
            return load()
        state = LambdaState(parameter, checkpoint, content["learnable"])
        handle = None if owned else state.fit_into(optimizer)
        if not owned:
            widen_scheduler(scheduler)
        try:
            load()
        except ValueError as error:
            if handle is None and "parameter group" in str(error):
                raise _cannot_take(optimizer, checkpoint, content) from error
            raise
        finally:
            if handle is not None:
                handle.remove()
        if not owned:
            fit_scheduler(scheduler, optimizer)
        state.finish()
        parameter.load(content["lambdas"] or [content["lambda"]], content["skipped"])
        if parameter.rule is not None and parameter.learnable and content["learnable"]:
            try:
                parameter.rule.load_state_dict(content["rule_state"])
            except (KeyError, TypeError, ValueError) as error:
                value = content["lambda"]
                raise ValueError(
                    f"{Path(checkpoint) / LAMBDA_FILE} is damaged ({type(error).__name__}: {error}). To start λ's "
                    f"rule afresh, pass model={str(checkpoint)!r} and lambda_init={value} to a new trainer."
                ) from error

    def _check(self, checkpoint: Folder) -> dict[str, Any]:
        """Read what a checkpoint says of its weights; empty where there is nothing and nothing is needed."""
        name, path = self._identity["aggregation"], Path(checkpoint) / LAMBDA_FILE
        new_run = f"pass model={str(checkpoint)!r} to a new trainer, whose optimizer then starts afresh"
        if not self._is_written and not path.is_file():
            return {}
        content = read_lambda_file(checkpoint)
        was, value = content["aggregation"], content["lambda"]
        if self._parameter is None and value is not None:
            raise ValueError(
                f"aggregation={name!r} has no λ, but {checkpoint} was trained with aggregation={was!r} and "
                f"λ = {value}. Resume with that one. To go on without λ, {new_run}."
            )
        if was != name or (self._parameter is not None and value is None):
            raise ValueError(
                f"aggregation={name!r}, but {checkpoint} was trained with {was!r}, which weighs otherwise. Resume "
                f"with that one. To go on with the new one, {new_run}."
            )
        for key, default in _PREFERENCE.items():
            saved, mine = content.get(key) or default, self._identity.get(key) or default
            if key == "lambda_rule" and not (content["learnable"] and self._parameter and self._parameter.learnable):
                continue  # a fixed λ has none, and goes on learned or fixed from its value
            if self._parameter is not None and saved != mine:
                raise ValueError(
                    f"{key}={mine!r}, but {checkpoint} was trained with {saved!r}, whose λ has another meaning. "
                    f"Resume with that one. To go on with the new one, {new_run}."
                )
        if content.get("token_weight") != self._identity["token_weight"]:
            raise ValueError(
                f"token_weight={self._identity['token_weight']!r}, but {checkpoint} was trained with "
                f"{content.get('token_weight')!r}. Resume with that one. To go on with the new one, {new_run}."
            )
        saved_values = content["lambdas"] or [value]
        if self._parameter is not None and not self._parameter.learnable and saved_values != self._parameter.values:
            advice = f"Resume with lambda_init={value}."
            if len(saved_values) > 1:  # the option sets the first feature's λ only
                advice = f"Resume with lambda_learnable=True. To go on with a fixed one, {new_run}."
            raise ValueError(
                f"lambda_init={self._parameter.value} is fixed (lambda_learnable=False), but {checkpoint} has "
                f"λ = {saved_values if len(saved_values) > 1 else value}. {advice}"
            )
        return content


def _cannot_take(optimizer: torch.optim.Optimizer, checkpoint: Folder, content: Mapping[str, Any]) -> ValueError:
    """Of an optimizer that loads in a way of its own, to which λ's group is new or gone."""
    return ValueError(
        f"{type(optimizer).__name__} cannot take the optimizer state of {checkpoint}, whose λ was "
        f"{'learned' if content['learnable'] else 'fixed'}: resume with the lambda_learnable of that run. To go on "
        f"otherwise, pass model={str(checkpoint)!r} and lambda_init={content['lambda']} to a new trainer: both "
        "optimizers then start afresh."
    )
