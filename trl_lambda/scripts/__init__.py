"""
Training from the command line: what TRL's GRPO script does, with the class swapped, and more checks before it starts.

Model, dataset and rewards are named as in `trl grpo`, on the command line or in YAML; hub names and local files are
given in the same way. Whatever `LambdaGRPOConfig` and `trl.ModelConfig` know is an option here. Beyond TRL's script:
what the user can mend ends in one line; datasets are prepared by a function of one row, put together from several
splits and tested on another configuration; a summary, a picture and a short progress bar.

    trl-lambda train --config run.yaml                           # one process
    accelerate launch -m trl_lambda.training --config run.yaml   # several, under any engine of accelerate
"""

from .arguments import LambdaGRPOScriptArguments, parse
from .loading import load_splits
from .progress import ShortProgress
from .rewards import MATH_REWARDS, load_rewards
from .run import finish, lambda_line, main, make_trainer

__all__ = [
    "MATH_REWARDS",
    "LambdaGRPOScriptArguments",
    "ShortProgress",
    "finish",
    "lambda_line",
    "load_rewards",
    "load_splits",
    "main",
    "make_trainer",
    "parse",
]
