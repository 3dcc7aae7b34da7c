"""The trainer's hooks that measure what the weights do, and log it through TRL."""

import warnings

import torch

from ._completion_table import CompletionTable
from ._generation_batch import ROW_KEY, GenerationBatch, own_tokens
from ._weighted_inputs import WeightedInputs
from .diagnostics import clipped_by_weight, clipped_tokens
from .lambda_grpo_config import CLIPPED_LOSS_TYPES
from .loss_tally import LossTally


class LossMetricsMixin:
    """Metrics of the weights, for a trainer that calls the `_note_…` methods where their tensors exist."""

    def _start_metrics(self) -> None:
        """Call it once `GRPOTrainer.__init__` is through."""
        self._tally = {"train": LossTally(), "eval": LossTally()}
        columns = {"length_weight": self.args.aggregation, "mean_token_weight": self.args.token_regulation}
        self._columns = tuple(name for name, member in columns.items() if member is not None)
        self._completion_table: CompletionTable | None = None
        self._columns_are_free = True

    def _note_responses(self, batch: GenerationBatch) -> None:
        """Take a new generation batch into the metrics."""
        mode = "train" if self.model.training else "eval"
        lengths = batch.lengths
        if batch.advantages is not None:
            self._tally[mode].add_responses(lengths, batch.advantages)
        self._start_table()
        if self._completion_table is not None:
            self._completion_table.append_rows(mode, lengths.numel(), self._logs["extra"])

    def _start_table(self) -> None:
        """Make the table's columns at the first rows, but for those that a reward function logs under their name."""
        if self._completion_table is not None or not (self.log_completions and self._columns_are_free):
            return
        taken = [name for name in self._columns if self._logs["extra"].get(name)]
        if taken:
            warnings.warn(
                f"a reward function logs {', '.join(taken)} with log_extra: the table of completions keeps its "
                "values, and not the weights of trl_lambda. Use another name there to have both.",
                UserWarning,
                stacklevel=2,
            )
        columns = tuple(name for name in self._columns if name not in taken)
        self._columns_are_free = bool(columns)
        if columns:
            self._completion_table = CompletionTable(columns, self._logs["prompt"].maxlen, self.accelerator.device)

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

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        # All processes come by here, whoever ordered the log; `log` itself may be called on one of them alone. What
        # the last log of a run leaves over goes into the run's summary.
        due = self.control.should_log and self.state.global_step > self._globalstep_last_logged
        if due or self.control.should_training_stop:
            self.reduce_metrics("train")
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def reduce_metrics(self, mode: str) -> None:
        """Reduce the weights' metrics since the last call over the processes, for the next `log`."""
        metrics = self._tally[mode].flush(self.accelerator)
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        if metrics and mode == "train" and self._lambda is not None:
            # Read for a log only: it waits for the model's optimizer.
            self._metrics[mode]["lambda/value"] = [self.lambda_value]
        if self._completion_table is not None:
            self._completion_table.write(self.accelerator, self._logs["extra"])

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        self.reduce_metrics("eval")
        return output
