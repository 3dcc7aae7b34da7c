"""Token aggregation for TRL's `GRPOTrainer`: a learnable length weight and probability-regulated token weights."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lambda_grpo_config import LambdaGRPOConfig, TRGRPOConfig
    from .lambda_grpo_trainer import LambdaGRPOTrainer, TRGRPOTrainer
    from .weights import LengthWeight, TokenWeight

__version__ = "0.3.0"
__all__ = ["LambdaGRPOConfig", "LambdaGRPOTrainer", "LengthWeight", "TRGRPOConfig", "TRGRPOTrainer", "TokenWeight"]

_ROOMS = {"Config": "lambda_grpo_config", "Trainer": "lambda_grpo_trainer", "Weight": "weights"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: TRL takes seconds, which `trl-lambda --version` should not."""
    room = next((room for ending, room in _ROOMS.items() if name in __all__ and name.endswith(ending)), None)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{room}", __name__), name)
