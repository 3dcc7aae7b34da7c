"""The copy of a micro-batch that carries the weights into TRL's loss."""

import torch


class WeightedInputs(dict):
    """
    A copy of one micro-batch whose advantages carry the weights, and which knows whether the loss has read them.

    A TRL that reads an entry before the weights are in it, or from elsewhere, must not train something else in
    silence.
    """

    def __init__(self, inputs: dict):
        super().__init__(inputs)
        advantages: torch.Tensor = inputs["advantages"]
        self.unweighted_advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages  # (B, 1 or T)
        self.length_weight: torch.Tensor | None = None  # (B,)
        self.length_bins: torch.Tensor | None = None
        self._pending: set[str] = {"advantages"}
        self._complete = False

    def scale_advantages(self, weights: torch.Tensor) -> None:
        """Multiply advantages of shape (B,) or (B, T) by weights of shape (B,) or (B, T)."""
        advantages = super().__getitem__("advantages")
        if weights.dim() > advantages.dim():
            advantages = advantages.unsqueeze(1)
        elif weights.dim() < advantages.dim():
            weights = weights.unsqueeze(1)
        super().__setitem__("advantages", advantages * weights)

    def log_ratio(self, logps: torch.Tensor) -> torch.Tensor:
        """log ρ of the tokens, (B, T), a constant: 0 where TRL takes the old log-probabilities from this very pass."""
        old = super().get("old_per_token_logps")
        return torch.zeros_like(logps) if old is None else logps.detach() - old

    def scale_ratio(self, logps: torch.Tensor, weights: torch.Tensor) -> None:
        """Put weights (B, T) into the importance ratio by way of the old log-probabilities."""
        old = super().get("old_per_token_logps")
        old = logps.detach() if old is None else old
        super().__setitem__("old_per_token_logps", old - weights.log())
        self._pending.add("old_per_token_logps")

    def complete(self) -> None:
        """
        All weights are in.

        Raises:
            `RuntimeError`: they were in already: the loss has asked for log-probabilities twice.
        """
        if self._complete:
            raise RuntimeError(
                "The loss asked for the policy's log-probabilities twice, and would have weighted its tokens twice. "
                "trl_lambda does not support this TRL or this subclass of its trainer."
            )
        self._complete = True

    def check_consumed(self, trainer_class: type) -> None:
        """
        Raises:
            `RuntimeError`: the loss was computed without reading the weighted entries after they were complete; the
                message names a class that may have passed on a copy of the inputs.
        """
        if not self._pending and self._complete:
            return
        entries = ", ".join(sorted(self._pending)) or "inputs"
        methods = ("compute_loss", "_compute_loss")
        between = [
            f"{cls.__name__}.{name}"
            for cls in trainer_class.__mro__
            for name in methods
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
        if self._complete:
            self._pending.discard(key)

    def __getitem__(self, key):
        self._note(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self._note(key)
        return super().get(key, default)
