"""Subclasses, other optimizers and callbacks around the trainer: honoured, or refused with what to do instead."""

import pytest
import torch
from support import Batch, assert_same_bits, build, build_model, build_tokenizer, config, train, watch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer, TRGRPOConfig, TRGRPOTrainer

STEPS = {"max_steps": 3, "learning_rate": 1e-3, "lambda_learning_rate": 0.5}


def go(trainer_class, *, model=None, prepare=None, batch=None, config_class=LambdaGRPOConfig, options=None, **more):
    batch = Batch() if batch is None else batch
    trainer = build(trainer_class, config(config_class, batch, **(options or STEPS)), batch, model, **more)
    if prepare is not None:
        prepare(trainer)
    run = watch(trainer)
    trainer.train()
    return run


# ---- λ is in exactly one optimizer that steps ----


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


def assigned_later(trainer):
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-3)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1.0)


@pytest.mark.parametrize(
    ("trainer_class", "prepare"),
    [(BringsItsOwn, None), (ReplacesTheResult, None), (LambdaGRPOTrainer, assigned_later)],
    ids=["overridden", "replaced", "assigned after construction"],
)
def test_lambda_is_trained_beside_an_optimizer_of_the_users(trainer_class, prepare):
    result = go(trainer_class, prepare=prepare)
    assert len(set(result.lambdas)) == STEPS["max_steps"] and result.lambdas[0] != 0
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    given = go(LambdaGRPOTrainer, model=model, optimizers=(optimizer, None))
    assert result.lambdas == given.lambdas


def test_a_replaced_training_step_raises():
    class Replaced(LambdaGRPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    with pytest.raises(RuntimeError, match="a subclass overrides training_step without calling"):
        go(Replaced)


def test_a_second_training_with_another_optimizer():
    def twice(trainer):
        trainer.train()
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-3)
        trainer.lr_scheduler = None

    result = go(LambdaGRPOTrainer, prepare=twice)
    assert len(set(result.lambdas)) == STEPS["max_steps"]


def steps_of_lambda(scheduler_of, **options):
    """Learning rate of λ's group at each step, in the trainer's optimizer or beside one that the user built."""

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            parameter = trainer._lambda
            optimizer = parameter.companion or trainer.optimizer
            rates.append(next(g["lr"] for g in optimizer.param_groups if g.get("name") == "lambda"))

    rates, batch, model = [], Batch(), build_model()
    arguments = {}
    if scheduler_of is not None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        arguments["optimizers"] = (optimizer, scheduler_of(optimizer))
    args = config(LambdaGRPOConfig, batch, max_steps=6, learning_rate=1e-3, lambda_learning_rate=0.1, **options)
    trainer = build(LambdaGRPOTrainer, args, batch, model, callbacks=[Note()], **arguments)
    trainer.train()
    return rates


def test_a_schedule_with_a_peak_takes_lambda_no_higher_than_its_own_rate():
    schedulers = torch.optim.lr_scheduler
    one_cycle = steps_of_lambda(lambda o: schedulers.OneCycleLR(o, max_lr=0.025, total_steps=8))
    assert max(one_cycle) <= 0.1 and max(one_cycle) > 0.09 and one_cycle[0] == pytest.approx(0.1 / 25)
    cyclic = steps_of_lambda(lambda o: schedulers.CyclicLR(o, base_lr=1e-3, max_lr=1e-2, step_size_up=3))
    assert max(cyclic) == pytest.approx(0.1) and cyclic[0] == pytest.approx(0.01)
    growing = steps_of_lambda(lambda o: schedulers.ExponentialLR(o, gamma=2.0))
    assert growing == [pytest.approx(0.1)] * 6


def test_a_floor_of_the_plateau_schedule_is_the_models_not_lambdas():
    """`min_lr` is an absolute rate of the model; λ's group and a companion take the same part of their own."""

    class Worse(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            home = self.trainer._lambda.companion or self.trainer.optimizer
            self.rate = next(g["lr"] for g in home.param_groups if g.get("name") == "lambda")

        def on_step_end(self, args, state, control, **kwargs):
            self.trainer.lr_scheduler.step(float(state.global_step))

    plateau = {"mode": "min", "factor": 0.1, "patience": 0, "min_lr": 1e-4}
    rates = []
    for own in (False, True):
        batch, model, worse = Batch(), build_model(), Worse()
        arguments = {"callbacks": [worse]}
        options = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": plateau}
        if own:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **plateau)
            arguments["optimizers"], options = (optimizer, scheduler), {}
        else:
            options |= {"eval_strategy": "steps", "eval_steps": 100}
            arguments["eval_dataset"] = batch.dataset()
        args = config(LambdaGRPOConfig, batch, max_steps=5, learning_rate=1e-3, lambda_learning_rate=0.1, **options)
        trainer = build(LambdaGRPOTrainer, args, batch, model, **arguments)
        worse.trainer = trainer
        trainer.train()
        rates.append(worse.rate)
    assert rates == [pytest.approx(0.01), pytest.approx(0.01)]


# ---- A loss that is not TRL's ----


@pytest.mark.parametrize("order", ["ours first", "TRL's first"])
@pytest.mark.parametrize(
    "options", [{"aggregation": "grpo"}, {"token_regulation": "sigmoid", "aggregation": None}], ids=["f", "v"]
)
def test_gmpo_is_refused_while_weights_are_on(order, options):
    bases = (LambdaGRPOTrainer, GMPOTrainer) if order == "ours first" else (GMPOTrainer, LambdaGRPOTrainer)
    mixed = type("Mixed", bases, {})
    with pytest.raises(ValueError, match="GMPOTrainer replaces GRPOTrainer's _compute_loss.*loss_reduction"):
        go(mixed, options=options)


@pytest.mark.parametrize("order", ["ours first", "TRL's first"])
def test_gmpo_without_weights_is_gmpo(order):
    bases = (LambdaGRPOTrainer, GMPOTrainer) if order == "ours first" else (GMPOTrainer, LambdaGRPOTrainer)
    steps = {"max_steps": 2, "learning_rate": 1e-2, "epsilon": 0.4}
    mine = go(type("Mixed", bases, {}), options=steps | {"aggregation": None})
    assert_same_bits(mine, go(GMPOTrainer, config_class=GMPOConfig, options=steps))


def test_gmpo_that_declares_its_reduction():
    """One term per sequence and their mean: `grpo` is that reduction itself, `dapo` weights each by |o_i|/μ."""

    class Declared(LambdaGRPOTrainer, GMPOTrainer):
        loss_reduction = "sequence"

    steps = {"max_steps": 1, "epsilon": 0.4}
    plain = go(GMPOTrainer, config_class=GMPOConfig, options=steps)
    same = go(Declared, options=steps | {"aggregation": "grpo"})
    assert same.losses == pytest.approx(plain.losses, abs=1e-7)  # a sum that is 0 but for rounding
    for name, grad in plain.grads[0].items():
        torch.testing.assert_close(same.grads[0][name], grad, rtol=1e-4, atol=1e-6)
    by_length = go(Declared, options=steps | {"aggregation": "dapo"})
    batch = Batch()
    lengths = torch.tensor([float(len(c)) for c in batch.completions])
    advantages = torch.tensor(list(plain.trainer._logs["advantages"])[:12])
    assert by_length.losses[0] == pytest.approx(-(lengths / lengths.mean() * advantages).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="token_regulation='sigmoid' weights tokens.*loss_reduction='sequence'"):
        go(Declared, options=steps | {"token_regulation": "sigmoid"})


def test_an_unknown_declaration():
    class Declared(LambdaGRPOTrainer):
        loss_reduction = "mean"

    with pytest.raises(ValueError, match="Declared.loss_reduction='mean' is unknown; accepted: token_mean"):
        go(Declared)


def test_a_loss_that_calls_trls_is_trls():
    class Scaled(LambdaGRPOTrainer):
        def _compute_loss(self, model, inputs):
            return 1.0 * super()._compute_loss(model, inputs)

    assert_same_bits(go(Scaled), go(LambdaGRPOTrainer))


def test_a_replaced_compute_loss_is_refused():
    class Replaced(LambdaGRPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return self._compute_loss(model, inputs)

    # `build` puts a class of its own in front: the trainer is built directly here.
    batch = Batch()
    with pytest.raises(ValueError, match=r"Replaced replaces compute_loss.*super\(\).compute_loss"):
        Replaced(build_model(), batch.reward, config(LambdaGRPOConfig, batch), processing_class=build_tokenizer())


def test_a_copy_of_the_inputs_is_named():
    class Copies(LambdaGRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, dict(inputs))

    with pytest.raises(RuntimeError, match=r"Copies._compute_loss.* a copy of `inputs`, such as dict\(inputs\)"):
        go(Copies)


# ---- What a subclass does to the scored batch ----


class MasksRows(LambdaGRPOTrainer):
    """Drops rows after scoring, as filters for overlong or hacked completions do."""

    in_place = True

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        keep = torch.ones(output["completion_mask"].size(0), 1, dtype=torch.long)
        keep[[1, 6]] = 0
        masked = output["completion_mask"] * keep
        output = output if self.in_place else dict(output)
        output["completion_mask"] = masked
        output["num_items_in_batch"] = masked.sum()
        return output


@pytest.mark.parametrize("in_place", [True, False])
def test_lengths_follow_a_mask_that_a_subclass_changes(in_place):
    masks = type("Masks", (MasksRows,), {"in_place": in_place})
    options = {"lambda_init": 1.5, "aggregation": "power", "max_steps": 1}
    mine = go(masks, options=options)
    batch = Batch()
    batch.truncated, batch.env_mask = set(), lambda row, length: [0 if row in (1, 6) else 1] * length
    theirs = go(LambdaGRPOTrainer, batch=batch, options=options)
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert mine.lambda_grads == pytest.approx(theirs.lambda_grads, rel=1e-4)
    unmasked = go(LambdaGRPOTrainer, options=options)
    assert abs(mine.losses[0] - unmasked.losses[0]) > 0.01


def test_rows_without_a_place_raise():
    class Anew(LambdaGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            return {key: value for key, value in output.items() if not key.startswith("generation_batch")}

    with pytest.raises(RuntimeError, match="builds it anew in _generate_and_score_completions. Return the dictionary"):
        go(Anew)


def test_lengths_are_held_once():
    """Bytes beside TRL's own entries, per process: 12 for each row, whatever the number of rows."""
    held = {}
    for repeats in (1, 4):
        batch = Batch(lengths=[[3, 1, 12, 6]] * (3 * repeats))
        trainer = go(LambdaGRPOTrainer, batch=batch, options={"max_steps": 1}).trainer
        known = trainer._scoring.batches["train"]
        carried = sum(x.nbytes for b in trainer._buffered_inputs for k, x in b.items() if k.startswith("generation_"))
        held[repeats] = carried + known.lengths.nbytes + known.advantages.nbytes
    assert held == {1: 12 * 16, 4: 48 * 16}


# ---- Callbacks and arguments ----


def test_a_log_ordered_by_a_later_callback_has_the_metrics():
    class LogNow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_log = state.global_step == 2

    result = go(LambdaGRPOTrainer, prepare=lambda t: t.add_callback(LogNow()), options=STEPS | {"logging_steps": 100})
    assert [entry["step"] for entry in result.logs] == [2]
    assert {"lambda/value", "length_weight/ess", "share/length_q1", "lambda/grad"} <= result.logs[0].keys()
    assert result.logs[0]["lambda/value"] == result.lambdas[1]


def test_an_epoch_that_ends_within_a_logging_interval_changes_no_metric():
    """The same three batches in one epoch and in three: sums over tokens of the whole interval, not means of means."""
    reduced = []

    def count(trainer):
        flush = trainer._loss_metrics.flush

        def counted(mode, accelerator):
            metrics = flush(mode, accelerator)
            reduced.extend([trainer.state.global_step] if metrics else [])
            return metrics

        trainer._loss_metrics.flush = counted

    def logged(repeats, **epochs):
        batch = Batch(lengths=[[3, 1, 12, 6]])
        options = {"logging_steps": 3, "learning_rate": 0.05, "lambda_init": 1.0, "lambda_learnable": False} | epochs
        data = {"train_dataset": batch.dataset(repeats=repeats)}
        return go(LambdaGRPOTrainer, prepare=count, batch=batch, options=options, **data).logs

    one = logged(3, num_train_epochs=1, max_steps=-1)
    three = logged(1, num_train_epochs=3, max_steps=-1)
    assert len(one) == len(three) == 1
    assert reduced == [3, 3]  # once, when the log is due
    ours = [key for key in one[0] if key.startswith(("share/", "length_weight/", "advantage/", "lambda/"))]
    assert len(ours) > 10
    for key in ours:
        assert one[0][key] == three[0][key], key


def test_arguments_by_position_as_trl_takes_them():
    from peft import LoraConfig

    batch = Batch()
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    # model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks,
    # optimizers, quantization_config, peft_config
    names = list(GRPOTrainer.__init__.__code__.co_varnames)[1 : GRPOTrainer.__init__.__code__.co_argcount]
    given = {
        "model": build_model(),
        "reward_funcs": batch.reward,
        "args": config(LambdaGRPOConfig, batch),
        "train_dataset": batch.dataset(),
        "processing_class": build_tokenizer(),
        "optimizers": (None, None),
        "peft_config": lora,
    }
    positional = [given.get(name) for name in names[: names.index("peft_config") + 1]]
    trainer = LambdaGRPOTrainer(*positional)
    assert type(trainer.model).__name__ == "PeftModelForCausalLM"


def test_a_dataset_that_transforms_on_access_trains():
    from datasets import Dataset

    batch = Batch()
    prompts = batch.dataset(repeats=8)["prompt"]
    data = Dataset.from_dict({"text": list(prompts)}).with_transform(lambda rows: {"prompt": rows["text"]})
    options = STEPS | {"remove_unused_columns": False}
    plain = go(LambdaGRPOTrainer, options=options)
    assert go(LambdaGRPOTrainer, options=options, train_dataset=data).losses == plain.losses


def test_a_column_of_the_users_stays_the_users():
    def reward(completions, row, log_extra, **kwargs):
        log_extra("length_weight", [f"mine {r}" for r in row])
        return [float(r % 3) for r in row]

    options = {"max_steps": 2, "log_completions": True}
    with pytest.warns(UserWarning, match="a reward function logs length_weight with log_extra"):
        result = go(LambdaGRPOTrainer, options=options, reward_funcs=reward)
    assert list(result.trainer._logs["extra"]["length_weight"])[0] == "mine 0"


def test_a_generation_batch_masked_whole_has_no_largest_weight():
    batch = Batch(truncated=set(range(12)))
    logs = train(LambdaGRPOTrainer, LambdaGRPOConfig, batch, mask_truncated_completions=True, lambda_init=1.0).logs
    assert logs[0]["length_weight/max"] is None and logs[0]["length_weight/min"] is None


def test_tr_and_plain_configs_still_build():
    assert go(TRGRPOTrainer, config_class=TRGRPOConfig, options={"max_steps": 1}).losses
    assert go(GRPOTrainer, config_class=GRPOConfig, options={"max_steps": 1}).losses
