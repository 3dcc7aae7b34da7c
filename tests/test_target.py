"""`length_target`: the controller against plain loops and on simulated lengths, in the trainer, and resumed."""

import json
import math
import random
import warnings
from dataclasses import dataclass, field

import pytest
import reference
import test_resume_pairs as pairs
import torch
from launch import launch
from support import Batch, build, config, train, watch
from test_loss import scored
from test_masked_shares import ratio
from worker import run_job

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
from trl_lambda.preference.lambda_parameter import LambdaParameter
from trl_lambda.preference.target import Target
from trl_lambda.trl_seam.generation_batch import GenerationBatch

BOUNDS = (-3.0, 3.0)
OPTIMIZERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-3),
    "sgd with momentum": lambda weights: torch.optim.SGD(weights, lr=1e-3, momentum=0.9, nesterov=True),
}


def batch_of(length: float) -> GenerationBatch:
    """Two responses, one without tokens, which do not count."""
    return GenerationBatch(torch.tensor([[round(length), 0]]), None)


@dataclass
class Loop:
    """Target, λ's parameter group and an optimizer, on lengths that the test makes up."""

    steps: int = 4
    target: float = 1000.0
    side: str = "positive"
    optimizer: str = "adamw"
    learning_rate: float = 0.1
    init: float = 0.0
    path: list[float] = field(default_factory=list)  # λ after every optimizer step

    def __post_init__(self):
        self.rule = Target(self.target, self.steps, self.side, BOUNDS, self.init)
        self.parameter = LambdaParameter(
            self.init, learnable=True, bounds=BOUNDS, max_grad_norm=1.0, device=torch.device("cpu"), rule=self.rule
        )
        self.torch = OPTIMIZERS[self.optimizer]([torch.zeros(1, requires_grad=True)])
        eps = 1.0 if self.optimizer == "adamw" else None
        self.parameter.add_group(self.torch, learning_rate=self.learning_rate, adam_eps=eps)

    def generation_batch(self, length: float, reward: float = math.nan) -> None:
        self.rule.observe(batch_of(length), reward)
        for _ in range(self.steps):
            self.parameter.reduce_gradient(None)
            self.parameter.prepare_step()
            self.torch.step()
            self.parameter.finish_step()
            self.path.append(self.parameter.value)

    def run(self, k: float, batches: int, *, start=0.7, drift=0.0, noise=0.0, delay=0, seed=0) -> list[float]:
        """ln(L/target) of each generation batch where ln L moves by k·λ + drift per optimizer step."""
        generator, x, path = random.Random(seed), start, []
        for batch in range(batches):
            path.append(x)
            seen = path[max(0, batch - delay)] + noise * generator.gauss(0, 1)
            done = len(self.path)
            self.generation_batch(1000 * math.exp(seen))
            x += sum(k * (value if self.side != "negative" else -value) + drift for value in self.path[done:])
        return path


# ---- The controller alone ----


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("side", ["positive", "signed", "negative"])
@pytest.mark.parametrize(("steps", "target"), [(1, 900.0), (4, 900.0), (3, 0.6)])
def test_the_controller_equals_plain_loops(steps, target, side, optimizer):
    lengths = [round(1000 + 700 * math.sin(i / 3) + 40 * (i % 5)) for i in range(40)]
    loop = Loop(steps=steps, target=target, side=side, optimizer=optimizer, init=0.4)
    for length in lengths:
        loop.generation_batch(length)
    eps = 1.0 if optimizer == "adamw" else None
    expected = reference.target_path(lengths, target, steps, side, BOUNDS, 0.4, eps)
    assert loop.path == pytest.approx(expected, abs=2e-6)
    assert max(loop.path) - min(loop.path) > 2


# (movement of ln L per optimizer step at λ = 1, optimizer steps per generation batch, generation batches of delay)
PLANTS = [(k, n, delay) for k in (0.001, 0.003, 0.01, 0.03) for n in (1, 2, 4) for delay in (0, 1)]


@pytest.mark.filterwarnings("ignore:length_target")  # where it is slowest
@pytest.mark.parametrize("drift", [-1.5, 0.0, 1.5])  # as much as λ = 1.5 moves
@pytest.mark.parametrize(("k", "steps", "delay"), [p for p in PLANTS if p[0] * p[1] * (1 + p[2]) <= 0.12])
def test_it_settles_however_fast_the_length_reacts(k, steps, delay, drift):
    """30-fold in speed, up to where λ = -3 takes a third of the length off in one generation batch."""
    path = Loop(steps=steps).run(k, round((3 / k + 500) / steps), drift=drift * k, noise=0.06, delay=delay)
    last = path[-40:]
    assert abs(sum(last) / len(last)) < 0.04
    assert max(map(abs, last)) < 0.15
    assert min(path) > -1.0
    if drift >= 0 and k * steps * (1 + delay) <= 0.04:
        assert min(path) > -0.13


def test_beyond_that_it_swings_within_its_bounds():
    path = Loop(steps=4).run(0.06, 200, noise=0.06)
    assert max(map(abs, path[-60:])) < 0.7


def test_the_cut_into_optimizer_steps_does_not_matter():
    """The same movement of the length per optimizer step: settled after the same number of optimizer steps."""
    settled = []
    for steps in (1, 2, 4):
        path = Loop(steps=steps).run(0.01, 400 // steps)
        settled.append(steps * next(i for i in range(len(path)) if max(map(abs, path[i:])) < 0.15))
    assert max(settled) <= min(settled) + 8 and max(settled) < 60


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_lambda_follows_within_a_generation_batch(optimizer):
    for steps in (1, 2, 4, 16):
        loop = Loop(steps=steps, optimizer=optimizer)
        loop.generation_batch(1000 * math.exp(0.2))
        goal = -0.2 * Target.K_P - Target.K_I * min(steps, 4) * 0.2
        assert loop.path[-1] / goal == pytest.approx(0.64, abs=0.07)
        assert loop.path == sorted(loop.path, reverse=True) and loop.path[-1] > goal  # no overshoot of its own


def test_momentum_is_left_out():
    paths = []
    for momentum in (0.0, 0.9):
        OPTIMIZERS["here"] = lambda weights, momentum=momentum: torch.optim.SGD(weights, lr=1e-3, momentum=momentum)
        loop = Loop(optimizer="here")
        loop.run(0.01, 10)
        paths.append(loop.path)
    del OPTIMIZERS["here"]
    assert paths[0] == paths[1]


@pytest.mark.filterwarnings("ignore:length_target")
def test_no_windup_at_a_bound():
    paths = []
    for batches in (60, 600):
        loop = Loop()
        for _ in range(batches):
            loop.generation_batch(1000 * math.exp(0.4))
        assert loop.path[-1] == pytest.approx(-3.0, abs=1e-4)
        done = len(loop.path)
        for length in (990, 950, 950, 950):
            loop.generation_batch(length)
        paths.append(loop.path[done:])
    assert paths[1] == pytest.approx(paths[0], abs=1e-4)  # however long it stood there
    assert paths[0][3] > -2.6  # and off it with the first shorter batch


def test_at_its_own_length_lambda_stays_near_0():
    loop = Loop()
    loop.run(0.0, 200, start=0.0, noise=0.06)
    assert sum(map(abs, loop.path)) / len(loop.path) < 0.25


def test_a_part_is_of_the_first_batches():
    loop = Loop(target=0.5, init=0.3)
    for length in (80, 120, 90):
        loop.generation_batch(length)
        assert loop.path[-1] == pytest.approx(0.3) and math.isnan(loop.rule.metrics()["lambda/target_gap"])
    loop.generation_batch(110)
    assert loop.rule.metrics()["lambda/target_gap"] == pytest.approx(math.log(110 / 50))
    empty = GenerationBatch(torch.zeros(1, 2, dtype=torch.int32), None)
    before = loop.rule.state_dict()
    loop.rule.observe(empty, 0.0)
    assert loop.rule.state_dict() == before


def test_its_state_goes_through_json():
    loop = Loop(target=0.5)
    for length in range(50, 70):
        loop.generation_batch(length, reward=0.5)
        other = Target(0.5, 4, "positive", BOUNDS)
        other.load_state_dict(json.loads(json.dumps(loop.rule.state_dict(), allow_nan=False)))
        assert other.state_dict() == loop.rule.state_dict()
    for damage in ({"integral": "x"}, {"length": math.inf}, {"seen": None}):
        with pytest.raises(ValueError, match="the rule's statistics"):
            Target(0.5, 4, "positive", BOUNDS).load_state_dict(loop.rule.state_dict() | damage)
    with pytest.raises(KeyError):
        Target(0.5, 4, "positive", BOUNDS).load_state_dict({"target": 3.0})


def test_a_target_that_is_changed_on_the_way_is_the_target():
    loop = Loop(target=0.5)
    for length in (80, 120, 90, 110, 100):
        loop.generation_batch(length)
    for target, tokens in ((0.25, 25.0), (70.0, 70.0), (0.5, 50.0)):
        other = Target(target, 4, "positive", BOUNDS)
        other.load_state_dict(loop.rule.state_dict())
        other.observe(batch_of(100), math.nan)
        assert other.metrics()["lambda/target_gap"] == pytest.approx(math.log(102.5 / tokens))
    absolute = Loop(target=70.0)
    for length in (80, 120, 90, 110, 100):
        absolute.generation_batch(length)
    other = Target(0.5, 4, "positive", BOUNDS)  # of the length at the start of the run, not of its rest
    other.load_state_dict(absolute.rule.state_dict())
    other.observe(batch_of(10), math.nan)
    assert other.metrics()["lambda/target_gap"] == pytest.approx(math.log(55.625 / 50))


# ---- Warnings ----


def rewards_of(loop, lengths, rewards):
    """Each warning's text, by generation batch."""
    said = {}
    for i, (length, reward) in enumerate(zip(lengths, rewards, strict=True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loop.generation_batch(length, reward)
        for warning in caught:
            said[i] = str(warning.message)
    return said


def test_it_says_once_that_the_target_is_out_of_reach():
    said = rewards_of(Loop(), [1600] * 100, [0.5] * 100)
    assert len(said) == 1
    ((when, text),) = said.items()
    assert 30 <= when <= 40 and "length_target=1000.0 tokens is not met" in text
    assert "bound -3 for 30 generation batches, in which the mean length, 1600.0, came no nearer" in text
    on_its_way = [3000 * 0.985**i for i in range(60)]
    assert not rewards_of(Loop(), on_its_way, [0.5] * 60)
    assert not rewards_of(Loop(), [1100] * 100, [0.5] * 100)  # near enough


def test_it_says_once_that_the_reward_has_fallen():
    noise = random.Random(0)
    rewards = [0.6 + 0.05 * noise.gauss(0, 1) - 0.004 * min(i, 60) for i in range(160)]
    said = rewards_of(Loop(), [1100] * 160, rewards)
    assert len(said) == 1 and "the mean reward has fallen from 0.6" in next(iter(said.values()))
    assert "length_target=1000.0 tokens acts" in next(iter(said.values()))
    flat = [0.4 + 0.1 * noise.gauss(0, 1) for _ in range(500)]
    assert not rewards_of(Loop(), [1100] * 500, flat)  # noise is no fall
    assert not rewards_of(Loop(), [1000] * 160, rewards)  # λ = 0 has not done it
    assert not rewards_of(Loop(), [1100] * 160, [math.nan] * 160)


def test_a_resumed_rule_does_not_repeat_itself():
    loop = Loop()
    assert len(rewards_of(loop, [1600] * 60, [0.5] * 60)) == 1
    again = Loop()
    again.rule.load_state_dict(loop.rule.state_dict())
    assert not rewards_of(again, [1600] * 60, [0.5] * 60)


# ---- In the trainer ----

TARGET = {"aggregation": "power", "length_target": 4.0}
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_beta1": 0.8}


class Shrinking(Batch):
    """Completions that are a token shorter in every other generation batch."""

    calls = 0

    def rollout(self, prompts, trainer):
        output = super().rollout(prompts, trainer)
        self.calls += 1
        if self.calls % 2 == 0:
            output["completion_ids"] = [ids[:-1] if len(ids) > 1 else ids for ids in output["completion_ids"]]
        return output

    def mean_lengths(self, batches):
        rows = [len(ids) for ids in self.completions]
        shorter = [max(n - 1, 1) for n in rows]
        return [sum(shorter if i % 2 else rows) / len(rows) for i in range(batches)]


CUTS = {
    "one step": ({}, 1),
    "accumulation": ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}, 1),
    "two steps per generation batch": ({"per_device_train_batch_size": 6, "steps_per_generation": 2}, 2),
    "two iterations": ({"num_iterations": 2}, 2),
    "both": ({"per_device_train_batch_size": 6, "steps_per_generation": 2, "num_iterations": 2}, 4),
}


@pytest.mark.parametrize("peft", [False, True], ids=["all parameters", "LoRA"])
@pytest.mark.parametrize("cut", CUTS)
def test_every_cut_equals_the_reference(cut, peft):
    options, steps = CUTS[cut]
    batch, batches = Shrinking(), 6
    arguments = {}
    if peft:
        from peft import LoraConfig

        arguments["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"])
    result = train(
        LambdaGRPOTrainer, LambdaGRPOConfig, batch, max_steps=batches * steps, trainer_options=arguments,
        **TARGET, **ADAMW, **options,
    )  # fmt: skip
    expected = reference.target_path(batch.mean_lengths(batches), 4.0, steps, "positive", BOUNDS, 0.0, 1.0)
    assert result.lambdas == pytest.approx(expected, abs=1e-5)
    assert min(result.lambdas) < -1
    logged = [entry["lambda/target_gap"] for entry in result.logs]
    assert logged[0] == pytest.approx(math.log(batch.mean_lengths(1)[0] / 4.0), abs=1e-6)


def test_masked_answers_have_been_sampled_all_the_same():
    """The shorter batches end without EOS, and are masked: their lengths still count."""
    batch = Shrinking()
    result = train(
        LambdaGRPOTrainer, LambdaGRPOConfig, batch, max_steps=6, mask_truncated_completions=True, **TARGET, **ADAMW
    )
    expected = reference.target_path(batch.mean_lengths(6), 4.0, 1, "positive", BOUNDS, 0.0, 1.0)
    assert result.lambdas == pytest.approx(expected, abs=1e-5)
    assert (result.trainer._scoring.batches["train"].lengths <= 1).all()  # of the sixth little is left in the loss


def test_two_processes_take_the_same_steps(tmp_path):
    job = {"trainer": "lambda", "options": {**TARGET, **ADAMW, "max_steps": 4}}
    alone = run_job(json.loads(json.dumps(job)))
    job["options"]["per_device_train_batch_size"] = 6
    (ranks,) = launch([job], tmp_path, 2)
    assert [rank["lambdas"] for rank in ranks] == [alone["lambdas"]] * 2
    assert len(set(alone["lambdas"])) == 4


def test_vllms_ratio_does_not_move_it():
    batch = Batch()
    gradients = []
    for use_vllm in (False, True):
        trainer = build(LambdaGRPOTrainer, config(LambdaGRPOConfig, batch, **TARGET), batch)
        inputs = scored(trainer)
        trainer._lambda.rule.observe(trainer._scoring.batches["train"], math.nan)
        if use_vllm:
            trainer.use_vllm, trainer.vllm_importance_sampling_mode = True, "token_mask"
            inputs["importance_sampling_ratio"] = ratio("token_mask", inputs["completion_ids"].shape)
        trainer.compute_loss(trainer.model, inputs)
        trainer._lambda.reduce_gradient(trainer.accelerator)
        trainer._lambda.prepare_step()
        gradients.append(trainer._lambda.last_grad)
    assert gradients[0] == gradients[1] != 0


@pytest.mark.filterwarnings("ignore:Adafactor may normalise")
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop"])
def test_lambdas_group_has_no_momentum_and_the_models_keeps_its_own(optim):
    batch = Batch()
    args = config(LambdaGRPOConfig, batch, **TARGET, **(ADAMW | {"optim": optim}))
    *models, own = build(LambdaGRPOTrainer, args, batch).create_optimizer().param_groups
    assert own["name"] == "lambda" and own["lr"] == pytest.approx(6 * (1 - math.exp(-12 * 0.1)))
    assert own.get("betas", (0.0, 0.0)) == (0.0, 0.0) and own.get("momentum", 0.0) == 0.0
    if "adamw" in optim:
        assert own["eps"] == 1.0 and all(group["betas"] == (0.8, 0.999) for group in models)


@pytest.mark.parametrize("before", [False, True], ids=["from the trainer's optimizer", "from a companion"])
@pytest.mark.parametrize("after", [False, True], ids=["to the trainer's optimizer", "to a companion"])
@pytest.mark.parametrize("target", [4.0, 0.9], ids=["tokens", "a part"])
def test_resumed_in_either_home_to_the_last_bit(tmp_path, before, after, target):
    options = {"aggregation": "power", "length_target": target, "max_steps": 8, "save_steps": 5}
    whole = pairs.run(tmp_path / "whole", companion=before, **options)
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    resumed = pairs.quietly(tmp_path / "resumed", resume=checkpoint, companion=after, **options)
    assert resumed.lambdas == whole.lambdas[5:] and len(set(whole.lambdas)) > 3
    assert resumed.losses == whole.losses[5:]
    group = resumed.trainer._lambda.group_in(resumed.trainer.optimizer)
    assert tuple(group["betas"]) == (0.0, 0.0)


# ---- Refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length_target": 0.0}, "length_target=0.0 must be > 0 and at most"),
        ({"length_target": math.inf, "max_completion_length": None}, "length_target=inf must be > 0 and at most"),
        ({"length_target": math.nan}, "length_target=nan must be > 0 and at most"),
        ({"length_target": "long"}, "length_target='long' must be a number"),
        ({"length_target": 9.0, "lambda_learnable": False}, "length_target=9.0 has no effect with lambda_learnable"),
        (
            {"length_target": 9.0, "aggregation": "grpo"},
            "with aggregation='grpo', which has no λ as 'lambda' and 'power' have",
        ),
        ({"length_target": 9.0, "lambda_init": 4.0}, "lambda_init=4.0 must lie in lambda_bounds=[-3.0, 3.0]"),
        ({"length_target": 9.0, "lambda_adam_eps": 1e-8}, "lambda_adam_eps=1e-08 must be at least 1"),
        ({"length_target": 9.0, "lambda_gain": 3.0}, "lambda_gain=3.0 has no effect with lambda_rule='target'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError) as error:
        LambdaGRPOConfig("unused", bf16=False, use_cpu=True, report_to="none", **({"aggregation": "power"} | options))
    assert message in str(error.value)


def test_wider_bounds_take_a_farther_start():
    batch = Batch()
    options = {**TARGET, "lambda_init": -4.0, "lambda_bounds": [-6.0, 1.0]}
    trainer = build(LambdaGRPOTrainer, config(LambdaGRPOConfig, batch, **options), batch)
    run = watch(trainer)
    trainer.train()
    assert -6 <= run.lambdas[-1] < -4
