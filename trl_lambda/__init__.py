"""Token aggregation for TRL's `GRPOTrainer`: a learnable length weight and probability-regulated token weights."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lambda_grpo_config import LambdaGRPOConfig, TRGRPOConfig
    from .lambda_grpo_trainer import LambdaGRPOTrainer, TRGRPOTrainer
    from .weights import LengthWeight, TokenWeight

__version__ = "0.3.0"
__all__ = ["LambdaGRPOConfig", "LambdaGRPOTrainer", "LengthWeight", "TRGRPOConfig", "TRGRPOTrainer", "TokenWeight"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: TRL takes seconds, which `trl-lambda --version` should not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    is_config, is_weight = name.endswith("Config"), name.endswith("Weight")
    room = "lambda_grpo_config" if is_config else "weights" if is_weight else "lambda_grpo_trainer"
    return getattr(importlib.import_module(f".{room}", __name__), name)
