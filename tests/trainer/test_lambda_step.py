"""λ's step: in one optimizer that steps, on the model's schedule, clipped, bounded, cleared, whatever comes by."""

import math

import pytest
import torch
from accelerate import Accelerator
from harness import Batch, assert_same_bits, build, build_model, config, train, watch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DefaultFlowCallback, PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
from trl_lambda.lambda_parameter import parameter as lambda_parameter

CUT = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
STEPS = {"max_steps": 3, "learning_rate": 1e-3, "lambda_learning_rate": 0.5}
POWER = {"length_weight": "power"}
LEARNING = {"descent": {}, "regression": POWER | {"lambda_side": "signed"}, "target": POWER | {"length_target": 4.0}}
schedulers = torch.optim.lr_scheduler


def run(batch=None, **options):
    return train(LambdaGRPOTrainer, LambdaGRPOConfig, batch, **options)


def make(batch=None, model=None, trainer_class=LambdaGRPOTrainer, config_class=LambdaGRPOConfig, **options):
    batch, arguments = batch or Batch(), options.pop("arguments", {})
    return build(trainer_class, config(config_class, batch, **options), batch, model, **arguments)


def by_length(sign=1):
    """A batch in which length is what is rewarded."""
    batch = Batch()
    batch.rewards = [sign * len(c) / 12 for c in batch.completions]
    return batch


# ---- Exactly one optimizer that steps ----


class Lion(torch.optim.Optimizer):
    """Steps by the sign of its momentum alone, whatever the gradient's size."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.sub_(group["lr"] * p.grad.sign())


def names_of_groups(trainer):
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    if isinstance(trainer, LambdaGRPOTrainer):
        names[id(trainer._lambda.tensor)] = "λ"
    return [[names[id(p)] for p in group["params"]] for group in trainer.optimizer.param_groups]


JOINED = {"adamw_torch": {"eps": 1.0}, "adamw_torch_fused": {"eps": 1.0}, "rmsprop": {"eps": 1.0}, "sgd": {}}


@pytest.mark.parametrize("peft", [False, True], ids=["whole model", "LoRA"])
@pytest.mark.parametrize("optim", [*JOINED, "adafactor", "lion"])
def test_the_optimizer_has_trls_groups_and_lambdas_own(optim, peft, monkeypatch):
    """By name: a count alone misses an empty group. A rule by the sign alone leaves λ to an AdamW of its own."""
    if optim == "lion":
        made = staticmethod(lambda args, model=None: (Lion, {"lr": args.learning_rate}))
        monkeypatch.setattr("transformers.Trainer.get_optimizer_cls_and_kwargs", made)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    options = STEPS | {"optim": "sgd" if optim == "lion" else optim, "weight_decay": 0.3}
    options["arguments"] = {"peft_config": lora} if peft else {}
    theirs = {key: value for key, value in options.items() if not key.startswith("lambda_")}
    trainer, plain = make(**options), make(trainer_class=GRPOTrainer, config_class=GRPOConfig, **theirs)
    plain.create_optimizer()
    result = watch(trainer)
    trainer.train()
    trainer.optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    expected, own = names_of_groups(plain), trainer._lambda_step._own
    assert names_of_groups(trainer) == [*expected, *([["λ"]] if optim in JOINED else [])]
    assert (own is None) == (optim in JOINED)
    group = trainer.optimizer.param_groups[-1] if own is None else own.param_groups[0]
    wanted = {"name": "lambda", "lr": 0.5, "weight_decay": 0.0} | JOINED.get(optim, {"eps": 1.0})
    assert {key: group[key] for key in wanted} == wanted
    assert all("name" not in g and g.get("eps") != 1.0 for g in trainer.optimizer.param_groups[: len(expected)])
    assert len(set(result.lambdas)) == 3 and 0 not in result.lambdas
    # It moves in proportion to its gradient, not by its rate.
    assert abs(result.lambdas[0]) < 0.5 * abs(result.lambda_grads[0]) * 1.01


def test_frozen_parameters_and_members_without_a_lambda():
    trainer = make(optim="adamw_torch")
    trainer.model.lm_head.weight.requires_grad_(False)
    optimizer = trainer.create_optimizer()
    assert "lm_head.weight" not in sum(names_of_groups(trainer), []) and names_of_groups(trainer)[-1] == ["λ"]
    assert trainer.create_optimizer() is optimizer and len(optimizer.param_groups) == 3
    for options in ({"length_weight": "grpo"}, {"lambda_learnable": False}, {"length_weight": None}):
        trainer = make(**options)
        assert len(trainer.create_optimizer().param_groups) == 2
    assert trainer.lambda_value is None and trainer.lambda_values == {} and trainer.lambda_learning is None


class BringsItsOwn(LambdaGRPOTrainer):
    """Hugging Face's documented way to bring an optimizer."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer


class ReplacesTheResult(LambdaGRPOTrainer):
    def create_optimizer(self, model=None):
        super().create_optimizer(model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer


def given(model, scheduler=None, learning_rate=1e-3):
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    return {"optimizers": (optimizer, scheduler and scheduler(optimizer))}


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("trainer_class", [BringsItsOwn, ReplacesTheResult, LambdaGRPOTrainer])
def test_beside_an_optimizer_of_the_users_lambda_takes_the_same_steps(trainer_class, learning):
    """In an AdamW of its own as in a group of the trainer's, on its linear schedule."""
    model, batch = build_model(), by_length()
    # The model is held still: λ's gradient by descent depends on it, and it has another optimizer.
    options = STEPS | LEARNING[learning] | {"lr_scheduler_type": "linear", "learning_rate": 0.0}
    more = given(model, learning_rate=0.0) if trainer_class is LambdaGRPOTrainer else {}
    apart = watch(make(batch, model, trainer_class, arguments=more, **options))
    apart.trainer.train()
    assert apart.trainer._lambda_step._own is not None
    assert not apart.trainer._lambda.is_in(apart.trainer.optimizer)
    joined = watch(make(batch, optim="adamw_torch", **options))
    joined.trainer.train()
    assert apart.lambdas == joined.lambdas and len(set(apart.lambdas)) == 3


def test_a_second_training_with_another_optimizer():
    trainer = make(**STEPS)
    trainer.train()
    result = watch(trainer)
    trainer.optimizer, trainer.lr_scheduler = torch.optim.SGD(trainer.model.parameters(), lr=1e-3), None
    trainer.train()
    assert len(set(result.lambdas)) == 3 and trainer._lambda_step._own is not None


def test_the_models_schedule_is_lambdas():
    result = run(lr_scheduler_type="linear", max_steps=4, learning_rate=1e-3, optim="sgd")
    steps = torch.tensor([0.0, *result.lambdas]).diff()
    expected = [-0.1 * (1 - t / 4) * g for t, g in enumerate(result.lambda_grads)]
    torch.testing.assert_close(steps, torch.tensor(expected), rtol=1e-4, atol=1e-8)


def test_the_plateau_schedule_goes_with_a_group_of_the_trainers():
    class Worse(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.lr_scheduler.step(float(state.global_step))

    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 0.1, "patience": 0}}
    options |= {"eval_strategy": "steps", "eval_steps": 100, "max_steps": 2, "learning_rate": 1e-3}
    trainer = make(arguments={"callbacks": [Worse()], "eval_dataset": Batch().dataset()}, **options)
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([1e-4, 1e-4, 0.01])


@pytest.mark.parametrize(
    "scheduler",
    [lambda o: schedulers.OneCycleLR(o, max_lr=0.01, total_steps=8), schedulers.ReduceLROnPlateau],
    ids=["OneCycleLR", "ReduceLROnPlateau"],
)
def test_a_schedule_that_lambda_cannot_follow_is_refused(scheduler):
    model = build_model()
    with pytest.raises(ValueError, match="λ's learning rate cannot follow .*lambda_learnable=False"):
        make(model=model, arguments=given(model, scheduler)).train()
    model = build_model()
    make(model=model, arguments=given(model, scheduler), lambda_learnable=False).train()


def test_fp16_is_refused_where_nobody_takes_the_scale_out_of_lambdas_gradient(monkeypatch):
    apart, joined = make(optim="adafactor"), make()
    for trainer in (apart, joined):
        trainer.create_optimizer_and_scheduler(2)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    with pytest.raises(ValueError, match="fp16=True leaves λ's gradient scaled.*use bf16=True"):
        apart._lambda_step.settle(apart.optimizer, apart.lr_scheduler)
    assert joined._lambda_step.settle(joined.optimizer, joined.lr_scheduler) == "the trainer's SGD"


def test_a_training_step_of_the_users_is_named():
    class Replaced(LambdaGRPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    with pytest.raises(RuntimeError, match="a subclass overrides training_step without calling"):
        make(trainer_class=Replaced).train()


# ---- What a step does ----


def test_the_gradient_is_cleared_between_steps():
    """SGD on an unchanging model: each step's dL/dλ alone, not the sum of those before."""
    result = run(max_steps=3, **CUT)
    for grad, before in zip(result.lambda_grads, [0.0, *result.lambdas], strict=False):
        probe = run(max_steps=1, lambda_init=before, **CUT)
        assert grad == pytest.approx(probe.lambda_grads[0], rel=1e-4) and grad != 0
    assert result.trainer._lambda.tensor.grad is None


def test_own_clip_apart_from_the_models(monkeypatch):
    free, model_clip = run(), run(max_grad_norm=1e-6)
    assert model_clip.lambdas == free.lambdas and abs(free.lambda_grads[0]) > 1e-3
    monkeypatch.setattr(lambda_parameter, "MAX_GRAD_NORM", 1e-4)
    clipped = run()
    assert clipped.lambdas[0] == pytest.approx(math.copysign(0.1 * 1e-4, -free.lambda_grads[0]), rel=1e-4)
    assert clipped.logs[0]["lambda/grad"] == pytest.approx(free.lambda_grads[0], rel=1e-5)  # logged unclipped


@pytest.mark.parametrize(("sign", "stop"), [(1, 2e-4), (-1, -1e-4)])
def test_projected_into_its_bounds_after_each_step(sign, stop):
    options = {"max_steps": 3, "lambda_learning_rate": 5.0}
    assert all(value * stop > 0 and abs(value) > 0.1 for value in run(by_length(sign), **options).lambdas)
    assert run(by_length(sign), lambda_bounds=[-1e-4, 2e-4], **options).lambdas == [pytest.approx(stop)] * 3


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(optim):
    class NotFiniteOnce(LambdaGRPOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss + self._lambda.tensor.sum() * float("nan") if self.state.global_step == 1 else loss

    result = train(NotFiniteOnce, LambdaGRPOConfig, max_steps=3, optim=optim)
    assert result.lambdas[0] == result.lambdas[1] != result.lambdas[2] and math.isfinite(result.lambdas[2])
    assert [entry["lambda/skipped"] for entry in result.logs] == [0, 1, 1]
    assert [entry["lambda/grad"] is None for entry in result.logs] == [False, True, False]


def test_each_iteration_uses_lambda_as_it_is():
    result = run(num_iterations=2, max_steps=2, lambda_learning_rate=50.0)
    assert result.logs[0]["length_weight/ess"] == 1.0
    fixed = run(lambda_init=result.lambdas[0], lambda_learnable=False)
    assert result.logs[1]["length_weight/ess"] == fixed.logs[0]["length_weight/ess"] < 0.999


def test_lambda_is_not_part_of_the_model():
    trainer = run().trainer
    assert all(p is not trainer._lambda.tensor for p in trainer.model.parameters())
    assert not any("lambda" in name for name in trainer.model.state_dict())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("options", [{}, POWER, POWER | {"lambda_side": "positive"}], ids=str)
def test_lambda_moves_to_where_length_is_worth_something(options, sign):
    assert run(by_length(sign), max_steps=5, lambda_learning_rate=1.0, **options).lambdas[-1] * sign > 0.05


# ---- A model with nothing to train ----


LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def test_a_frozen_adapter_is_told_of_before_the_first_step(tmp_path):
    """TRL's optimizer has no parameter there; with λ in it, λ alone trained, for a whole run (fault 2)."""
    get_peft_model(build_model(), LoraConfig(**LORA)).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(build_model(), tmp_path)
    for options in LEARNING.values():
        with pytest.raises(ValueError, match="nothing to train.*is_trainable=True"):
            make(model=frozen, **options).train()
    trainable = PeftModel.from_pretrained(build_model(), tmp_path, is_trainable=True)
    result = watch(make(model=trainable, **STEPS))
    result.trainer.train()
    assert len(set(result.lambdas)) == 3


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("learning", LEARNING)
def test_checkpointing_through_which_no_gradient_reaches_the_adapter(learning, monkeypatch):
    """Reentrant, over inputs without a gradient: TRL's own loss raises in `backward`, and λ's must not save it."""
    monkeypatch.setattr(PreTrainedModel, "enable_input_require_grads", lambda self: None)
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make(arguments={"peft_config": LoraConfig(**LORA)}, **checkpointing, **LEARNING[learning])
    with pytest.raises(RuntimeError, match=r"no gradient reaches its parameters.*enable_input_require_grads\(\)"):
        trainer.train()


# ---- What comes between ----


class Interrupt(TrainerCallback):
    """Ctrl-C in the third step, once."""

    def __init__(self, event):
        self.is_due = True
        setattr(self, event, self.interrupt)

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 2 and self.is_due:
            self.is_due = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("event", ["on_substep_end", "on_pre_optimizer_step", "on_optimizer_step"])
@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("own", [False, True], ids=["in the trainer's", "in its own"])
def test_an_interrupted_window_leaves_nothing_behind(learning, own, event, tmp_path):
    """`train(resume_from_checkpoint=True)` on the same object, after an exception between two steps (fault 3)."""
    options = CUT | STEPS | LEARNING[learning] | {"optim": "adafactor" if own else "adamw_torch", "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2}
    whole = watch(make(by_length(), output_dir=str(tmp_path / "whole"), **options))
    whole.trainer.train()
    arguments = {"callbacks": [Interrupt(event)]}
    trainer = make(by_length(), output_dir=str(tmp_path / "cut"), arguments=arguments, **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer._step, trainer._buffered_inputs = 0, None  # TRL's own count of micro-batches goes on where it was
    again = watch(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert again.lambdas == whole.lambdas[2:] and len(set(whole.lambdas)) == 4
    for name, value in whole.parameters().items():
        assert torch.equal(again.parameters()[name], value), name


def test_a_training_begun_anew_after_an_exception():
    class Fails(LambdaGRPOTrainer):
        is_due = True

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if len(self.seen_losses) == 1 and Fails.is_due:
                Fails.is_due = False
                raise MemoryError
            return loss

    trainer = make(trainer_class=Fails, **CUT)
    with pytest.raises(MemoryError):
        trainer.train()
    trainer._step, trainer._buffered_inputs = 0, None
    trainer.seen_losses.clear()
    result = watch(trainer)
    torch.manual_seed(3)
    trainer.train()
    plain = watch(make(**CUT))
    torch.manual_seed(3)
    plain.trainer.train()
    assert_same_bits(result, plain)
    assert result.lambda_grads == plain.lambda_grads and result.lambdas == plain.lambdas != [0.0]


@pytest.mark.parametrize("learning", LEARNING)
def test_scripts_that_strip_all_callbacks_change_nothing(learning):
    """Clip, bounds, target and metrics hung on a callback, and went with it (fault 8)."""
    options = STEPS | LEARNING[learning] | {"lambda_bounds": [-0.05, 0.05], "lambda_learning_rate": 5.0}
    runs = []
    for strips in (False, True):
        trainer = make(by_length(), **options)
        if strips:
            trainer.callback_handler.callbacks = [DefaultFlowCallback()]  # without it nothing is logged, nor ends
        runs.append(watch(trainer))
        trainer.train()
    kept, stripped = runs
    assert stripped.lambdas == kept.lambdas and abs(kept.lambdas[-1]) == pytest.approx(0.05)
    for mine, theirs in zip(stripped.logs, kept.logs, strict=True):
        assert mine.keys() == theirs.keys() and "lambda/grad" in mine
        assert {k: x for k, x in mine.items() if "/" in k} == {k: x for k, x in theirs.items() if "/" in k}
