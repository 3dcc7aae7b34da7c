"""The trainer's hooks that measure what the weights do, and log it through TRL."""

import torch
from transformers import TrainerCallback

from ._completion_table import CompletionTable
from ._weighted_inputs import ROW_KEY, WeightedInputs, own_tokens
from .diagnostics import clipped_by_weight, clipped_tokens
from .lambda_grpo_config import CLIPPED_LOSS_TYPES
from .loss_tally import LossTally


class LossMetricsMixin:
    """Metrics of the weights, for a trainer that calls the `_note_…` methods where their tensors exist."""

    def _start_metrics(self) -> None:
        """Call it once `GRPOTrainer.__init__` is through."""
        self._tally = {"train": LossTally(), "eval": LossTally()}
        if self._weighted:
            self.add_callback(_ReduceMetrics(self))
        columns = {"length_weight": self.args.aggregation, "mean_token_weight": self.args.token_regulation}
        columns = tuple(name for name, member in columns.items() if member is not None)
        self._completion_table: CompletionTable | None = None
        if self.log_completions and columns:
            self._completion_table = CompletionTable(columns, self._logs["prompt"].maxlen, self.accelerator.device)

    def _note_responses(self, lengths: torch.Tensor, advantages: torch.Tensor | None) -> None:
        """Take a new generation batch into the metrics: all lengths, (P, G), and all advantages, if one per row."""
        mode = "train" if self.model.training else "eval"
        if advantages is not None:
            self._tally[mode].add_responses(lengths, advantages.view_as(lengths))
        if self._completion_table is not None:
            self._completion_table.append_rows(mode, lengths.numel(), self._logs["extra"])

    @torch.no_grad()
    def _note_tokens(
        self, inputs: WeightedInputs, logps: torch.Tensor, weights: torch.Tensor | None, log_ratio: torch.Tensor
    ) -> None:
        """Take the tokens of a micro-batch into the metrics; v, log-probabilities and log ρ (without v) are (B, T)."""
        args, mask, advantages = self.args, own_tokens(inputs), inputs.unweighted_advantages
        mode = "train" if self.model.training else "eval"
        tally = self._tally[mode]
        if self._completion_table is not None:
            row_values = {} if args.aggregation is None else {"length_weight": inputs.length_weight}
            if weights is not None:
                row_values["mean_token_weight"] = (weights * mask).sum(dim=1) / mask.sum(dim=1)
            self._completion_table.fill(mode, inputs[ROW_KEY], row_values)
        if not args.token_metrics:
            return
        mass = (advantages.abs() * inputs.length_weight.unsqueeze(1)).expand_as(logps)
        if weights is not None:
            bounds = (args.regulation_min, args.regulation_max) if args.token_regulation == "sigmoid" else None
            tally.add_token_weights(weights, mask, bounds)
            mass = mass * weights
        if self.loss_type in (*CLIPPED_LOSS_TYPES, "luspo"):
            clip = (self.epsilon_low, self.epsilon_high, args.delta)
            if args.regulation_inside_clip:
                clipped = clipped_by_weight(log_ratio, weights, advantages, *clip)
                tally.add_clipped_by_regulation(clipped, mask)
                log_ratio = log_ratio + weights.log()
            if self.importance_sampling_level == "sequence":
                log_ratio = (log_ratio * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
            tally.add_clipped(clipped_tokens(log_ratio.exp(), advantages, *clip), advantages, mask)
        tally.add_shares(mass, inputs.length_bins, logps, mask)

    def reduce_metrics(self, mode: str) -> None:
        """
        Reduce the weights' metrics since the last call over the processes, for the next `log`.

        It is called where all processes come by, before each log and after each evaluation, because `log` itself may
        be called on one of them alone.
        """
        for name, value in self._tally[mode].flush(self.accelerator).items():
            self._metrics[mode][name].append(value)
        if self._completion_table is not None:
            self._completion_table.write(self.accelerator, self._logs["extra"])

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        self.reduce_metrics("eval")
        return output


class _ReduceMetrics(TrainerCallback):
    """Reduce the weights' metrics on all processes when a log is due."""

    def __init__(self, trainer: LossMetricsMixin):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log:
            self.trainer.reduce_metrics("train")

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer.reduce_metrics("train")
