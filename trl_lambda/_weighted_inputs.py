"""The copy of a micro-batch that carries the weights into TRL's loss."""

import torch

# Entries added to the scored batch. Dimension 0 is this process's rows, so that TRL's shuffle and split keep them
# right: the lengths of the whole generation batch, once per row, and the row's own place in it.
LENGTHS_KEY = "generation_batch_lengths"
ROW_KEY = "generation_batch_row"


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

    def check_consumed(self) -> None:
        """
        Raises:
            `RuntimeError`: the loss was computed without reading the weighted entries after they were complete.
        """
        if self._pending or not self._complete:
            raise RuntimeError(
                f"TRL computed the loss without reading the weighted {', '.join(sorted(self._pending)) or 'inputs'}: "
                "the weights had no effect. trl_lambda does not support this TRL or this combination of options."
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


def own_tokens(inputs: dict) -> torch.Tensor:
    """Mask of the tokens that the policy itself wrote and that count in the loss, (B, T)."""
    mask, tool_mask = inputs["completion_mask"], inputs.get("tool_mask")
    return mask if tool_mask is None else mask * tool_mask
