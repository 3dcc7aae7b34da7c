"""The copy of a micro-batch that carries the weights into TRL's loss."""

from typing import Any

from torch import Tensor


class WeightedInputs(dict[str, Any]):
    """
    A copy of one micro-batch whose advantages carry the weights. It records whether the loss has read them.

    A loss that reads an entry before the weights are in it, or from elsewhere, would train something else in silence.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__(inputs)
        self._pending: set[str] = {"advantages"}
        self._counts_reads = False

    def peek(self, key: str) -> Any:
        """An entry, or `None`, without counting as a reader."""
        return super().get(key)

    def scale_advantages(self, weights: Tensor) -> None:
        """Multiply advantages of shape (B,) or (B, T) by weights of shape (B,) or (B, T)."""
        advantages = super().__getitem__("advantages")
        if weights.dim() > advantages.dim():
            advantages = advantages.unsqueeze(1)
        elif weights.dim() < advantages.dim():
            weights = weights.unsqueeze(1)
        super().__setitem__("advantages", advantages * weights)

    def scale_ratio(self, logps: Tensor, weights: Tensor) -> None:
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
        cause = "trl_lambda does not support this TRL or this combination of options."
        if between:
            cause = (
                f"{' and '.join(between)} may pass on a copy of `inputs`, such as dict(inputs), which the weights do "
                "not reach: pass on `inputs` itself, with its entries changed."
            )
        raise RuntimeError(
            f"TRL computed the loss without reading the weighted {entries}: the weights had no effect. {cause}"
        )

    def _note(self, key: str) -> None:
        if self._counts_reads:
            self._pending.discard(key)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)
