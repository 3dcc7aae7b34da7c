"""`LambdaGRPOTrainer` and `TRGRPOTrainer`: hooks into `GRPOTrainer`, which keeps its own loss.

The weights enter where TRL lets them: f is multiplied into the advantages before the loss, v once TRL has the current
log-probabilities, both in a copy of the inputs. Every surrogate of TRL is linear in the advantage and otherwise looks
at its sign only, so that a positive factor on the advantage is that factor on the token's term of the policy loss. KL,
entropy bonus and auxiliary losses are added by TRL afterwards and stay unweighted.
"""

import math

import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

from ._generation_batch import ROW_KEY, GenerationBatch, gather_generation_batch, number_rows
from ._lambda_checkpoint import LambdaCheckpointMixin
from ._loss_metrics import LossMetricsMixin
from ._refusals import refuse_other_losses, refuse_unsupported
from ._trl_contract import check_contract
from ._weighted_inputs import WeightedInputs
from .companion import companion_class, engine_owns_optimizer, lambda_eps
from .diagnostics import quartile_index
from .lambda_grpo_config import LambdaGRPOConfig, TRGRPOConfig
from .lambda_parameter import LambdaParameter, base_learning_rate, unwrap_optimizer
from .model_card import LAMBDA_PAPER, TR_PAPER, ModelCardMixin
from .weights import length_weights, probability_weights, sequence_mean_weights


class LambdaGRPOTrainer(LossMetricsMixin, LambdaCheckpointMixin, ModelCardMixin, GRPOTrainer):
    """
    `GRPOTrainer` with the aggregation ``Σ_i f_i(λ) Σ_t v(π_it) ℓ_it / Σ_i |o_i|`` of TRL's own token losses ℓ.

    f is a length weight with a learnable λ (this project's reading of arXiv 2510.06870), v a weight increasing in the
    policy's probability of the token (arXiv 2511.00066); both are chosen in [`LambdaGRPOConfig`]. All arguments are
    those of [`~trl.GRPOTrainer`], in the same order.

    A subclass that replaces TRL's `_compute_loss` declares how its loss is reduced, or the weights are refused:
    `loss_reduction = "token_mean"`, `"sequence_mean"` or `"sequence"`.

    Args:
        args ([`LambdaGRPOConfig`], *optional*):
            Configuration. If `None`, a default one is made as TRL does.

    Raises:
        `ValueError`: `args` is a plain `GRPOConfig`, or something the weights cannot be honoured with is on; before
            any model is loaded.
        `RuntimeError`: the installed TRL does not have what the weights go through.
    """

    _tag_names = ["trl", "grpo"]  # the model card adds what the options are
    _name = "LambdaGRPO"
    _paper = LAMBDA_PAPER
    _config_class = LambdaGRPOConfig
    # What a subclass with a `_compute_loss` of its own declares its reduction to be: see `refuse_other_losses`.
    loss_reduction: str | None = None

    def __init__(self, model, reward_funcs=None, args: LambdaGRPOConfig | None = None, *trl_args, **trl_kwargs):
        check_contract(GRPOTrainer)
        if args is None:
            model_name = model if isinstance(model, str) else model.config._name_or_path
            args = self._config_class(f"{model_name.split('/')[-1]}-{self._name}")
        refuse_unsupported(type(self), args, self._config_class)
        refuse_other_losses(type(self), args)

        self._lambda: LambdaParameter | None = None
        self._weighted = args.aggregation is not None or args.token_regulation is not None
        self._generation_batches: dict[str, GenerationBatch] = {}  # the last of "train" and of "eval"
        self._rows_scored = 0  # of a generation batch that is new to `_prepare_inputs`
        self._loss_inputs: WeightedInputs | None = None
        self._trainer_built_optimizer = False
        self._seen_optimizer: object = None
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        if args.has_lambda:
            self._lambda = LambdaParameter(
                args.lambda_init,
                learnable=args.lambda_learnable,
                bounds=args.lambda_bounds,
                max_grad_norm=args.lambda_max_grad_norm,
                device=self.accelerator.device,
            )
            self.add_callback(_LambdaStep(self))
        self._start_metrics()

    @property
    def lambda_value(self) -> float | None:
        """λ now; `None` when `aggregation` is a member without λ."""
        return None if self._lambda is None else self._lambda.value

    # ---- Lengths, where the whole generation batch is visible ----

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self._weighted:
            number_rows(output, self.accelerator)
            self._rows_scored = output["completion_mask"].size(0)
            self._take_generation_batch([output])
        return output

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if self._rows_scored:
            if type(self)._generate_and_score_completions is not LambdaGRPOTrainer._generate_and_score_completions:
                # A subclass may have masked rows or changed advantages since they were gathered: take them again.
                self._take_generation_batch(self._buffered_inputs if self.model.training else [inputs])
            self._note_responses(self._generation_batches["train" if self.model.training else "eval"])
            self._rows_scored = 0
        return inputs

    def _take_generation_batch(self, micro_batches: list[dict]) -> None:
        """Keep lengths and advantages of all processes' rows, from this process's share of them."""
        training = self.model.training
        self._generation_batches["train" if training else "eval"] = gather_generation_batch(
            micro_batches,
            self._rows_scored,
            self.num_generations if training else self.num_generations_eval,
            self.accelerator,
        )

    # ---- The loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self._weighted:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # A copy: the buffered micro-batch is used again when num_iterations > 1.
        weighted = WeightedInputs(inputs)
        self._weight_responses(weighted)
        self._loss_inputs = weighted
        try:
            loss = super().compute_loss(model, weighted, return_outputs, num_items_in_batch)
        finally:
            self._loss_inputs = None
        weighted.check_consumed(type(self))
        parameter = self._lambda
        if parameter is not None and parameter.companion is not None and self.accelerator.mixed_precision == "fp16":
            loss = parameter.probe_scale(loss)
        return loss

    def _weight_responses(self, inputs: WeightedInputs) -> None:
        """Multiply f into the advantages, from the lengths of the whole generation batch and λ as it is now."""
        lengths = self._generation_batches["train" if self.model.training else "eval"].lengths  # (P, G)
        own = inputs[ROW_KEY]  # (B,)
        if self.args.token_metrics:
            inputs.length_bins = quartile_index(lengths, lengths > 0).flatten()[own]
        if self.args.aggregation is None:  # TRL's own reduction; the diagnostics count its weight all the same
            member = "grpo" if self.loss_type in ("grpo", "sapo") else "dapo"
            inputs.length_weight = length_weights(lengths, aggregation=member).flatten()[own]
            return
        weights = length_weights(
            lengths,
            None if self._lambda is None else self._lambda.tensor,
            aggregation=self.args.aggregation,
            scope=self.args.aggregation_scope,
            length_scale=self.args.length_scale,
            max_completion_length=self.max_completion_length,
        )
        self._tally["train" if self.model.training else "eval"].add_length_weights(weights)
        inputs.length_weight = weights.detach().flatten()[own]
        reduction = self.loss_reduction or ("sequence_mean" if self.loss_type == "sapo" else "token_mean")
        if reduction != "token_mean":
            weights = sequence_mean_weights(weights, lengths)
        inputs.scale_advantages(weights.flatten()[own])

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        # While training, a call without gradient is of another model, or of this one for another purpose.
        if self._loss_inputs is not None and (torch.is_grad_enabled() or not self.model.training):
            self._weight_tokens(self._loss_inputs, outputs[0])
        return outputs

    def _weight_tokens(self, inputs: WeightedInputs, logps: torch.Tensor) -> None:
        """Multiply v into the advantages, or into the ratio, now that the current log-probabilities exist."""
        weights, log_ratio = None, inputs.log_ratio(logps)
        if self.args.token_regulation is not None:
            weights = probability_weights(
                logps,
                regulation=self.args.token_regulation,
                alpha=self.args.regulation_alpha,
                slope=self.args.regulation_slope,
                center=self.args.regulation_center,
                min=self.args.regulation_min,
                max=self.args.regulation_max,
            )
            if self.args.regulation_inside_clip:
                inputs.scale_ratio(logps, weights)
            else:
                inputs.scale_advantages(weights)
        self._note_tokens(inputs, logps.detach(), weights, log_ratio)
        inputs.complete()

    # ---- λ's parameter group ----

    def create_optimizer(self, *args, **kwargs):
        self._trainer_built_optimizer |= self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        parameter = self._lambda
        if parameter is None or not parameter.learnable or not self._trainer_built_optimizer:
            return optimizer
        if not engine_owns_optimizer(self) and not parameter.in_optimizer(optimizer):
            eps = lambda_eps(self.args, optimizer)
            parameter.add_group(optimizer, learning_rate=self.args.lambda_learning_rate, adam_eps=eps)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint):
        if self._lambda is not None and self._lambda.learnable:
            self._place_lambda()  # what has been built by now is what the checkpoint is loaded into
        super()._load_optimizer_and_scheduler(checkpoint)

    def _place_lambda(self) -> None:
        """Give λ a companion where the trainer's optimizer, as an engine or the user built it, does not hold it."""
        parameter, args, optimizer = self._lambda, self.args, unwrap_optimizer(self.optimizer)
        if optimizer is not self._seen_optimizer:  # before its first step: a plateau schedule keeps no initial rate
            self._seen_optimizer = optimizer
            parameter.model_learning_rate = base_learning_rate(optimizer, args.learning_rate)
        if not parameter.in_optimizer(optimizer) and parameter.companion is None:
            user_built = not (self._trainer_built_optimizer and engine_owns_optimizer(self))
            optimizer_class, options = companion_class(args, self.model, user_built=user_built)
            parameter.make_companion(optimizer_class, options, learning_rate=args.lambda_learning_rate)
            parameter.set_eps(lambda_eps(args, parameter.companion))
        if parameter.in_optimizer(optimizer) and parameter.companion is not None:
            raise RuntimeError(
                "λ is in the trainer's optimizer and has a companion of its own: two optimizers would step it. The "
                "optimizer was replaced between two calls of train(): build a new trainer instead."
            )

    def training_step(self, *args, **kwargs):
        parameter = self._lambda
        if parameter is None or not parameter.learnable:
            return super().training_step(*args, **kwargs)
        self._place_lambda()
        # Before the loss: an engine may advance the schedule inside backward.
        parameter.follow_schedule(self.lr_scheduler, unwrap_optimizer(self.optimizer))
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            parameter.reduce_gradient(self.accelerator)
        return loss


class TRGRPOTrainer(LambdaGRPOTrainer):
    """
    [`LambdaGRPOTrainer`] for the token weight of TR-GRPO (arXiv 2511.00066) alone: its configuration is
    [`TRGRPOConfig`], which leaves TRL's reduction as it is.
    """

    _name = "TRGRPO"
    _paper = TR_PAPER
    _config_class = TRGRPOConfig


class _LambdaStep(TrainerCallback):
    """λ's part of the optimizer step: clip before it; clear and project after it."""

    def __init__(self, trainer: LambdaGRPOTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        parameter, accelerator = self.trainer._lambda, self.trainer.accelerator
        if parameter.learnable:
            # Clipping the model's gradients unscales fp16 gradients, λ's with them; without a clip nobody has yet.
            if parameter.companion is None and (args.max_grad_norm is None or args.max_grad_norm <= 0):
                accelerator.unscale_gradients()
            parameter.prepare_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        parameter, metrics = self.trainer._lambda, self.trainer._metrics["train"]
        if parameter.learnable and not self.trainer.accelerator.optimizer_step_was_skipped:
            parameter.step_companion()
        parameter.finish_step()
        if parameter.learnable:
            metrics["lambda/grad"].append(parameter.last_grad if math.isfinite(parameter.last_grad) else math.nan)
            # A count: the last one is meant, not TRL's mean over the logging interval.
            metrics["lambda/skipped"] = [parameter.skipped]
