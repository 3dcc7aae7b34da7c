"""Weights as a user brings them, named in jobs, configs and on command lines by their dotted paths."""

from dataclasses import dataclass

import torch

from trl_lambda import LengthWeight, TokenWeight


def power(lengths, lam):
    ratio = (lengths / lengths.mean()) ** lam
    return ratio * lengths.sum() / (lengths * ratio).sum()


def linear(probs, alpha=0.6):
    return alpha * probs + (1 - alpha)


def half(lengths):
    return torch.full_like(lengths, 0.5)


def misspelled(length):
    """Requires an argument that there is not."""
    return length


def every_response_argument(lengths, advantages, lam, mean_logp, min_logp, mean_entropy, rewards, step):
    """A length weight that each of its arguments moves."""
    preference = lam * (lengths / lengths.mean()).log() + 0.2 * advantages + 0.3 * mean_logp - 0.1 * min_logp
    return (preference + 0.2 * mean_entropy - 0.4 * rewards + 0.1 * step).exp()


def every_token_argument(probs, advantages, entropies, old_logps, mask, lengths, step):
    """A token weight that each of its arguments moves, 0 for improbable tokens of wrong answers."""
    old = probs.log() if old_logps is None else old_logps  # on policy
    weights = (1 + probs + 0.1 * advantages.tanh() + 0.1 * entropies - 0.05 * old) * (0.5 + mask / 2)
    return (weights + 1 / lengths.clamp(min=1).to(probs) + 0.2 * step) * ~((probs < 0.1) & (advantages < 0))


@dataclass(frozen=True)
class Square(LengthWeight):
    """An object as a user writes it: no formula, no source, a parameter without a symbol that is no number."""

    exponent: float = 2.0
    side: str = "long"

    name = "square"

    def __call__(self, rows, lam):
        return rows.lengths.clamp(min=1) ** self.exponent / rows.lengths.square().mean()


class Confident(LengthWeight):
    name = "confident"
    has_lambda = True
    needs = ("mean_logp", "mean_entropy")

    def __call__(self, rows, lam):
        return (lam * rows.statistic("mean_logp") + rows.statistic("mean_entropy")).exp()


@dataclass(frozen=True)
class Linear(TokenWeight):
    alpha: float = 0.6

    name = "my linear"

    def __call__(self, probs):
        return linear(probs, self.alpha)


square = Square()
