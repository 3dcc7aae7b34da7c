"""λ's part of the optimizer step."""

import math
from collections.abc import MutableMapping
from typing import Any

from accelerate import Accelerator
from transformers import TrainerCallback

from .lambda_parameter import LambdaParameter


class LambdaStep(TrainerCallback):
    """
    Clip λ's gradient before the optimizer's step; clear it and project λ after it.

    Args:
        parameter ([`LambdaParameter`]): λ.
        accelerator (`Accelerator`): unscales fp16 gradients and knows whether the step was skipped.
        metrics (`MutableMapping[str, list[float]]`): TRL's of training; `lambda/grad` and `lambda/skipped`.
    """

    def __init__(
        self, parameter: LambdaParameter, accelerator: Accelerator, metrics: MutableMapping[str, list[float]]
    ) -> None:
        self._parameter = parameter
        self._accelerator = accelerator
        self._metrics = metrics

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._parameter.learnable:
            # Clipping the model's gradients unscales fp16 gradients, λ's with them; without a clip nobody has yet.
            if self._parameter.companion is None and (args.max_grad_norm is None or args.max_grad_norm <= 0):
                self._accelerator.unscale_gradients()
            self._parameter.prepare_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameter = self._parameter
        if parameter.learnable and not self._accelerator.optimizer_step_was_skipped:
            parameter.step_companion()
        parameter.finish_step()
        if parameter.learnable:
            self._metrics["lambda/grad"].append(
                parameter.last_grad if math.isfinite(parameter.last_grad) else math.nan
            )
            # A count: the last one is meant, not TRL's mean over the logging interval.
            self._metrics["lambda/skipped"] = [float(parameter.skipped)]
