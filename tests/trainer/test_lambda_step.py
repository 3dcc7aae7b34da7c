"""λ's step: in one optimizer that steps, on the model's schedule, clipped, bounded, cleared, whatever comes by."""

import math

import pytest
import torch
from accelerate import Accelerator
from harness import LORA, Batch, assert_same_parameters, build_model, by_length, make, train, watch
from harness import train_ours as run
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DefaultFlowCallback, PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
from trl_lambda.lambda_parameter import parameter as lambda_parameter

CUT = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}
STEPS = {"max_steps": 3, "learning_rate": 1e-3, "lambda_learning_rate": 0.5}
POWER = {"length_weight": "power"}
LEARNING = {"descent": {}, "regression": POWER | {"lambda_side": "signed"}, "target": POWER | {"length_target": 4.0}}


class Lion(torch.optim.Optimizer):
    """Steps by the gradient's sign alone."""

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
@pytest.mark.parametrize("optim", [*JOINED, "adafactor", "lion", "ademamix"])
def test_the_optimizer_has_trls_groups_and_lambdas_own(optim, peft, monkeypatch):
    if optim in ("lion", "ademamix"):  # the latter's own class needs bitsandbytes
        optimizer_class = Lion if optim == "lion" else torch.optim.AdamW
        made = staticmethod(lambda args, model=None: (optimizer_class, {"lr": args.learning_rate}))
        monkeypatch.setattr("transformers.Trainer.get_optimizer_cls_and_kwargs", made)
    options = STEPS | {"optim": "sgd" if optim == "lion" else optim, "weight_decay": 0.3}
    options["arguments"] = {"peft_config": LoraConfig(**LORA)} if peft else {}
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
        assert len((trainer := make(**options)).create_optimizer().param_groups) == 2
    assert trainer.lambda_value is None and trainer.lambda_values == {}


class BringsItsOwn(LambdaGRPOTrainer):
    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer


class ReplacesTheResult(BringsItsOwn):
    def create_optimizer(self, model=None):
        LambdaGRPOTrainer.create_optimizer(self, model)
        self.optimizer = None
        return super().create_optimizer(model)


def given(model, scheduler=None, learning_rate=1e-3):
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    return {"optimizers": (optimizer, scheduler and scheduler(optimizer))}


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("trainer_class", [BringsItsOwn, ReplacesTheResult, LambdaGRPOTrainer])
def test_beside_an_optimizer_of_the_users_lambda_takes_the_same_steps(trainer_class, learning):
    model, batch = build_model(), by_length()
    # The model is held still: λ's gradient by descent depends on it, and it has another optimizer.
    options = STEPS | LEARNING[learning] | {"lr_scheduler_type": "linear", "learning_rate": 0.0}
    more = given(model, learning_rate=0.0) if trainer_class is LambdaGRPOTrainer else {}
    apart = watch(make(batch, model, trainer_class=trainer_class, arguments=more, **options))
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


@pytest.mark.parametrize("name", ["OneCycleLR", "ReduceLROnPlateau"])
def test_a_schedule_that_lambda_cannot_follow_is_refused(name):
    options = {"max_lr": 0.01, "total_steps": 8} if name == "OneCycleLR" else {}
    models = build_model(), build_model()
    wrong, fixed = (given(model, lambda o: getattr(torch.optim.lr_scheduler, name)(o, **options)) for model in models)
    with pytest.raises(ValueError, match="λ's learning rate cannot follow .*lambda_learnable=False"):
        make(model=models[0], arguments=wrong).train()
    make(model=models[1], arguments=fixed, lambda_learnable=False).train()


def test_fp16_is_refused_where_nobody_takes_the_scale_out_of_lambdas_gradient(monkeypatch):
    apart, joined = make(optim="adafactor"), make()
    for trainer in (apart, joined):
        trainer.create_optimizer_and_scheduler(2)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    with pytest.raises(ValueError, match="fp16=True leaves λ's gradient scaled.*use bf16=True"):
        apart._lambda_step.ensure_optimizer(apart.optimizer, apart.lr_scheduler)
    assert joined._lambda_step.ensure_optimizer(joined.optimizer, joined.lr_scheduler) == "the trainer's SGD"


def test_a_step_that_the_gradient_scaler_skips_is_counted(monkeypatch):
    trainer = make()
    trainer.create_optimizer_and_scheduler(2)
    trainer._lambda_step.after_micro_batch()
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", True)
    trainer._lambda_step.before_micro_batch(trainer.optimizer, trainer.lr_scheduler)
    assert trainer._lambda.skipped == 1


def test_a_training_step_of_the_users_is_named():
    class Replaced(LambdaGRPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    with pytest.raises(RuntimeError, match="a subclass overrides training_step without calling"):
        make(trainer_class=Replaced).train()


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


def test_a_frozen_adapter_is_told_of_before_the_first_step(tmp_path):
    """λ alone trained, for a whole run (fault 2)."""
    get_peft_model(build_model(), LoraConfig(**LORA)).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(build_model(), tmp_path)
    for options in LEARNING.values():
        with pytest.raises(ValueError, match="nothing to train.*is_trainable=True"):
            make(model=frozen, **options).train()
    frozen.enable_input_require_grads()  # as checkpointing does: then even the log-probabilities have a gradient
    with pytest.raises(ValueError, match="nothing to train.*is_trainable=True"):
        make(model=frozen).train()
    make(model=PeftModel.from_pretrained(build_model(), tmp_path, is_trainable=True)).train()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("learning", LEARNING)
def test_checkpointing_through_which_no_gradient_reaches_the_adapter(learning, monkeypatch):
    """Reentrant, over inputs without a gradient: TRL's own loss raises in `backward`, and λ's must not save it."""
    monkeypatch.setattr(PreTrainedModel, "enable_input_require_grads", lambda self: None)
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make(arguments={"peft_config": LoraConfig(**LORA)}, **checkpointing, **LEARNING[learning])
    with pytest.raises(RuntimeError, match=r"no gradient reaches its parameters.*enable_input_require_grads\(\)"):
        trainer.train()


class Interrupt(TrainerCallback):
    """Ctrl-C in the third step, once."""

    def __init__(self, event):
        self.is_due = True
        setattr(self, event, self.interrupt)

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 2 and self.is_due:
            self.is_due = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("own", [False, True], ids=["in the trainer's", "in its own"])
def test_an_interrupted_window_leaves_nothing_behind(learning, own, tmp_path):
    """`train(resume_from_checkpoint=True)` on the same object, after an exception between two steps (fault 3)."""
    options = CUT | STEPS | LEARNING[learning] | {"optim": "adafactor" if own else "adamw_torch", "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2}
    whole = run(by_length(), **options)
    assert len(set(whole.lambdas)) == 4
    for event in ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step"):
        arguments = {"callbacks": [Interrupt(event)]}
        trainer = make(by_length(), output_dir=str(tmp_path / event), arguments=arguments, **options)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer._step, trainer._buffered_inputs = 0, None  # TRL's own count of micro-batches goes on where it was
        again = watch(trainer)
        trainer.train(resume_from_checkpoint=True)
        assert again.lambdas == whole.lambdas[2:], event
        assert_same_parameters(again, whole)


@pytest.mark.parametrize("learning", LEARNING)
def test_scripts_that_strip_all_callbacks_change_nothing(learning):
    """Fault 8."""
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
    mine, theirs = ([{k: x for k, x in log.items() if "/" in k} for log in run.logs] for run in (stripped, kept))
    assert mine == theirs and all("lambda/grad" in log for log in mine)
