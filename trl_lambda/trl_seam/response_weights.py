"""f of a generation batch's responses, and the factor that it is on advantages in a loss that TRL reduces."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..generation_batch import GenerationBatch
from ..weights import LengthWeight, ResponseRows, groups_with_signal, sequence_mean_weights, weigh_responses
from ..weights.members import DAPO, GRPO
from .contract import SEQUENCE_MEAN_LOSS_TYPES


class ResponseWeights:
    """
    f of every response, with λ as it is now.

    Args:
        member ([`LengthWeight`], *optional*): f; `None` for TRL's own reduction.
        lam (`Callable`): returns λ as the loss takes it, or `None`.
        is_fixed (`bool`): whether λ never moves, so that f of a batch is computed once a step.
        scope (`str`): `"batch"` or `"prompt"`.
        positive_weight (`float`): c.
        drop_tied_groups (`bool`): whether groups of equal rewards leave the denominators.
        loss_type (`str`): TRL's.
        reduction (`str`, *optional*): the declared reduction of a subclass's loss.
    """

    def __init__(
        self,
        member: LengthWeight | None,
        lam: Callable[[], Tensor | None],
        *,
        is_fixed: bool,
        scope: str,
        positive_weight: float,
        drop_tied_groups: bool,
        loss_type: str,
        reduction: str | None,
    ) -> None:
        own = "sequence_mean" if loss_type in SEQUENCE_MEAN_LOSS_TYPES else "token_mean"
        self._is_token_mean = (reduction or own) == "token_mean"
        self._replaces_reduction = member is not None
        # With TRL's own reduction, the member that it amounts to.
        self._member = member or (DAPO() if self._is_token_mean else GRPO())
        self._lam = lam
        self._is_fixed = is_fixed
        self._dim = (1,) if scope == "prompt" else (0, 1)
        self._positive_weight = positive_weight
        self._drops_tied = drop_tied_groups
        self._last: tuple[GenerationBatch, int, Tensor] | None = None

    @property
    def depends_on_sign(self) -> bool:
        """Whether responses with A > 0 and with A < 0 are weighted differently."""
        return self._member.side != "both" or self._positive_weight != 1

    def weights_of(self, batch: GenerationBatch, step: int) -> Tensor:
        """f, (P, G); with TRL's own reduction, the weight that it amounts to."""
        if self._is_fixed and self._last is not None and self._last[0] is batch and self._last[1] == step:
            return self._last[2]
        rows, dtype = self._rows(batch, step), torch.float32 if batch.advantages is None else batch.advantages.dtype
        live = groups_with_signal(rows.statistic("rewards")) if self._drops_tied else None
        weights = weigh_responses(
            self._member, rows, self._lam(), positive_weight=self._positive_weight, live=live, dtype=dtype
        )
        self._last = (batch, step, weights)
        return weights

    def factor(self, weights: Tensor, batch: GenerationBatch, step: int) -> Tensor | None:
        """Factor of f, (P, G), on top of the loss's own reduction, flat, (P·G,); `None` where it is that reduction."""
        if self._replaces_reduction:
            return (
                weights if self._is_token_mean else sequence_mean_weights(weights, self._rows(batch, step))
            ).flatten()
        if self._positive_weight == 1:
            return None
        plain = weigh_responses(self._member, self._rows(batch, step), None, dtype=weights.dtype)
        return (weights / plain.masked_fill(plain == 0, 1)).flatten()

    def _rows(self, batch: GenerationBatch, step: int) -> ResponseRows:
        # float64 inside: exp(h^λ) magnifies rounding by h^λ, and (P, G) numbers cost nothing. MPS has no float64.
        work = torch.float32 if batch.lengths.device.type == "mps" else torch.float64
        return ResponseRows(
            batch.lengths.to(work),
            batch.token_count.to(batch.lengths.device, work),
            dim=self._dim,
            advantages=None if batch.advantages is None else batch.advantages.to(work),
            statistics={name: values.to(work) for name, values in batch.statistics.items()},
            step=step,
        )
