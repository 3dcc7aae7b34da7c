"""Rewards by name: TRL's own, a reward model, or a function by its dotted path."""

import importlib.util
from collections.abc import Callable
from typing import Any

from trl.rewards import (
    accuracy_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

from .agents import owns_reward
from .arguments import LambdaGRPOScriptArguments
from .loading import import_function

REWARD_FUNCS: dict[str, Callable[..., Any]] = {
    "accuracy_reward": accuracy_reward,
    "reasoning_accuracy_reward": reasoning_accuracy_reward,
    "think_format_reward": think_format_reward,
    "get_soft_overlong_punishment": get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256),
}
MATH_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward")


def load_rewards(
    script_args: LambdaGRPOScriptArguments, environment: type | None = None
) -> list[str | Callable[..., Any]]:
    """
    Resolve the names of reward model and reward functions to what the trainer takes as `reward_funcs`.

    Raises:
        ValueError: if none is given and the environment has none of its own, or a name cannot be resolved.
    """
    rewards: list[str | Callable[..., Any]] = []
    if script_args.reward_model_name_or_path:
        rewards.append(script_args.reward_model_name_or_path)
    names = script_args.reward_funcs or []
    for name in [names] if isinstance(names, str) else names:  # in YAML one name need not be a list
        if name in MATH_REWARDS and importlib.util.find_spec("math_verify") is None:
            raise ValueError(f'reward_funcs has {name!r}, which needs math-verify: pip install "trl[math_verify]"')
        accepted = f"{', '.join(REWARD_FUNCS)}, or a dotted path to a function"
        known = name in REWARD_FUNCS
        rewards.append(REWARD_FUNCS[name] if known else import_function("reward_funcs has", name, accepted))
    if not rewards and not owns_reward(environment):
        raise ValueError("no reward: set reward_funcs, reward_model_name_or_path, or both.")
    return rewards
