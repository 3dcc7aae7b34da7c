"""`LambdaGRPOTrainer` and `TRGRPOTrainer`: one training step, read from top to bottom.

1. TRL scores a generation batch; lengths and advantages of all its rows are gathered.
2. At each loss, once TRL has the current log-probabilities, the advantages of a copy of the micro-batch are multiplied
   by v, and by the factor that f is on top of TRL's own reduction. Inside the clip, v goes into the ratio instead.
   The loss is TRL's own. Every surrogate of TRL is linear in the advantage and otherwise uses its sign only, so a
   factor on the advantage is that factor on the token's term of the policy loss. TRL adds KL, entropy bonus and
   auxiliary losses afterwards. They stay unweighted.
3. The optimizer steps λ with the model.
4. λ is saved with the model, and the model card says how the tokens were weighted.
"""

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer

from .generation_batch import GenerationBatch
from .lambda_grpo_config import LambdaGRPOConfig, TRGRPOConfig
from .lambda_parameter import (
    TARGET_BOUNDS,
    Descent,
    Fixed,
    LambdaFile,
    LambdaParameter,
    LambdaStep,
    Regression,
    Target,
)
from .metrics.loss_metrics import LossMetrics, lambda_metrics
from .model_card import card_tags, complete_card, paper_of
from .trl_seam.contract import check_contract, refuse_other_losses, refuse_unsupported
from .trl_seam.scoring import Scoring, own_tokens
from .trl_seam.weighted_inputs import ResponseWeights, WeightedInputs
from .weights import LengthWeight, TokenRows, TokenWeight, probabilities, weigh_tokens


class LambdaGRPOTrainer(GRPOTrainer):
    """
    `GRPOTrainer` with the aggregation ``Σ_i f_i Σ_t v_it ℓ_it / Σ_i |o_i|`` of TRL's own token losses ℓ.

    f is a length weight with a learnable λ (this project's reading of arXiv 2510.06870), v a weight increasing in the
    policy's probability of the token (arXiv 2511.00066). Both are chosen in [`LambdaGRPOConfig`], or passed here. The
    other arguments are those of [`~trl.GRPOTrainer`], in the same order.

    A subclass with a `_compute_loss` of its own declares how its loss is reduced, or the weights are refused:
    `loss_reduction = "token_mean"`, `"sequence_mean"` or `"sequence"`.

    Args:
        args ([`LambdaGRPOConfig`], *optional*):
            Configuration. If `None`, a default one is made as TRL does.
        length_weight (`Callable` or [`LengthWeight`], *optional*):
            f of your own in place of the config's, which stays at its default or is `None`: called by name with any of
            the arguments that [`LengthWeight`] lists, returns weights > 0, (P, G). It has a λ if it names `lam`.
        token_weight (`Callable` or [`TokenWeight`], *optional*):
            v of your own in place of the config's, likewise: called by name with any of the arguments that
            [`TokenWeight`] lists, returns weights >= 0, (B, T).

    Raises:
        `ValueError`: `args` is a plain `GRPOConfig`, or something the weights cannot be honoured with is on; before
            any model is loaded.
        `RuntimeError`: the installed TRL lacks the internals that the weights go through.
    """

    _tag_names = ["trl", "grpo"]  # the model card adds those of the weights
    _name = "LambdaGRPO"
    _config_class: type[LambdaGRPOConfig] = LambdaGRPOConfig
    loss_reduction: str | None = None  # of a subclass with a `_compute_loss` of its own
    # As they are here; transformers declares what any trainer may have.
    args: LambdaGRPOConfig
    model: torch.nn.Module

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: LambdaGRPOConfig | None = None,
        *trl_args: Any,
        length_weight: Callable[..., torch.Tensor] | LengthWeight | None = None,
        token_weight: Callable[..., torch.Tensor] | TokenWeight | None = None,
        **trl_kwargs: Any,
    ) -> None:
        check_contract(GRPOTrainer)
        if args is None:
            model_name = model if isinstance(model, str) else model.config._name_or_path
            args = self._config_class(f"{model_name.split('/')[-1]}-{self._name}")
        refuse_unsupported(type(self), args, self._config_class)
        f, v = self.length_weight, self.token_weight = args.make_weights(length_weight, token_weight)
        self._is_weighted = bool(f or v or args.positive_weight != 1)
        if self._is_weighted:
            refuse_other_losses(type(self), args, weights_tokens=v is not None)
        if length_weight is not None or token_weight is not None:  # logs and trackers show the names of what is used
            args = copy.copy(args)
            args.length_weight, args.token_weight = f and f.name, v and v.name
            # The values of an object are settings as much as its name.
            vars(args).update(
                (f"{option}_kwargs", {field.name: repr(getattr(given, field.name)) for field in fields(given)})
                for option, given in (("length_weight", length_weight), ("token_weight", token_weight))
                if is_dataclass(given)
            )
        self._paper = paper_of(f, v) or GRPOTrainer._paper
        self._loss_inputs: WeightedInputs | None = None
        self._has_weighted = False  # a loss of this training step went through the weights
        self._observed: dict[str, GenerationBatch] = {}
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)

        self._scoring = Scoring(
            self.accelerator, [*(f.needs if f else ()), *(["rewards"] if args.drop_tied_groups else [])]
        )
        self._lambda = self._make_lambda(args, f) if f is not None and f.has_lambda else None
        self._lambda_step: LambdaStep | None = None
        if self._lambda is not None and self._lambda.learning.is_learnable:
            self._lambda_step = LambdaStep(
                self._lambda,
                learning_rate=args.lambda_learning_rate,
                optim=args.optim,
                betas=(args.adam_beta1, args.adam_beta2),
                accelerator=self.accelerator,
                is_sharded=self.is_deepspeed_enabled or self.is_fsdp_enabled,
            )
        self._lambda_file = LambdaFile(self._lambda, self._settings(), is_needed=self._is_weighted)
        self._response_weights = ResponseWeights(
            f,
            lambda: None if self._lambda is None else self._lambda.for_loss,
            scope=args.length_weight_scope,
            positive_weight=args.positive_weight,
            drop_tied_groups=args.drop_tied_groups,
            loss_type=args.loss_type,
            reduction=self.loss_reduction,
        )
        self._loss_metrics = {"train": LossMetrics(), "eval": LossMetrics()}

    def _make_lambda(self, args: LambdaGRPOConfig, f: LengthWeight) -> LambdaParameter:
        bounds: Any = args.lambda_bounds
        if not args.lambda_learnable:
            learning = Fixed()
        elif args.length_target is not None:
            steps = (args.steps_per_generation or 1) * self.num_iterations / args.gradient_accumulation_steps
            bounds = bounds or TARGET_BOUNDS
            learning = Target(args.length_target, steps, f.side, bounds, args.lambda_init)
        elif f.side == "both":
            learning = Descent(args.loss_type)
        else:
            learning = Regression(f.features, args.lambda_gain, f.side)
        return LambdaParameter(
            args.lambda_init, learning, bounds=bounds, device=self.accelerator.device, features=f.features
        )

    def _settings(self) -> dict[str, Any]:
        """The settings that a resumed run must share."""
        settings = {
            name: getattr(self.args, name)
            for name in (
                *("length_weight", "length_weight_kwargs", "length_weight_scope", "drop_tied_groups"),
                *("positive_weight", "lambda_features"),
                *("token_weight", "token_weight_kwargs", "token_weight_inside_clip"),
            )
        }
        learning = None if self._lambda is None else self._lambda.learning.name
        fixed = {"lambda_init": self.args.lambda_init} if learning == "fixed" else {}
        engine = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP" if self.is_fsdp_enabled else "no sharding"
        return settings | {"lambda_side": self.args.side, "lambda_learning": learning, "engine": engine} | fixed

    @property
    def lambda_value(self) -> float | None:
        """λ now; `None` where f has none."""
        return None if self._lambda is None else self._lambda.values[0]

    @property
    def lambda_values(self) -> dict[str, float]:
        """λ of every feature, by name; empty where f has none."""
        return {} if self._lambda is None else dict(zip(self._lambda.features, self._lambda.values, strict=True))

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    # ---- 1. Scoring: lengths and advantages, where the whole generation batch is visible ----

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        rewards = super()._calculate_rewards(*args, **kwargs)
        # A base class may put other rows in place of these rewards' rows, as TRL's replay buffer does.
        if super()._generate_and_score_completions.__func__ is GRPOTrainer._generate_and_score_completions:
            self._scoring.record_rewards(rewards, self.reward_weights)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self._is_weighted:
            self._scoring.number_rows(output, len(inputs))
            is_training, args = self.model.training, self.args
            self._scoring.score_log_probabilities(
                output,
                self._get_per_token_logps_and_entropies,
                self.model,
                args.per_device_train_batch_size if is_training else args.per_device_eval_batch_size,
                args.gradient_checkpointing_kwargs,
            )
            self._gather([output], in_order=True)
        return output

    def _gather(self, micro_batches: Any, *, in_order: bool) -> None:
        # G as TRL has it now: a callback may change it.
        group_size: Any = self.num_generations if self.model.training else self.num_generations_eval
        if self.length_weight is not None:
            self.length_weight.check(group_size)
        self._scoring.gather_rows(self._mode, micro_batches, group_size, in_order=in_order)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        calls, score = self._scoring.calls, getattr(self._generate_and_score_completions, "__func__", None)
        inputs = super()._prepare_inputs(generation_batch)
        if self._scoring.calls > calls and score is not LambdaGRPOTrainer._generate_and_score_completions:
            # A subclass may have masked, dropped or repeated rows since they were scored.
            self._gather(self._buffered_inputs if self.model.training else [inputs], in_order=False)
        return inputs

    def _observe(self, batch: GenerationBatch) -> None:
        """Show a new generation batch to the metrics and to what λ learns from."""
        metrics = self._loss_metrics[self._mode]
        metrics.defer(partial(metrics.add_generation_batch, batch), batch.lengths.numel())
        if self.model.training:
            logged = self._metrics["train"]
            metrics.warn_of_dead_run(logged)
            # A λ that is fixed or descends needs no batch, and the device would be waited for.
            if self._lambda is not None and self._lambda_step is not None and not self._lambda.learning.uses_loss:
                # Answers that TRL masks have no tokens in the batch, but were sampled.
                masks = self.args.mask_truncated_completions and "completions/mean_length" in logged
                of_rows = float(batch.lengths.sum()) / max(int((batch.lengths > 0).sum()), 1)
                self._lambda.learning.observe(batch, logged["completions/mean_length"][-1] if masks else of_rows)

    # ---- 2. The loss: A ← f·v·A where the current log-probabilities exist ----

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if not self._is_weighted:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # A copy: the buffered micro-batch is used again when num_iterations > 1.
        weighted = self._loss_inputs = WeightedInputs(inputs, has_gradient=torch.is_grad_enabled())
        try:
            loss = super().compute_loss(model, weighted, return_outputs, num_items_in_batch)
        finally:
            self._loss_inputs = None
        weighted.check_consumed(type(self))
        self._has_weighted = True
        return loss

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        # Calls of less gradient than the loss has, or of the reference model, are not our loss.
        inputs = self._loss_inputs
        if inputs is not None and model is not self.ref_model and torch.is_grad_enabled() >= inputs.has_gradient:
            self._weigh(inputs, outputs[0], outputs[1])
        return outputs

    def _weigh(self, inputs: WeightedInputs, logps: torch.Tensor, entropies: torch.Tensor | None) -> None:
        """A ← f·v·A, with v from the current log-probabilities, (B, T), and f from λ as it is now."""
        inputs.count_reads()
        if self._lambda_step is not None and torch.is_grad_enabled() and not logps.requires_grad:
            raise RuntimeError(
                "The model has nothing to train, and λ alone would learn: no gradient reaches its parameters. Load "
                "the adapter with is_trainable=True, or call model.enable_input_require_grads() with checkpointing."
            )
        mode, step = self._mode, self.state.global_step
        batch, places = self._scoring.places_of(inputs, mode)
        if batch is not self._observed.get(mode):
            self._observed[mode] = batch
            self._observe(batch)
        advantages, old_logps, mask = inputs.peek("advantages"), inputs.peek("old_per_token_logps"), own_tokens(inputs)
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages

        f, factor = self._response_weights.weigh(batch, step)  # (P, G) and, flat, (P·G,)
        if factor is not None:
            inputs.scale_advantages(factor[places])
        v = None
        if self.token_weight is not None:
            rows = TokenRows(
                probabilities(logps),
                advantages,
                entropies=None if entropies is None else entropies.detach(),
                old_logps=old_logps,
                mask=mask,
                lengths=batch.lengths.flatten()[places].unsqueeze(1),
                step=step,
            )
            inside = self.args.token_weight_inside_clip
            v = weigh_tokens(self.token_weight, rows, zero=not inside)  # (B, T)
            if inside:
                inputs.scale_ratio(logps, v)
            else:
                inputs.scale_advantages(v)

        metrics, f = self._loss_metrics[mode], f.detach()
        metrics.defer(partial(metrics.add_length_weights, f, batch, factor is not None), f.numel())
        if self.args.token_metrics:
            tokens = (advantages, logps.detach(), mask, v, self.token_weight and self.token_weight.bounds)
            metrics.defer(partial(metrics.add_tokens, batch, places, f, *tokens), mask.numel())

    # ---- 3. λ's parameter group and its step ----

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        is_trainers = self.optimizer is None  # and not one that the user built
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._lambda_step is not None and is_trainers:
            self._lambda_step.join(optimizer)
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self._lambda_step is not None:
            # At the loss it cannot be told: with checkpointing, inputs have gradients whatever is frozen.
            if not any(parameter.requires_grad for parameter in self.model.parameters()):
                raise ValueError(
                    "The model has nothing to train, and λ alone would learn. Load the adapter with "
                    "PeftModel.from_pretrained(..., is_trainable=True), or set lambda_learnable=False."
                )
            self._lambda_step.begin_training()
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._has_weighted = False
        if self._lambda_step is not None:
            self._lambda_step.before_micro_batch(self.optimizer, self.lr_scheduler)
        loss = super().training_step(*args, **kwargs)
        if self._is_weighted and not self._has_weighted:
            raise RuntimeError(
                "The weights had no effect: a subclass replaces compute_loss without calling super().compute_loss. "
                "Call it, or turn the weights off: length_weight=None, token_weight=None."
            )
        if self._lambda_step is not None:
            self._lambda_step.after_micro_batch()
        return loss

    # ---- Logs ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # All processes come by here, whoever ordered the log; `log` itself may be called on one of them alone. What
        # the last log of a run leaves over goes into the run's summary.
        # In eval mode, as after an evaluation at an epoch's end, TRL keeps its metrics of training for the next log.
        due = self.control.should_log and self.state.global_step > self._globalstep_last_logged
        if (due and self.model.training) or self.control.should_training_stop:
            self.reduce_metrics("train")
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        self.reduce_metrics("eval")
        return output

    def reduce_metrics(self, mode: str) -> None:
        """Reduce the weights' metrics since the last call over the processes, for TRL's next `log`."""
        metrics = dict(self._loss_metrics[mode].flush(self.accelerator))
        if metrics and mode == "train" and self._lambda is not None:
            metrics |= lambda_metrics(self._lambda)
        self._metrics[mode] |= {name: [value] for name, value in metrics.items()}

    # ---- 4. To disk and back ----

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._lambda_file.write(output_dir or str(self.args.output_dir), self.state.global_step)

    def _save_optimizer_and_scheduler(self, output_dir: Any) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            if self._lambda_step is not None:
                self._lambda_step.save_own_optimizer(output_dir)
            self._lambda_file.write(output_dir, self.state.global_step, home=self._lambda_home())

    def _lambda_home(self) -> str:
        return (
            self._lambda_step.ensure_optimizer(self.optimizer, self.lr_scheduler)
            if self._lambda_step
            else "no optimizer"
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        self._lambda_file.check(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        if checkpoint is not None:
            self._lambda_file.check(checkpoint)  # DeepSpeed's models do not come by _load_from_checkpoint
            self._lambda_file.load(checkpoint, home=self._lambda_home())
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._lambda_step is not None:
            self._lambda_step.load_own_optimizer(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._lambda_file.load(str(self.state.best_model_checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: Any) -> None:
        if self.args.should_save:  # TRL pushes the output folder
            self._lambda_file.write(str(self.args.output_dir), self.state.global_step)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write TRL's model card with the weights' settings. Arguments are TRL's: without `model_name` it is the folder's
        name, and `lambda-grpo` and `tr-grpo` are added to `tags` where they apply.
        """
        model_name = model_name or Path(str(self.args.output_dir)).resolve().name
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=card_tags(self, tags))
        if self.is_world_process_zero():
            complete_card(self)


class TRGRPOTrainer(LambdaGRPOTrainer):
    """[`LambdaGRPOTrainer`] with [`TRGRPOConfig`]: TR-GRPO's token weight (arXiv 2511.00066) on TRL's reduction."""

    _name = "TRGRPO"
    _config_class = TRGRPOConfig
