"""λ: its value, how it learns, its step in an optimizer, and its file."""

from .lambda_file import LAMBDA_FILE, LambdaFile, read_lambda_file
from .learning import TARGET_BOUNDS, Descent, Fixed, Learning, Regression, Target
from .parameter import LambdaParameter, LambdaStep

__all__ = [
    "LAMBDA_FILE",
    "TARGET_BOUNDS",
    "Descent",
    "Fixed",
    "LambdaFile",
    "LambdaParameter",
    "LambdaStep",
    "Learning",
    "Regression",
    "Target",
    "read_lambda_file",
]
