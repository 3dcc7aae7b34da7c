"""`LambdaGRPOTrainer` and `TRGRPOTrainer`: one training step, read from top to bottom.

TRL scores a generation batch; lengths and advantages of all its rows are kept. At each loss, once TRL has the current
log-probabilities, the advantages of a copy of the micro-batch become ``f·v·A``; the loss is TRL's own. Every surrogate
of TRL is linear in the advantage and otherwise looks at its sign only, so that a positive factor on the advantage is
that factor on the token's term of the policy loss. KL, entropy bonus and auxiliary losses are added by TRL afterwards
and stay unweighted. Then the optimizers step, λ's with the model's, and λ is saved with it.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from .lambda_grpo_config import LambdaGRPOConfig, TRGRPOConfig
from .metrics.completions_table import WeightColumn
from .metrics.loss_metrics import LossMetrics, Surrogate, Tokens
from .model_card import LAMBDA_PAPER, TR_PAPER, complete_card, weight_tags
from .preference.checkpoint import LambdaCheckpoint, identity_of
from .preference.step import LambdaStep, make_lambda
from .preference.whole_checkpoint import check_whole
from .trl_seam.contract import check_contract
from .trl_seam.generation_batch import ROW_KEY, Scoring, own_tokens
from .trl_seam.refusals import refuse_other_losses, refuse_unsupported
from .trl_seam.response_weights import ResponseWeights
from .trl_seam.weighted_inputs import WeightedInputs, left_in_loss
from .weights import LengthWeight, TokenWeight, as_length_weight, as_token_weight, weigh_tokens
from .weights.custom import features_of


class LambdaGRPOTrainer(GRPOTrainer):
    """
    `GRPOTrainer` with the aggregation ``Σ_i f_i Σ_t v(π_it) ℓ_it / Σ_i |o_i|`` of TRL's own token losses ℓ.

    f is a length weight with a learnable λ (this project's reading of arXiv 2510.06870), v a weight increasing in the
    policy's probability of the token (arXiv 2511.00066); both are chosen in [`LambdaGRPOConfig`], or passed here. The
    other arguments are those of [`~trl.GRPOTrainer`], in the same order.

    A subclass that replaces TRL's `_compute_loss` declares how its loss is reduced, or the weights are refused:
    `loss_reduction = "token_mean"`, `"sequence_mean"` or `"sequence"`.

    Args:
        args ([`LambdaGRPOConfig`], *optional*):
            Configuration. If `None`, a default one is made as TRL does.
        length_weight (`Callable` or [`LengthWeight`], *optional*):
            f of your own in place of `aggregation`: called by name with any of `lengths`, `advantages` (P, G) and
            `lam`, returns weights > 0, (P, G). It has a λ if it names `lam`. See [`LengthWeight`].
        token_weight (`Callable` or [`TokenWeight`], *optional*):
            v of your own in place of `token_regulation`: called with `probs`, π of the sampled tokens, returns weights
            > 0 of the same shape.

    Raises:
        `ValueError`: `args` is a plain `GRPOConfig`, or something the weights cannot be honoured with is on; before
            any model is loaded.
        `RuntimeError`: the installed TRL does not have what the weights go through.
    """

    _tag_names = ["trl", "grpo"]  # the model card adds what the options are
    _name = "LambdaGRPO"
    _paper = LAMBDA_PAPER
    _config_class: type[LambdaGRPOConfig] = LambdaGRPOConfig
    loss_reduction: str | None = None  # of a subclass with a `_compute_loss` of its own
    # As they are here; transformers declares what any trainer may have.
    args: LambdaGRPOConfig
    model: torch.nn.Module
    _buffered_inputs: list[dict[str, Any]]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: LambdaGRPOConfig | None = None,
        *trl_args: Any,
        length_weight: Callable[..., Tensor] | LengthWeight | None = None,
        token_weight: Callable[..., Tensor] | TokenWeight | None = None,
        **trl_kwargs: Any,
    ) -> None:
        check_contract(GRPOTrainer)
        if args is None:
            model_name = model if isinstance(model, str) else model.config._name_or_path
            args = self._config_class(f"{model_name.split('/')[-1]}-{self._name}")
        refuse_unsupported(type(self), args, self._config_class)
        own_f = None if length_weight is None else as_length_weight(length_weight)
        own_v = None if token_weight is None else as_token_weight(token_weight)
        f, v = self.length_weight, self.token_weight = args.validate(own_f, own_v)
        self._is_weighted = bool(f or v or args.positive_weight != 1)
        if self._is_weighted:
            refuse_other_losses(type(self), f, v)
        is_custom = bool(own_f or own_v)
        if is_custom:  # logs and trackers show the names of what is used
            args = copy.copy(args)
            args.aggregation, args.token_regulation = f and f.name, v and v.name

        self._has_scored = False  # a generation batch that is new to `_prepare_inputs`
        self._loss_inputs: WeightedInputs | None = None
        self._weight_column = WeightColumn()
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)

        # A completion may hold what the policy has not written; the same on every process.
        with_turns = bool(getattr(self, "tools", None)) or getattr(self, "rollout_func", None) is not None
        group_sizes: Any = {"train": self.num_generations, "eval": self.num_generations_eval}
        self._scoring = Scoring(self.accelerator, group_sizes, features_of(f), with_turns=with_turns)
        self._lambda = make_lambda(args, f, device=self.accelerator.device, num_iterations=self.num_iterations)
        is_sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        self._lambda_step = LambdaStep(self._lambda, args, self.accelerator, self._metrics, is_sharded=is_sharded)
        self.add_callback(self._lambda_step)
        self._lambda_files = LambdaCheckpoint(self._lambda, identity_of(args, f, own_v), is_custom=is_custom)
        self._response_weights = ResponseWeights(f, self._lambda, args, self.loss_reduction)
        self._loss_metrics = LossMetrics(Surrogate.of(args), v and v.bounds, with_turns=with_turns)

    @property
    def lambda_value(self) -> float | None:
        """λ now; `None` where f has none."""
        return None if self._lambda is None else self._lambda.value

    @property
    def lambda_values(self) -> dict[str, float]:
        """λ of every feature that it weighs, by name; empty where f has none."""
        return {} if self._lambda is None else dict(zip(self._lambda.features, self._lambda.values, strict=True))

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    # ---- Scoring: lengths and advantages, where the whole generation batch is visible ----

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self._is_weighted:
            self._scoring.number_rows(output)
            if self._scoring.features:
                forward = functools.partial(self._get_per_token_logps_and_entropies, self.model)
                train, held_out = self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size
                self._scoring.score_features(output, forward, train if self.model.training else held_out)
            self._scoring.take(self._mode, [output])
            self._has_scored = True
        return output

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        if self._has_scored:
            self._has_scored = False
            if type(self)._generate_and_score_completions is not LambdaGRPOTrainer._generate_and_score_completions:
                # A subclass may have masked rows or changed advantages since they were gathered: take them again.
                self._scoring.take(self._mode, self._buffered_inputs if self.model.training else [inputs])
            batch = self._scoring.batches[self._mode]
            self._loss_metrics.note_generation_batch(self._mode, batch)
            if self.model.training:
                self._lambda_step.observe(batch)
            if self.log_completions and self.length_weight is not None:
                self._weight_column.fill(self._logs["extra"], self._response_weights.of(batch))
        return inputs

    # ---- The loss: A ← f·v·A where the current log-probabilities exist ----

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        if not self._is_weighted:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # A copy: the buffered micro-batch is used again when num_iterations > 1.
        weighted = self._loss_inputs = WeightedInputs(inputs)
        try:
            loss = super().compute_loss(model, weighted, return_outputs, num_items_in_batch)
        finally:
            self._loss_inputs = None
        weighted.check_consumed(type(self))
        return self._lambda_step.after_loss(loss)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        # While training, a call without gradient is of another model, or of this one for another purpose.
        if self._loss_inputs is not None and (torch.is_grad_enabled() or not self.model.training):
            self._weigh(self._loss_inputs, outputs[0])
        return outputs

    def _weigh(self, inputs: WeightedInputs, logps: Tensor) -> None:
        """A ← f·v·A, with v from the current log-probabilities, (B, T), and f from λ as it is now."""
        advantages, old_logps = inputs.peek("advantages"), inputs.peek("old_per_token_logps")
        rows, batch = inputs.peek(ROW_KEY), self._scoring.batches[self._mode]
        f = self._response_weights.of(batch)  # (P, G)
        factor = self._response_weights.factor(f, batch)
        if factor is not None:
            inputs.scale_advantages(factor[rows])
        v = None if self.token_weight is None else weigh_tokens(self.token_weight, logps)
        if v is not None and self.args.regulation_inside_clip:
            inputs.scale_ratio(logps, v)
        elif v is not None:
            inputs.scale_advantages(v)
        inputs.complete()

        if factor is not None:
            signs = batch.advantages if self._response_weights.looks_at_sign else None
            self._loss_metrics.note_length_weights(self._mode, f, signs)
        if self.args.token_metrics:
            mask, logps = own_tokens(inputs), logps.detach()
            unweighted = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
            left = left_in_loss(self, inputs, unweighted, logps, mask)
            tokens = Tokens(batch, rows, f.detach(), mask, left, logps, old_logps, unweighted, v)
            self._loss_metrics.note_tokens(self._mode, tokens)

    # ---- λ's parameter group and its step ----

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        self._lambda_step.join(optimizer, is_new=is_new)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._lambda_step.before_loss(self.optimizer, self.lr_scheduler, self.model)
        loss = super().training_step(*args, **kwargs)
        self._lambda_step.after_backward()
        return loss

    # ---- Logs ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # All processes come by here, whoever ordered the log; `log` itself may be called on one of them alone. What
        # the last log of a run leaves over goes into the run's summary.
        due = self.control.should_log and self.state.global_step > self._globalstep_last_logged
        if due or self.control.should_training_stop:
            self.reduce_metrics("train")
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        self.reduce_metrics("eval")
        return output

    def reduce_metrics(self, mode: str) -> None:
        """Reduce the weights' metrics since the last call over the processes, for TRL's next `log`."""
        metrics = self._loss_metrics.flush(mode, self.accelerator)
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        if metrics and mode == "train" and self._lambda is not None:
            self._metrics[mode] |= {name: [value] for name, value in self._lambda.metrics().items()}

    def _log_completion_extra(self, column: str, values: list[Any]) -> None:
        self._weight_column.note_column(column)
        super()._log_completion_extra(column, values)

    # ---- To disk and back ----

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._lambda_files.write(output_dir or str(self.args.output_dir), self.state.global_step)

    def _save_optimizer_and_scheduler(self, output_dir: Any) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:  # with sharded FSDP checkpoints `_save` is not called
            self._lambda_files.write(output_dir, self.state.global_step)
            self._lambda_files.write_optimizer(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        check_whole(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        load = functools.partial(super()._load_optimizer_and_scheduler, checkpoint)
        if checkpoint is None:
            return load()
        self._lambda_step.settle(self.optimizer, self.model)  # what has been built by now is what is loaded into
        self._lambda_files.load(checkpoint, self.optimizer, self.lr_scheduler, load, owned=self._lambda_step.is_owned)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._lambda_files.load_value(str(self.state.best_model_checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: Any) -> None:
        if self.args.should_save:
            self._lambda_files.copy_for_push(checkpoint_folder, str(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write TRL's model card with the weights' settings. Arguments are TRL's: without `model_name` it is the folder's
        name, and `lambda-grpo` and `tr-grpo` are added to `tags` where they apply.
        """
        model_name = model_name or Path(str(self.args.output_dir)).resolve().name
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=weight_tags(self, tags))
        if self.is_world_process_zero():
            complete_card(self)


class TRGRPOTrainer(LambdaGRPOTrainer):
    """[`LambdaGRPOTrainer`] with [`TRGRPOConfig`]: TR-GRPO's token weight (arXiv 2511.00066) on TRL's reduction."""

    _name = "TRGRPO"
    _paper = TR_PAPER
    _config_class = TRGRPOConfig
