"""f of a generation batch's responses as a factor on advantages, and the copy of a micro-batch that carries it."""

from collections.abc import Callable
from typing import Any

import torch

from ..generation_batch import GenerationBatch
from ..weights import (
    LENGTH_WEIGHTS,
    LengthWeight,
    ResponseRows,
    groups_with_signal,
    sequence_mean_weights,
    weigh_responses,
)
from ..weights.rows import one_where_zero
from .contract import SEQUENCE_MEAN_LOSS_TYPES


class ResponseWeights:
    """
    f of every response, with λ as it is now.

    Args:
        member ([`LengthWeight`], *optional*): f; `None` for TRL's own reduction.
        lam (`Callable`): returns λ as the loss takes it, or `None`.
        scope (`str`): `"batch"` or `"prompt"`.
        positive_weight (`float`): c.
        drop_tied_groups (`bool`): whether groups of equal rewards leave the denominators.
        loss_type (`str`): TRL's.
        reduction (`str`, *optional*): the declared reduction of a subclass's loss.
    """

    def __init__(
        self,
        member: LengthWeight | None,
        lam: Callable[[], torch.Tensor | None],
        *,
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
        self._member = member or LENGTH_WEIGHTS["dapo" if self._is_token_mean else "grpo"]()
        self._lam = lam
        self._dim = (1,) if scope == "prompt" else (0, 1)
        self._positive_weight = positive_weight
        self._drops_tied = drop_tied_groups

    def weigh(self, batch: GenerationBatch, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        f, (P, G), and its factor on top of the loss's own reduction, flat, (P·G,); `None` where it is that reduction.

        With TRL's own reduction, f is the weight that it amounts to.
        """
        # float64 inside: exp(h^λ) magnifies rounding by h^λ, and (P, G) numbers cost nothing. MPS has no float64.
        work = torch.float32 if batch.lengths.device.type == "mps" else torch.float64
        rows = ResponseRows(
            batch.lengths.to(work),
            batch.token_count.to(batch.lengths.device, work),
            dim=self._dim,
            advantages=None if batch.advantages is None else batch.advantages.to(work),
            statistics={name: values.to(work) for name, values in batch.statistics.items()},
            step=step,
        )
        dtype = torch.float32 if batch.advantages is None else batch.advantages.dtype
        live = groups_with_signal(rows.statistic("rewards")) if self._drops_tied else None
        f = weigh_responses(
            self._member, rows, self._lam(), positive_weight=self._positive_weight, live=live, dtype=dtype
        )
        if self._replaces_reduction:
            return f, (f if self._is_token_mean else sequence_mean_weights(f, rows)).flatten()
        if self._positive_weight == 1:
            return f, None
        return f, (f / one_where_zero(weigh_responses(self._member, rows, None, dtype=dtype))).flatten()


class WeightedInputs(dict[str, Any]):
    """
    A copy of one micro-batch whose advantages carry the weights. It records whether the loss has read them.

    A loss that reads an entry before the weights are in it, or from elsewhere, would train something else in silence.
    """

    def __init__(self, inputs: dict[str, Any], *, has_gradient: bool) -> None:
        super().__init__(inputs)
        self.has_gradient = has_gradient  # of the loss that they are for
        self._pending: set[str] = set()  # what the loss has yet to read
        self._counts_reads = False

    def peek(self, key: str) -> Any:
        """An entry, or `None`, without counting as a reader."""
        return super().get(key)

    def scale_advantages(self, weights: torch.Tensor) -> None:
        """Multiply advantages of shape (B,) or (B, T) by weights of shape (B,) or (B, T)."""
        advantages = super().__getitem__("advantages")
        if weights.dim() > advantages.dim():
            advantages = advantages.unsqueeze(1)
        elif weights.dim() < advantages.dim():
            weights = weights.unsqueeze(1)
        super().__setitem__("advantages", advantages * weights)

    def scale_ratio(self, logps: torch.Tensor, weights: torch.Tensor) -> None:
        """Put weights (B, T) into the importance ratio by way of the old log-probabilities."""
        old = super().get("old_per_token_logps")
        old = logps.detach() if old is None else old
        super().__setitem__("old_per_token_logps", old - weights.log())
        self._pending.add("old_per_token_logps")

    def count_reads(self) -> None:
        """
        Count reads from now on: the loss has its log-probabilities, and the weights go in.

        Raises:
            `RuntimeError`: the loss has asked for log-probabilities before.
        """
        if self._counts_reads:
            raise RuntimeError(
                "The loss asked for the policy's log-probabilities twice, and would have weighted its tokens twice. "
                "A subclass with a second term should compute it by calling the model itself."
            )
        self._counts_reads = True
        self._pending.add("advantages")

    def check_consumed(self, trainer_class: type) -> None:
        """
        Raise a `RuntimeError` if the loss was computed without reading the weighted entries. It names a class that may
        have passed on a copy of the inputs.
        """
        if not self._pending and self._counts_reads:
            return
        entries = ", ".join(sorted(self._pending)) or "inputs"
        between = [
            f"{cls.__name__}.{name}"
            for cls in trainer_class.__mro__
            for name in ("compute_loss", "_compute_loss")
            if name in vars(cls) and not cls.__module__.startswith(("trl.", "transformers.", "trl_lambda."))
        ]
        cause = (
            f"{' and '.join(between)} may pass on a copy of `inputs`, such as dict(inputs), which the weights do "
            "not reach: pass on `inputs` itself, with its entries changed."
            if between
            else "trl_lambda does not support this TRL or this combination of options."
        )
        raise RuntimeError(
            f"TRL computed the loss without reading the weighted {entries}: the weights had no effect. {cause}"
        )

    def __getitem__(self, key: str) -> Any:
        self._pending.discard(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._pending.discard(key)
        return super().get(key, default)
