"""λ itself: its value and bounds, its optimizer parameter group, its step, and its state on disk.

λ is not a parameter of the model. There it would enter the saved weights, the weight sync with vLLM and the joint
gradient clip, and PEFT would drop it. Outside the model nobody else reduces, clips, clears or saves it: that is done
here.
"""

import json
import math
import os
from pathlib import Path

import torch
from accelerate import Accelerator

LAMBDA_FILE = "lambda.json"
GROUP_NAME = "lambda"


class LambdaParameter:
    """
    The learnable length preference λ of arXiv 2510.06870: one scalar for the whole run.

    Args:
        init (`float`): λ at step 0.
        learnable (`bool`): `False` keeps λ at `init`: no gradient, no parameter group.
        bounds (`tuple[float, float]`, *optional*): λ is projected into them after each step.
        max_grad_norm (`float`): bound of |dL/dλ|, apart from the model's clip; 0 turns it off.
        device (`torch.device`): where the losses are computed.
    """

    def __init__(
        self,
        init: float,
        *,
        learnable: bool,
        bounds: tuple[float, float] | None,
        max_grad_norm: float,
        device: torch.device,
    ):
        # One element rather than 0-d, float32 whatever the model's dtype.
        self.tensor = torch.nn.Parameter(
            torch.tensor([init], dtype=torch.float32, device=device), requires_grad=learnable
        )
        self.bounds = bounds
        self.max_grad_norm = max_grad_norm
        self.last_grad = 0.0
        self.skipped = 0

    @property
    def learnable(self) -> bool:
        return self.tensor.requires_grad

    @property
    def value(self) -> float:
        """λ now."""
        return self.tensor.item()

    def in_optimizer(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether λ is in a parameter group of `optimizer`, by identity."""
        return any(p is self.tensor for group in optimizer.param_groups for p in group["params"])

    def add_group(self, optimizer: torch.optim.Optimizer, *, learning_rate: float, adam_eps: float | None) -> None:
        """
        Append λ's own parameter group, without weight decay. Call it before the learning rate scheduler is built.

        Args:
            optimizer (`torch.optim.Optimizer`): The trainer's optimizer.
            learning_rate (`float`): base learning rate of λ.
            adam_eps (`float`, *optional*): `eps` of the group, for an optimizer that has a scalar one; `None` leaves
                the optimizer's own.

        Raises:
            `ValueError`: `adam_eps` is given and the optimizer has no scalar `eps`.
        """
        group = {"params": [self.tensor], "lr": learning_rate, "weight_decay": 0.0, "name": GROUP_NAME}
        if adam_eps is not None:
            if not has_scalar_eps(optimizer):
                raise ValueError(f"adam_eps={adam_eps} has no effect: {type(optimizer).__name__} has no scalar eps.")
            group["eps"] = adam_eps
        optimizer.add_param_group(group)

    def reduce_gradient(self, accelerator: Accelerator) -> None:
        """
        Average dL/dλ over the processes: one collective of one scalar, once per optimizer step, outside backward.

        Losses are scaled for DDP's averaging, so that λ's gradient is averaged too. A process without a gradient
        joins with zero. It comes before any unscaling of fp16 gradients, so that a non-finite value reaches every
        process alike.
        """
        grad = self.tensor.grad if self.tensor.grad is not None else torch.zeros_like(self.tensor)
        self.tensor.grad = accelerator.reduce(grad, reduction="mean")

    def prepare_step(self) -> None:
        """Clip the reduced gradient, or drop it when it is not finite: the optimizer then leaves λ alone."""
        self.last_grad = self.tensor.grad.item()
        if not math.isfinite(self.last_grad):
            self.tensor.grad = None
            self.skipped += 1
        elif self.max_grad_norm > 0:
            self.tensor.grad.clamp_(-self.max_grad_norm, self.max_grad_norm)

    @torch.no_grad()
    def finish_step(self) -> None:
        """Clear the gradient, which `Trainer` does for the model only, and project λ into its bounds."""
        self.tensor.grad = None
        if self.bounds is not None:
            self.tensor.clamp_(*self.bounds)

    @torch.no_grad()
    def load(self, value: float, skipped: int) -> None:
        """Set λ in place, so that optimizer state that refers to it stays attached."""
        self.tensor.fill_(value)
        self.skipped = skipped


def has_scalar_eps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer` is Adam-like: it divides by a root of squared gradients plus a scalar `eps`."""
    return isinstance(optimizer.defaults.get("eps"), float)


def write_lambda_file(folder: str | os.PathLike, content: dict) -> Path:
    """
    Write `lambda.json` into `folder`, whole or not at all.

    Args:
        folder (`str` or `os.PathLike`): An existing folder.
        content (`dict`): JSON-serialisable; floats survive exactly.

    Returns:
        `Path`: the file written.
    """
    path = Path(folder) / LAMBDA_FILE
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
