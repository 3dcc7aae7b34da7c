"""The rule that a configuration asks for."""

from ..lambda_grpo_config import LambdaGRPOConfig
from ..weights import LengthWeight
from .rules import Regression, Rule
from .target import TARGET_BOUNDS, Target


def bounds_of(args: LambdaGRPOConfig) -> tuple[float, float] | None:
    """λ's bounds: `lambda_bounds`, or those of "target" where it is not set."""
    if args.lambda_bounds is not None:
        return args.lambda_bounds[0], args.lambda_bounds[1]
    return TARGET_BOUNDS if args.length_target is not None else None


def make_rule(args: LambdaGRPOConfig, f: LengthWeight, *, num_iterations: int) -> Rule | None:
    """
    Args:
        args ([`LambdaGRPOConfig`]): The run's configuration.
        f ([`LengthWeight`]): The length weight, with a λ.
        num_iterations (`int`): how often a generation batch is trained on.

    Returns:
        [`Rule`], *optional*: `None` for a fixed λ and for descent on the loss, whose gradient autograd makes.
    """
    rule = args.rule_of(f) if args.lambda_learnable else "descent"
    if rule == "regression":
        return Regression(f.lambda_features, args.lambda_gain, getattr(f, "side", "signed"))
    if rule == "target":
        steps = (args.steps_per_generation or 1) * num_iterations / args.gradient_accumulation_steps
        assert args.length_target is not None  # the configuration has seen to it
        side, bounds = getattr(f, "side", "positive"), bounds_of(args) or TARGET_BOUNDS
        return Target(args.length_target, steps, side, bounds, args.lambda_init)
    return None
