"""How λ learns, without a trainer: regression and target against plain loops in float64, on simulated data."""

import functools
import json
import math
import random

import pytest
import reference
import torch

from trl_lambda.generation_batch import GenerationBatch
from trl_lambda.lambda_parameter import TARGET_BOUNDS, Descent, LambdaParameter, Regression, Target
from trl_lambda.weights import SIDES, length_weights

THREE = ("length", "mean_logp", "min_logp")
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "sgd with momentum": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "sgd": torch.optim.SGD,
}


def batch_of(lengths, advantages=None, **statistics) -> GenerationBatch:
    lengths = torch.as_tensor(lengths, dtype=torch.int32)
    return GenerationBatch(torch.arange(lengths.numel()), lengths, lengths.sum().double(), advantages, statistics)


def through_json(learning, fresh):
    """`fresh` with the statistics of `learning`, as `lambda.json` holds them."""
    fresh.load_state_dict(json.loads(json.dumps(learning.state_dict(), allow_nan=False)))
    return fresh


def synthetic(slope, seed, prompts=64, group=8, noise=0.5) -> GenerationBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 60, (prompts, group), generator=generator)
    x = lengths.double().log()
    a = slope * (x - x.mean(dim=1, keepdim=True)) + noise * torch.randn(prompts, group, generator=generator).double()
    return batch_of(lengths, a - a.mean(dim=1, keepdim=True))


@pytest.mark.parametrize("side", SIDES[1:])
@pytest.mark.parametrize("features", [("length",), THREE, THREE[1:]])
def test_regression_equals_the_normal_equations(features, side):
    """With rows without tokens, groups of equal rewards and of one row; through JSON after every batch."""
    generator, data, plain = torch.Generator().manual_seed(3), [], []
    for seed in range(5):
        batch = synthetic(0.5, seed, prompts=6)
        logps = -torch.rand(2, 6, 8, generator=generator, dtype=torch.float64)
        batch.lengths[0, 2], batch.lengths[3, 1:] = 0, 0
        batch.advantages[4] = 6e-4  # what TRL leaves of equal rewards
        data.append(batch_of(batch.lengths, batch.advantages, **dict(zip(THREE[1:], logps, strict=True))))
        plain.append((batch.lengths.tolist(), batch.advantages.tolist(), logps.tolist()))
    gain = -2.0 if side == "negative" else 2.0
    expected = reference.regression(plain, features, gain)
    rule = Regression(features, 2.0, side)
    for batch, (w, r2, _) in zip(data, expected, strict=True):
        rule = through_json(rule, Regression(features, 2.0, side))
        rule.observe(batch, math.nan)
        at = torch.linspace(0.1, 0.7, len(features), dtype=torch.float64)
        assert (at - rule.gradient(at)).tolist() == pytest.approx(w, rel=1e-9, abs=1e-12)
        assert rule.metrics()["lambda/r2"] == pytest.approx(r2, rel=1e-9)


@pytest.mark.parametrize("slope", [0.6, -0.6])
@pytest.mark.parametrize("side", SIDES[1:])
def test_on_every_side_lambda_pushes_where_the_slope_points(side, slope):
    """The part of |f·A| that speaks for what the slope says, Σ f·A·x / Σ f·|A|, is more than without f."""
    batch, rule = synthetic(slope, 0), Regression(("length",), 2.0, side)
    rule.observe(batch, math.nan)
    lam = -rule.gradient(torch.zeros(1)).item()
    assert abs(lam) == pytest.approx(1.2, abs=0.2)
    f = length_weights(batch.lengths, lam, length_weight="power", advantages=batch.advantages, side=side)
    x = batch.lengths.double().log()
    x = x - x.mean(dim=1, keepdim=True)
    push, plain = (((a * x).sum() / a.abs().sum()).item() / slope for a in (f * batch.advantages, batch.advantages))
    assert push > 1.05 * plain > 0


def test_without_a_signal_regression_asks_for_nothing_and_forgets_at_its_pace():
    rule = Regression(("length",), 2.0, "positive")
    rule.observe(batch_of([[3, 5]], torch.zeros(1, 2)), math.nan)
    assert rule.gradient(torch.zeros(1)).tolist() == [0.0] and math.isnan(rule.metrics()["lambda/r2"])
    batch = synthetic(0.8, 0)
    rule.observe(batch, math.nan)
    before = rule._sums[0, 1] / rule._sums[0, 0]
    right = torch.where(batch.advantages > 0, batch.lengths, 0)  # what is left of a group is right throughout
    rule.observe(batch_of(right, (batch.advantages > 0).double()), math.nan)
    assert float(rule._sums[0, 1] / rule._sums[0, 0]) == pytest.approx(float(before), rel=1e-12)
    assert rule.state_dict()["count"] == pytest.approx(0.9 * 64 * 7)
    with pytest.raises(ValueError, match="learns from one advantage per response, and the batch has one per token"):
        rule.observe(batch_of([[3, 5]]), math.nan)


def test_descent_takes_autograds_gradient():
    with pytest.raises(TypeError, match="autograd makes λ's gradient"):
        Descent("sapo").gradient(torch.zeros(1))


class Loop:
    """Target, λ's parameter group and an optimizer in float64, on lengths that the test makes up."""

    def __init__(self, steps=4, target=1000.0, side="positive", optimizer="adamw", init=0.0):
        self.steps, self.side, self.path = steps, side, []
        self.rule = Target(target, steps, side, TARGET_BOUNDS, init)
        self.parameter = LambdaParameter(init, self.rule, bounds=TARGET_BOUNDS, device=torch.device("cpu"))
        self.parameter.tensor.data = torch.tensor([init], dtype=torch.float64)
        self.torch = OPTIMIZERS[optimizer]([torch.zeros(1, requires_grad=True)], lr=1e-3)
        self.torch.add_param_group(self.parameter.group(0.1, self.torch.defaults))

    def generation_batch(self, length: float) -> None:
        self.rule.observe(batch_of([[1]]), length)
        for _ in range(self.steps):
            self.parameter.clip_gradient()
            self.torch.step()
            self.parameter.finish_step()
            self.path.append(self.parameter.values[0])

    def run(self, k, batches, *, start=0.7, drift=0.0, noise=0.0, delay=0) -> list[float]:
        """ln(L/target) of each generation batch where ln L moves by k·λ + drift per optimizer step."""
        generator, x, path = random.Random(0), start, []
        for batch in range(batches):
            path.append(x)
            seen = path[max(0, batch - delay)] + noise * generator.gauss(0, 1)
            done = len(self.path)
            self.generation_batch(1000 * math.exp(seen))
            x += sum(k * (value if self.side != "negative" else -value) + drift for value in self.path[done:])
        return path


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("side", SIDES[1:])
@pytest.mark.parametrize(("steps", "target"), [(1, 900.0), (4, 900.0), (3, 0.6)])
def test_target_equals_plain_loops(steps, target, side, optimizer):
    """The loops have no momentum. Through JSON after every batch."""
    lengths = [1000 + 700 * math.sin(i / 3) + 40 * (i % 5) for i in range(40)]
    loop, gaps = Loop(steps, target, side, optimizer, init=0.4), []
    for length in lengths:
        through_json(loop.rule, loop.rule)
        loop.generation_batch(length)
        gaps.append(loop.rule.metrics()["lambda/target_gap"])
    eps = 1.0 if optimizer == "adamw" else None
    expected = reference.target_path(lengths, target, steps, side, TARGET_BOUNDS, 0.4, eps)
    assert loop.path == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert max(loop.path) - min(loop.path) > 2
    tokens = target if target > 1 else target * sum(lengths[:4]) / 4
    first = 0 if target > 1 else 3
    assert all(map(math.isnan, gaps[:first])) and gaps[first] == pytest.approx(math.log(lengths[first] / tokens))


# (movement of ln L per optimizer step at λ = 1, optimizer steps per generation batch, generation batches of delay)
PLANTS = [(k, n, delay) for k in (0.003, 0.01, 0.03) for n in (1, 4) for delay in (0, 1)]


@pytest.mark.parametrize("drift", [-1.5, 0.0, 1.5])  # as much as λ = 1.5 moves
@pytest.mark.parametrize(("k", "steps", "delay"), [p for p in PLANTS if p[0] * p[1] * (1 + p[2]) <= 0.12])
def test_the_length_settles_however_fast_it_reacts(k, steps, delay, drift):
    """10-fold in speed, up to where λ = -3 takes a third of the length off in one generation batch."""
    path = Loop(steps).run(k, round((3 / k + 500) / steps), drift=drift * k, noise=0.06, delay=delay)
    last = path[-40:]
    assert abs(sum(last) / len(last)) < 0.04 and max(map(abs, last)) < 0.15 and min(path) > -1.0


def test_nothing_sampled_changes_nothing():
    loop = Loop(target=0.5)
    for length in (80, 120, 0.0, math.nan, 90, 110):
        before = loop.rule.state_dict()
        loop.generation_batch(length)
        assert (loop.rule.state_dict() == before) == (not length > 0)
    assert loop.rule.set_point == 50
