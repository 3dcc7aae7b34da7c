"""Token aggregation for TRL's `GRPOTrainer`: a learnable length weight and probability-regulated token weights."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lambda_grpo_config import LambdaGRPOConfig, TRGRPOConfig
    from .lambda_grpo_trainer import LambdaGRPOTrainer, TRGRPOTrainer
    from .weights import LengthWeight, TokenWeight

__version__ = "0.2.0"
__all__ = ["LambdaGRPOConfig", "LambdaGRPOTrainer", "LengthWeight", "TRGRPOConfig", "TRGRPOTrainer", "TokenWeight"]

_MODULES = {
    "LambdaGRPOConfig": "lambda_grpo_config",
    "TRGRPOConfig": "lambda_grpo_config",
    "LambdaGRPOTrainer": "lambda_grpo_trainer",
    "TRGRPOTrainer": "lambda_grpo_trainer",
    "LengthWeight": "weights",
    "TokenWeight": "weights",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: TRL takes seconds, which `trl-lambda --version` should not."""
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    if name in _MODULES.values():
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
