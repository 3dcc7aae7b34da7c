"""λ's part of an optimizer's state, moved where λ lives now.

A checkpoint may hold λ's group in the trainer's optimizer, in a companion's file, or nowhere; so may the trainer that
resumes from it. The model's part of the state is the same in all of these, and is loaded as it is.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from .files import COMPANION_FILE, read_companion_state
from .lambda_parameter import GROUP_NAME, LambdaParameter, unwrap_scheduler

_PLACES = ("params", "name", "lr", "initial_lr")  # of a group: what says nothing about the kind of optimizer


class LambdaState:
    """
    λ's group and slot of one checkpoint, while it is loaded.

    Args:
        parameter ([`LambdaParameter`]): λ as it is now, in an optimizer, beside one, or fixed.
        checkpoint (`str` or `os.PathLike`): The folder that is resumed from.
        was_learned (`bool`): What its `lambda.json` says.
    """

    def __init__(self, parameter: LambdaParameter, checkpoint: str | os.PathLike[str], was_learned: bool) -> None:
        self._parameter = parameter
        self._checkpoint = Path(checkpoint)
        self._was_learned = was_learned
        self._is_loaded = False
        self._state: dict[str, Any] | None = None  # of λ alone, as an optimizer with one parameter has it
        if (self._checkpoint / COMPANION_FILE).is_file():
            self._state = read_companion_state(checkpoint, parameter.tensor.numel())

    def fit_into(self, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle | None:
        """
        Let the next `optimizer.load_state_dict` take a state with or without λ's group; returns a handle to end that,
        or `None` for an optimizer that loads in a way of its own.
        """
        if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
            return None
        return optimizer.register_load_state_dict_pre_hook(self._fit)

    def _fit(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        self._is_loaded = True
        groups, slots = list(state["param_groups"]), dict(state["state"])
        saved = next((group for group in groups if group.get("name") == GROUP_NAME), None)
        has_group = self._parameter.in_optimizer(optimizer)
        if saved is not None and not has_group:  # λ's group is the last: the other parameters keep their numbers
            groups.remove(saved)
            slot = slots.pop(saved["params"][0], None)
            self._state = {"state": {} if slot is None else {0: slot}, "param_groups": [{**saved, "params": [0]}]}
        elif saved is None and has_group:
            number = sum(len(group["params"]) for group in groups)
            mine = next(g for g in optimizer.state_dict()["param_groups"] if g.get("name") == GROUP_NAME)
            groups.append({**mine, "params": [number]})
            if (found := self._usable(mine)) is not None:
                for slot in found["state"].values():
                    slots[number] = slot
        return {**state, "param_groups": groups, "state": slots}

    def finish(self) -> None:
        """
        Load λ's part into the companion, once the trainer's optimizer has been loaded; a `ValueError` where the
        model's part was saved and λ's is gone.
        """
        companion = self._parameter.companion
        if companion is None:
            if self._parameter.learnable and not self._is_loaded:
                self._usable({})
            return
        if self._was_learned and self._state is None and self._model_is_saved():
            raise ValueError(
                f"{self._checkpoint / COMPANION_FILE} is missing: the checkpoint has the model's optimizer state and "
                f"not λ's. To start both afresh, pass model={str(self._checkpoint)!r} and lambda_init to a new "
                "trainer."
            )
        if (found := self._usable(companion.param_groups[0])) is not None:
            companion.load_state_dict(found)

    def _model_is_saved(self) -> bool:
        """Whether an optimizer state, as torch or an engine names it, is there: none is with `save_only_model`."""
        names = ("optimizer", "global_step", "zero_pp_rank")
        return any(path.name.startswith(names) for path in self._checkpoint.iterdir())

    def _usable(self, group: dict[str, Any]) -> dict[str, Any] | None:
        """λ's saved state, if of the same kind of optimizer; else `None`, with a warning where λ was learned."""
        if not self._was_learned:
            return None
        found = self._state and self._state["param_groups"][0]
        if found and set(found) - set(_PLACES) == set(group) - set(_PLACES):
            return self._state
        cause = "it is of another kind of optimizer" if found else "it is not in the checkpoint"
        warnings.warn(
            f"λ goes on from {self._checkpoint} without its optimizer state: {cause}. Its moments start afresh.",
            UserWarning,
            stacklevel=2,
        )
        return None


def widen_scheduler(scheduler: Any) -> None:
    """Let a `LambdaLR` load the state of one that had λ's group too: it indexes its functions by the saved ones."""
    scheduler = unwrap_scheduler(scheduler)
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        scheduler.lr_lambdas = [*scheduler.lr_lambdas, scheduler.lr_lambdas[-1]]


def fit_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Give a loaded scheduler an entry per parameter group: λ's, the last, may be new to it or gone."""
    scheduler, groups = unwrap_scheduler(scheduler), optimizer.param_groups
    for name, of_group in (("base_lrs", "initial_lr"), ("_last_lr", "lr"), ("min_lrs", None), ("lr_lambdas", None)):
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and len(values) != len(groups):
            more = [group[of_group] if of_group else values[-1] for group in groups[len(values) :]]
            setattr(scheduler, name, [*values[: len(groups)], *more])
