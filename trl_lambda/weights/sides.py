"""
The side of λ: s_i, read off the sign of the advantage.

    "both"       1
    "signed"     sign(A_i)
    "positive"   1 where A_i > 0, else 0
    "negative"   1 where A_i < 0, else 0
"""

from torch import Tensor

from .rows import group_mean

SIDES = ("both", "signed", "positive", "negative")
# A group whose advantages differ by less than this part of the largest has equal rewards and rounding.
_ROUNDING, _FAINT = 1e-5, 1e-2


def sides(advantages: Tensor | None, has_tokens: Tensor, side: str) -> Tensor:
    """
    s of every response, (P, G), in the dtype of A. A and the bool `has_tokens` are (P, G).

    s is 0 for a row without tokens, for a group of equal rewards, and for a row whose reward is its group's mean:
    their advantages are rounding around 0, next to nothing beside those of other groups. Where all groups of a batch
    have equal rewards nothing tells rounding from advantages, and its sign counts.

    Raises:
        `ValueError`: a side other than "both", and A is `None`: missing, or one per token.
    """
    if side == "both":
        return has_tokens.float()
    if advantages is None:
        raise ValueError(
            "This weight needs one advantage per response, because it depends on the advantage's sign. The batch has "
            "none, or one per token. Use lambda_side='both', positive_weight=1 and a length_weight without a sign."
        )
    magnitude = advantages.abs() * has_tokens
    largest = magnitude.amax(dim=1, keepdim=True)
    differ = advantages_differ(advantages, has_tokens)
    # A reward that is its group's mean leaves rounding around 0: a sign by chance.
    known = (magnitude > _ROUNDING * largest) & (differ | (magnitude > _FAINT * magnitude.amax()))
    sign = advantages.sign() * (has_tokens & known)
    if side == "signed":
        return sign
    return (sign > 0).to(sign.dtype) if side == "positive" else (sign < 0).to(sign.dtype)


def advantages_differ(advantages: Tensor, has_tokens: Tensor) -> Tensor:
    """Whether the rows of a group that have tokens differ in A by more than rounding, bool (P, 1)."""
    largest = (advantages.abs() * has_tokens).amax(dim=1, keepdim=True)
    spread = ((advantages - group_mean(advantages, has_tokens)).abs() * has_tokens).amax(dim=1, keepdim=True)
    return spread > _ROUNDING * largest
