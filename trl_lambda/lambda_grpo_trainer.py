"""`LambdaGRPOTrainer` and `TRGRPOTrainer`: one training step, read from top to bottom.

TRL scores a generation batch; lengths and advantages of all its rows are kept. At each loss, once TRL has the current
log-probabilities, the advantages of a copy of the micro-batch become ``f·v·A``; the loss is TRL's own. Every surrogate
of TRL is linear in the advantage and otherwise looks at its sign only, so that a positive factor on the advantage is
that factor on the token's term of the policy loss. KL, entropy bonus and auxiliary losses are added by TRL afterwards
and stay unweighted. Then the optimizers step, λ's with the model's, and λ is saved with it.
"""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer

from .config_checks import CLIPPED_LOSS_TYPES
from .lambda_grpo_config import LambdaGRPOConfig, TRGRPOConfig
from .metrics.loss_metrics import LossMetrics, Surrogate, Tokens, length_quartiles
from .model_card import LAMBDA_PAPER, TR_PAPER, complete_card, weight_tags
from .preference.checkpoint import LambdaCheckpoint
from .preference.lambda_parameter import LambdaParameter, base_learning_rate, unwrap_optimizer
from .preference.making import bounds_of, make_rule
from .preference.placement import companion_class, engine_owns_optimizer, lambda_eps
from .preference.step import LambdaStep
from .preference.whole_checkpoint import check_whole
from .trl_seam.contract import check_contract
from .trl_seam.generation_batch import (
    FEATURES_KEY,
    FORWARD_KEYS,
    ROW_KEY,
    GenerationBatch,
    gather_generation_batch,
    number_rows,
    own_tokens,
)
from .trl_seam.refusals import refuse_other_losses, refuse_unsupported
from .trl_seam.weighted_inputs import WeightedInputs
from .weights import (
    LengthWeight,
    TokenWeight,
    as_length_weight,
    as_token_weight,
    sequence_mean_weights,
    weigh_responses,
    weigh_tokens,
)
from .weights.custom import features_of
from .weights.features import FEATURES
from .weights.length_weight import DAPO, GRPO

_TABLE_COLUMN = "length_weight"  # of TRL's table of completions


@dataclass
class _Known:
    """A generation batch and what follows from it alone, the same at each of its losses."""

    batch: GenerationBatch
    quartiles: torch.Tensor  # of length, (P·G,)
    weights: torch.Tensor | None = None  # f, (P, G), where no λ moves between losses


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
    # What a subclass with a `_compute_loss` of its own declares its reduction to be: see `refuse_other_losses`.
    loss_reduction: str | None = None
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
        length_weight: Callable[..., torch.Tensor] | LengthWeight | None = None,
        token_weight: Callable[..., torch.Tensor] | TokenWeight | None = None,
        **trl_kwargs: Any,
    ) -> None:
        check_contract(GRPOTrainer)
        if args is None:
            model_name = model if isinstance(model, str) else model.config._name_or_path
            args = self._config_class(f"{model_name.split('/')[-1]}-{self._name}")
        refuse_unsupported(type(self), args, self._config_class)
        own_f = None if length_weight is None else as_length_weight(length_weight)
        own_v = None if token_weight is None else as_token_weight(token_weight)
        args.validate(own_f, own_v)
        self.length_weight: LengthWeight | None = own_f or args.make_length_weight()
        self.token_weight: TokenWeight | None = own_v or args.make_token_weight()
        self._is_weighted = bool(self.length_weight or self.token_weight or args.positive_weight != 1)
        if self._is_weighted:
            refuse_other_losses(type(self), self.length_weight, self.token_weight)
        if own_f or own_v:  # logs and trackers show the names of what is used
            args = copy.copy(args)
            args.aggregation = self.length_weight and self.length_weight.name
            args.token_regulation = self.token_weight and self.token_weight.name

        self._known: dict[str, _Known] = {}  # the last generation batch of "train" and of "eval"
        self._features = features_of(self.length_weight)  # that rows are scored for, beside length
        self._rows_scored = 0  # of a generation batch that is new to `_prepare_inputs`
        self._loss_inputs: WeightedInputs | None = None
        self._column_is_taken = False
        self._trainer_built_optimizer = False
        self._seen_optimizer: object = None
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)

        self._lambda: LambdaParameter | None = None
        if self.length_weight is not None and self.length_weight.has_lambda:
            self._lambda = LambdaParameter(
                [args.lambda_init, *[0.0] * (len(self.length_weight.lambda_features) - 1)],
                learnable=args.lambda_learnable,
                bounds=bounds_of(args),
                max_grad_norm=args.lambda_max_grad_norm,
                device=self.accelerator.device,
                rule=make_rule(args, self.length_weight, num_iterations=self.num_iterations),
            )
            self.add_callback(LambdaStep(self._lambda, self.accelerator, self._metrics["train"]))
        identity = {
            "aggregation": self.length_weight and self.length_weight.name,
            "aggregation_scope": args.aggregation_scope,
            "length_scale": getattr(self.length_weight, "length_scale", None),
            "token_weight": own_v and own_v.name,
        }
        if self._lambda is not None and self.length_weight is not None:
            identity |= {
                "lambda_side": getattr(self.length_weight, "side", "both"),
                "lambda_features": list(self.length_weight.lambda_features),
                "lambda_rule": args.rule_of(self.length_weight) if args.lambda_learnable else None,
            }
        self._lambda_checkpoint = LambdaCheckpoint(self._lambda, identity, is_custom=bool(own_f or own_v))
        bounds = self.token_weight and self.token_weight.bounds
        self._loss_metrics = LossMetrics(self._clip(), bounds, with_turns=self._with_turns)

    @property
    def lambda_value(self) -> float | None:
        """λ now; `None` where f has none."""
        return None if self._lambda is None else self._lambda.value

    @property
    def lambda_values(self) -> dict[str, float]:
        """λ of every feature that it weighs, by name; empty where f has none."""
        if self._lambda is None or self.length_weight is None:
            return {}
        return dict(zip(self.length_weight.lambda_features, self._lambda.values, strict=True))

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _with_turns(self) -> bool:
        """Whether a completion may hold what the policy has not written; the same on every process."""
        return bool(getattr(self, "tools", None)) or getattr(self, "rollout_func", None) is not None

    def _clip(self) -> Surrogate | None:
        """The PPO clip of the surrogate, for the metrics; `None` where it has none."""
        if self.loss_type not in (*CLIPPED_LOSS_TYPES, "luspo"):
            return None
        per_sequence = self.importance_sampling_level == "sequence"
        inside = self.args.regulation_inside_clip
        return Surrogate(self.epsilon_low, self.epsilon_high, self.args.delta, per_sequence, inside)

    # ---- Scoring: lengths and advantages, where the whole generation batch is visible ----

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self._is_weighted:
            number_rows(output, self.accelerator)
            self._rows_scored = output["completion_mask"].size(0)
            if self._features:
                output[FEATURES_KEY] = self._score_features(output)
            self._take_generation_batch([output])
        return output

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        if self._rows_scored:
            if type(self)._generate_and_score_completions is not LambdaGRPOTrainer._generate_and_score_completions:
                # A subclass may have masked rows or changed advantages since they were gathered: take them again.
                self._take_generation_batch(self._buffered_inputs if self.model.training else [inputs])
            batch = self._known[self._mode].batch
            self._loss_metrics.note_generation_batch(self._mode, batch)
            if self._lambda is not None and self._lambda.rule is not None and self.model.training:
                self._lambda.rule.observe(batch, (self._metrics["train"]["reward"] or [math.nan])[-1])
            self._fill_completions_table()
            self._rows_scored = 0
        return inputs

    def _take_generation_batch(self, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """Keep lengths and advantages of all processes' rows, from this process's share of them."""
        group_size: Any = self.num_generations if self.model.training else self.num_generations_eval
        batch = gather_generation_batch(
            micro_batches,
            self._rows_scored,
            group_size,
            self.accelerator,
            self._features,
            with_turns=self._with_turns,
        )
        self._known[self._mode] = _Known(batch, length_quartiles(batch.lengths))

    @torch.no_grad()
    def _score_features(self, output: dict[str, Any]) -> torch.Tensor:
        """
        What λ weighs beside length, (B, K), from the sampling policy's log-probabilities of the own tokens.

        TRL has them where old log-probabilities are needed; else they cost a forward pass of their own.
        """
        logps = output.get("old_per_token_logps")
        if logps is None:
            kept = {key: output[key] for key in FORWARD_KEYS if key in output}
            logps = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size,
                **kept,
            )[0]
        mask = own_tokens(output)
        return torch.stack([FEATURES[name](logps.float(), mask) for name in self._features], dim=1)

    # ---- The loss: A ← f·v·A where the current log-probabilities exist ----

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if not self._is_weighted:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # A copy: the buffered micro-batch is used again when num_iterations > 1.
        weighted = WeightedInputs(inputs)
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

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        # While training, a call without gradient is of another model, or of this one for another purpose.
        if self._loss_inputs is not None and (torch.is_grad_enabled() or not self.model.training):
            self._weigh(self._loss_inputs, outputs[0])
        return outputs

    def _weigh(self, inputs: WeightedInputs, logps: torch.Tensor) -> None:
        """A ← f·v·A, with v from the current log-probabilities, (B, T), and f from λ as it is now."""
        advantages, old_logps = inputs.peek("advantages"), inputs.peek("old_per_token_logps")
        rows, known = inputs.peek(ROW_KEY), self._known[self._mode]
        f = self._length_weights(known)  # (P, G)
        if self.length_weight is not None:
            restated = f if self._reduction == "token_mean" else sequence_mean_weights(f, known.batch.lengths)
            inputs.scale_advantages(restated.flatten()[rows])
        elif self.args.positive_weight != 1:  # on top of TRL's own reduction
            plain = self._weigh_responses(self._member, known, positive_weight=1.0)
            inputs.scale_advantages((f / plain.masked_fill(plain == 0, 1)).flatten()[rows])
        v = None if self.token_weight is None else weigh_tokens(self.token_weight, logps)
        if v is not None and self.args.regulation_inside_clip:
            inputs.scale_ratio(logps, v)
        elif v is not None:
            inputs.scale_advantages(v)
        inputs.complete()

        if self.length_weight is not None or self.args.positive_weight != 1:
            signed = getattr(self.length_weight, "side", "both") != "both" or self.args.positive_weight != 1
            self._loss_metrics.note_length_weights(self._mode, f, known.batch.advantages if signed else None)
        if self.args.token_metrics:
            mask = own_tokens(inputs)
            per_row = (f.detach().flatten()[rows], known.quartiles[rows])
            unweighted = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
            left = mask * self._left_in_loss(inputs, unweighted, logps.detach(), mask)
            tokens = Tokens(mask, left, logps.detach(), old_logps, unweighted, *per_row, v)
            self._loss_metrics.note_tokens(self._mode, tokens)

    def _left_in_loss(
        self, inputs: WeightedInputs, advantages: torch.Tensor, logps: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Which own tokens the correction for vLLM and the off-policy mask leave in the loss, (B, T) or (B, 1)."""
        left = torch.ones_like(mask[:, :1])
        if self.use_vllm and self.vllm_importance_sampling_correction:
            kept = inputs.peek("importance_sampling_ratio") != 0  # (B, T) or (B, 1); 0 is what both mask modes write
            if self.loss_type == "vespo":  # takes the product over the row: one masked token takes the row out
                kept = (kept | ~mask.bool()).all(dim=1, keepdim=True)
            left = left * kept
        threshold = self.off_policy_mask_threshold
        if threshold is not None:
            old = inputs.peek("old_per_token_logps")
            sampled = inputs.peek("sampling_per_token_logps")
            sampled = sampled if sampled is not None else logps if old is None else old
            left = left * self.get_off_policy_mask(advantages, logps, sampled, mask, threshold)
        return left

    def _length_weights(self, known: _Known) -> torch.Tensor:
        """f of the whole generation batch, (P, G); with TRL's own reduction, the weight that it amounts to."""
        if known.weights is not None:
            return known.weights
        weights = self._weigh_responses(self._member, known, self.args.positive_weight)
        if self._lambda is None or not self._lambda.learnable:
            known.weights = weights
        return weights

    @property
    def _member(self) -> LengthWeight:
        """f; with TRL's own reduction, the member that it amounts to."""
        return self.length_weight or (GRPO() if self.loss_type in ("grpo", "sapo") else DAPO())

    def _weigh_responses(self, member: LengthWeight, known: _Known, positive_weight: float) -> torch.Tensor:
        return weigh_responses(
            member,
            known.batch.lengths,
            None if self._lambda is None else self._lambda.for_loss,
            scope=self.args.aggregation_scope,
            advantages=known.batch.advantages,
            features=known.batch.features,
            positive_weight=positive_weight,
        )

    @property
    def _reduction(self) -> str:
        """How the loss is reduced: TRL's `sapo` is a mean of sequence means, the other surrogates a token mean."""
        return self.loss_reduction or ("sequence_mean" if self.loss_type == "sapo" else "token_mean")

    # ---- λ's parameter group and its step ----

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        self._trainer_built_optimizer |= self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        parameter = self._lambda
        if parameter is None or not parameter.learnable or not self._trainer_built_optimizer:
            return optimizer
        if not engine_owns_optimizer(self) and not parameter.in_optimizer(optimizer):
            eps = lambda_eps(self.args, optimizer)
            parameter.add_group(optimizer, learning_rate=self.args.lambda_learning_rate, adam_eps=eps)
        return optimizer

    def _place_lambda(self) -> None:
        """Give λ a companion where the trainer's optimizer, as an engine or the user built it, does not hold it."""
        parameter, args, optimizer = self._lambda, self.args, unwrap_optimizer(self.optimizer)
        if parameter is None or not parameter.learnable:
            return
        if optimizer is not self._seen_optimizer:  # before its first step: a plateau schedule keeps no initial rate
            self._seen_optimizer = optimizer
            parameter.model_learning_rate = base_learning_rate(optimizer, args.learning_rate)
        if not parameter.in_optimizer(optimizer) and parameter.companion is None:
            user_built = not (self._trainer_built_optimizer and engine_owns_optimizer(self))
            optimizer_class, options = companion_class(args, self.model, user_built=user_built)
            companion = parameter.make_companion(optimizer_class, options, learning_rate=args.lambda_learning_rate)
            parameter.set_eps(lambda_eps(args, companion))
        if parameter.in_optimizer(optimizer) and parameter.companion is not None:
            raise RuntimeError(
                "λ is in the trainer's optimizer and has a companion of its own: two optimizers would step it. The "
                "optimizer was replaced between two calls of train(): build a new trainer instead."
            )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
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
            # Read for a log only: it waits for the model's optimizer.
            for name, value in self.lambda_values.items():
                self._metrics[mode]["lambda/value" if name == "length" else f"lambda/{name}"] = [value]
            for name, value in (self._lambda.rule.metrics() if self._lambda.rule is not None else {}).items():
                self._metrics[mode][name] = [value]

    def _log_completion_extra(self, column: str, values: list[Any]) -> None:
        if column == _TABLE_COLUMN and not self._column_is_taken:
            self._column_is_taken = True
            warnings.warn(
                f"a reward function logs {column} with log_extra: the table of completions keeps its values, and not "
                "the weights of trl_lambda. Use another name there to have both.",
                UserWarning,
                stacklevel=2,
            )
        super()._log_completion_extra(column, values)

    def _fill_completions_table(self) -> None:
        """Add f as of scoring to the table that TRL writes with `log_completions`, one value per row."""
        if self.log_completions and self.length_weight is not None and not self._column_is_taken:
            weights = self._length_weights(self._known[self._mode]).detach()
            self._logs["extra"][_TABLE_COLUMN].extend(weights.masked_fill(weights == 0, torch.nan).flatten().tolist())

    # ---- To disk and back ----

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self._write_lambda(self.args.output_dir if output_dir is None else output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: Any) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._write_lambda(output_dir)  # with sharded FSDP checkpoints `_save` is not called
        if self.args.should_save:
            self._lambda_checkpoint.write_optimizer(output_dir)

    def _write_lambda(self, folder: Any) -> None:
        if self.args.should_save:
            self._lambda_checkpoint.write(folder, self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        check_whole(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        load = super()._load_optimizer_and_scheduler
        if checkpoint is None:
            return load(checkpoint)
        self._place_lambda()  # what has been built by now is what the checkpoint is loaded into
        self._lambda_checkpoint.load(
            checkpoint, self.optimizer, self.lr_scheduler, lambda: load(checkpoint), owned=engine_owns_optimizer(self)
        )

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._lambda_checkpoint.load_value(str(self.state.best_model_checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: Any) -> None:
        if self.args.should_save:
            self._lambda_checkpoint.copy_for_push(checkpoint_folder, str(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write TRL's model card with the weights' settings.

        Args:
            model_name (`str`, *optional*): As in TRL; the folder's name if not given.
            dataset_name (`str`, *optional*): As in TRL.
            tags (`str` or `list[str]`, *optional*): As in TRL; `lambda-grpo` and `tr-grpo` are added where they apply.
        """
        model_name = model_name or Path(str(self.args.output_dir)).resolve().name
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=weight_tags(self, tags))
        if self.is_world_process_zero():
            complete_card(self)


class TRGRPOTrainer(LambdaGRPOTrainer):
    """
    [`LambdaGRPOTrainer`] for the token weight of TR-GRPO (arXiv 2511.00066) alone: its configuration is
    [`TRGRPOConfig`], which leaves TRL's reduction as it is.
    """

    _name = "TRGRPO"
    _paper = TR_PAPER
    _config_class = TRGRPOConfig
