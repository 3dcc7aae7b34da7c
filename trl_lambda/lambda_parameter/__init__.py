"""λ: its value, how it learns, its step in an optimizer, and its file."""

from .lambda_file import LAMBDA_FILE, LambdaFile, read_lambda_file
from .learning import Descent, Fixed, Learning, Regression
from .parameter import LambdaParameter
from .step import LambdaStep
from .target import TARGET_BOUNDS, Target

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
