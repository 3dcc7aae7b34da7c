"""Weights as a user brings them, named in jobs and on command lines by their dotted paths."""

import torch

from trl_lambda import LengthWeight


def power(lengths, lam):
    """The package's own `power`, in three lines."""
    ratio = (lengths / lengths.mean()) ** lam
    return ratio * lengths.sum() / (lengths * ratio).sum()


def same_power(lengths, lam):
    """The same weights under another name."""
    return power(lengths, lam)


def linear(probs):
    """The package's own `linear` with α = 0.6."""
    return 0.6 * probs + (1 - 0.6)


def same_linear(probs):
    """The same weights under another name."""
    return linear(probs)


def half(lengths):
    """A length weight without λ."""
    return torch.full_like(lengths, 0.5)


def misspelled(length):
    """Requires an argument that there is not."""
    return length


class Square(LengthWeight):
    """An object as a user writes it: no formula, no source, a parameter without a symbol."""

    name = "square"

    def __call__(self, lengths):
        return lengths**2 / lengths.square().mean()


square = Square()
