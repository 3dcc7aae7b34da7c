"""Token aggregation for TRL's `GRPOTrainer`: a learnable length weight and probability-regulated token weights."""

from .lambda_grpo_config import LambdaGRPOConfig, TRGRPOConfig
from .lambda_grpo_trainer import LambdaGRPOTrainer, TRGRPOTrainer
from .weights import LengthWeight, TokenWeight

__version__ = "0.1.0"
__all__ = ["LambdaGRPOConfig", "LambdaGRPOTrainer", "LengthWeight", "TRGRPOConfig", "TRGRPOTrainer", "TokenWeight"]
