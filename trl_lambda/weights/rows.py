"""
The plain data that members of f and v are called with, and what both are computed from: sides and features.

The side of λ is s_i, read off the sign of the advantage.

    "both"       1
    "signed"     sign(A_i)
    "positive"   1 where A_i > 0, else 0
    "negative"   1 where A_i < 0, else 0

Statistics of a response beside its length are functions of log-probabilities ln π, entropies H and mask, of the
sampling policy over its own tokens. λ may weigh those in `FEATURES`.

    "mean_logp"      1/|o_i| Σ_t ln π_it
    "min_logp"       min_t ln π_it
    "mean_entropy"   1/|o_i| Σ_t H_it
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

SIDES = ("both", "signed", "positive", "negative")
# A group whose advantages differ by less than this part of the largest has equal rewards and rounding.
_ROUNDING, _FAINT = 1e-5, 1e-2


@dataclass(frozen=True)
class ResponseRows:
    """
    All responses of a generation batch, as a length weight sees them: P prompts with G responses each.

    `statistics` holds the other numbers of each response that the weight asks for, name -> (P, G).
    """

    lengths: torch.Tensor  # own tokens |o_i|, (P, G), float64; 0 for a row without tokens
    token_count: torch.Tensor  # S, the token count that the loss divides by, 0-d
    dim: tuple[int, ...] = (0, 1)  # sums of the scope go over these: (0, 1) for "batch", (1,) for "prompt"
    advantages: torch.Tensor | None = None  # A_i, unweighted, (P, G)
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0  # optimizer steps so far

    @cached_property
    def has_tokens(self) -> torch.Tensor:
        """Which rows have tokens, bool, (P, G)."""
        return self.lengths > 0

    @property
    def mean_length(self) -> torch.Tensor:
        """μ = S/N over all N rows, as TRL counts them, 0-d."""
        return self.token_count / self.lengths.numel()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of (P, G) values over the scope, (1, 1) or (P, 1)."""
        return values.sum(dim=self.dim, keepdim=True)

    def statistic(self, name: str) -> torch.Tensor:
        """A statistic by name, (P, G); a `ValueError` if no weight has asked for it in `needs`."""
        if name not in self.statistics:
            raise ValueError(f"{name} is not known: name it in the length weight's class attribute `needs`.")
        return self.statistics[name]


@dataclass(frozen=True)
class TokenRows:
    """
    The sampled tokens of one micro-batch, as a token weight sees them; all constants to autograd.

    Everything but `probs` is `None` where `token_weights` is called with log-probabilities alone.
    """

    probs: torch.Tensor  # π, the current policy's probability of each token, (B, T)
    advantages: torch.Tensor | None = None  # A, unweighted, (B, 1) or (B, T)
    entropies: torch.Tensor | None = None  # of the current policy's distribution, nats, (B, T)
    old_logps: torch.Tensor | None = None  # log-probabilities of the sampling policy, (B, T); `None` on policy
    mask: torch.Tensor | None = None  # 1 for the policy's own tokens, (B, T)
    lengths: torch.Tensor | None = None  # own tokens of the response, int32, (B, 1)
    step: int = 0  # optimizer steps so far


def one_where_zero(x: torch.Tensor) -> torch.Tensor:
    """A divisor that is safe where there are no tokens. The quotient there is masked afterwards."""
    return x.masked_fill(x == 0, 1)


def group_mean(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Mean of each group's values under a mask, both (P, G, ...), as (P, 1, ...); 0 where the mask is empty."""
    return (values * where).sum(dim=1, keepdim=True) / one_where_zero(where.sum(dim=1, keepdim=True))


def strictly_positive(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Clamp into the range of `dtype` in which an advantage times the weight neither vanishes nor overflows."""
    info = torch.finfo(dtype)
    return weights.clamp(min=info.tiny**0.75, max=info.max**0.75).to(dtype)


def probabilities(logps: torch.Tensor) -> torch.Tensor:
    """π from log-probabilities, detached, at most 1: float64 for float64, else float32."""
    return logps.detach().to(torch.float64 if logps.dtype == torch.float64 else torch.float32).exp().clamp(max=1)


def sides(advantages: torch.Tensor | None, has_tokens: torch.Tensor, side: str) -> torch.Tensor:
    """
    s of every response, (P, G). A and the bool `has_tokens` are (P, G). Side "both" is 1 for each row with tokens.

    Else s is 0 for a row without tokens, for a group of equal rewards, and for a row whose reward is its group's mean:
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
    is_signal = advantages_differ(advantages, has_tokens) | (magnitude > _FAINT * magnitude.amax())
    # A reward that is its group's mean leaves rounding around 0: a sign by chance.
    known = is_signal & (magnitude > _ROUNDING * magnitude.amax(dim=1, keepdim=True))
    sign = advantages.sign() * (has_tokens & known)
    return {"signed": sign, "positive": (sign > 0).to(sign.dtype), "negative": (sign < 0).to(sign.dtype)}[side]


def advantages_differ(advantages: torch.Tensor, has_tokens: torch.Tensor) -> torch.Tensor:
    """Whether the rows of a group that have tokens differ in A by more than rounding, bool (P, 1)."""
    largest = (advantages.abs() * has_tokens).amax(dim=1, keepdim=True)
    # TRL gives a response without a reward exactly 0, and the others of a group of equal rewards their rounding.
    counted = has_tokens & ((advantages != 0) | (largest > _FAINT * largest.amax()))
    spread = ((advantages - group_mean(advantages, counted)).abs() * counted).amax(dim=1, keepdim=True)
    return spread > _ROUNDING * largest


def _token_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the own tokens, (B, T) each -> (B,), 0 for a row without tokens."""
    return values.masked_fill(mask == 0, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


# The table of statistics that TRL's scoring pass alone does not give: functions of log-probabilities, entropies and
# mask, (B, T) each -> (B,), 0 for a row without tokens. λ may weigh those in `FEATURES`.
SCORED_STATISTICS: dict[str, Callable[[torch.Tensor, Any, torch.Tensor], torch.Tensor]] = {
    "mean_logp": lambda logps, entropies, mask: _token_mean(logps, mask),
    "min_logp": lambda logps, entropies, mask: logps.masked_fill(mask == 0, 0).amin(dim=1),
    "mean_entropy": lambda logps, entropies, mask: _token_mean(entropies, mask),
}
FEATURES = ("mean_logp", "min_logp")


def centred_features(names: tuple[str, ...], rows: ResponseRows) -> torch.Tensor:
    """
    x: each feature of each response minus its mean over the group's rows with tokens, (P, G, K); 0 without tokens.

    `names` are `"length"`, which is ln|o|, and names of `rows.statistics`.
    """
    raw = [one_where_zero(rows.lengths).log() if name == "length" else rows.statistic(name) for name in names]
    x, present = torch.stack([values.to(rows.lengths) for values in raw], dim=-1), rows.has_tokens.unsqueeze(-1)
    return (x - group_mean(x, present)) * present


def kind(value: object) -> str:
    """Describe a wrong argument for an error message."""
    is_tensor = isinstance(value, torch.Tensor)
    return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}" if is_tensor else type(value).__name__
