"""λ with the sign of the advantage: every side × family × scope, the rule that learns it, and the plain balance."""

import itertools
import json
import math
import os
import warnings
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import LENGTHS, Batch, build, build_model, config, train, watch
from test_loss import scored

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer, TRGRPOConfig, TRGRPOTrainer
from trl_lambda.preference.rules import Regression
from trl_lambda.trl_seam.generation_batch import GenerationBatch
from trl_lambda.weights import SIDES, length_weights

SIGNED = tuple(side for side in SIDES if side != "both")
# Rows with A = 0, a row without tokens, a group of equal rewards, groups of one sign more often than the other.
LENGTH_ROWS = [[3, 1, 12, 6, 9], [2, 0, 9, 5, 5], [7, 4, 1, 11, 2], [4, 8, 2, 2, 6]]
ADVANTAGES = [[1.2, -0.3, -0.9, 0.0, 0.4], [-0.5, 0.7, 1.1, -1.0, 0.2], [0.0] * 5, [-1.0, -1.0, 2.5, -0.5, 0.0]]
THREE = ["length", "mean_logp", "min_logp"]


def raw_features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(LENGTH_ROWS), 5, 2, generator=generator, dtype=torch.float64)


def tensors():
    return torch.tensor(LENGTH_ROWS, dtype=torch.float64), torch.tensor(ADVANTAGES, dtype=torch.float64)


def weights_of(lam, aggregation="power", **options):
    lengths, advantages = tensors()
    return length_weights(lengths, lam, aggregation=aggregation, advantages=advantages, **options)


# ---- The formula ----


@pytest.mark.parametrize("lam", [-1.7, -0.4, 0.0, 0.9, 6.0])
@pytest.mark.parametrize("scope", ["batch", "prompt"])
@pytest.mark.parametrize(("aggregation", "side"), list(itertools.product(["lambda", "power"], SIGNED)))
def test_every_side_equals_the_reference(aggregation, side, scope, lam):
    mine = weights_of(torch.tensor(lam, dtype=torch.float64), aggregation, side=side, scope=scope)
    expected = reference.side_weights(LENGTH_ROWS, ADVANTAGES, [lam], aggregation, side, scope)
    rtol = 1e-10 if aggregation == "power" else 1e-7  # σ + 1e-8 in z
    torch.testing.assert_close(mine, torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("scope", ["batch", "prompt"])
@pytest.mark.parametrize("side", SIGNED)
def test_features_equal_the_reference(side, scope):
    lam, raw = [0.6, -0.8, 0.3], raw_features()
    mine = weights_of(torch.tensor(lam, dtype=torch.float64), side=side, scope=scope, features=raw)
    expected = reference.side_weights(
        LENGTH_ROWS, ADVANTAGES, lam, "power", side, scope, [raw[..., k].tolist() for k in range(2)]
    )
    torch.testing.assert_close(mine, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    alone = weights_of(torch.tensor(lam[1:], dtype=torch.float64), side=side, scope=scope, features=raw)
    without = weights_of(torch.tensor([0.0, *lam[1:]], dtype=torch.float64), side=side, scope=scope, features=raw)
    torch.testing.assert_close(alone, without)


@pytest.mark.parametrize("scope", ["batch", "prompt"])
def test_balanced_and_positive_weight_equal_the_reference(scope):
    balanced = reference.balanced_weights(LENGTH_ROWS, ADVANTAGES, scope)
    mine = weights_of(None, "balanced", scope=scope)
    torch.testing.assert_close(mine, torch.tensor(balanced, dtype=torch.float64), rtol=1e-10, atol=0)
    for aggregation, lam in (("dapo", None), ("grpo", None), ("power", 0.7), ("lambda", -1.2)):
        own = "batch" if aggregation == "grpo" else scope
        plain = reference.length_weights(LENGTH_ROWS, lam, aggregation, own)
        expected = reference.favour_positive(plain, LENGTH_ROWS, ADVANTAGES, 3.0, own)
        mine = weights_of(lam, aggregation, scope=scope, positive_weight=3.0)
        rtol = 1e-7 if aggregation == "lambda" else 1e-10  # σ + 1e-8 in z
        torch.testing.assert_close(mine, torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=0)


@pytest.mark.parametrize(("aggregation", "side"), list(itertools.product(["lambda", "power"], SIDES)))
def test_gradient_in_lambda(aggregation, side):
    lam = torch.tensor([0.37], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: weights_of(x, aggregation, side=side), lam)


@pytest.mark.parametrize("side", SIGNED)
def test_gradient_in_several_lambdas(side):
    lam = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: weights_of(x, side=side, features=raw_features()), lam)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("aggregation", "side"), list(itertools.product(["lambda", "power"], SIDES)))
def test_lambda_0_is_the_token_mean_to_the_bit(aggregation, side, dtype):
    lengths, advantages = tensors()
    zero = length_weights(lengths.to(dtype), 0.0, aggregation=aggregation, side=side, advantages=advantages.to(dtype))
    assert torch.equal(zero, length_weights(lengths.to(dtype), aggregation="dapo"))


def test_what_each_side_leaves_alone():
    positive, negative = (weights_of(1.0, side=side) for side in ("positive", "negative"))
    lengths, advantages = tensors()
    both_signs = 0
    for weights, other in ((positive, advantages <= 0), (negative, advantages >= 0)):
        untouched = weights[(lengths > 0) & other]
        assert untouched.max() - untouched.min() < 1e-12  # one factor, of the token mass
        both_signs += 1
    assert both_signs == 2
    long_right, short_right = positive[3, 2], positive[0, 0]
    assert positive[0, 0] < positive[0, 4] and negative[0, 2] > negative[0, 1]
    assert long_right > 0 and short_right > 0


def test_groups_without_a_signal_and_of_one_member():
    lengths = torch.tensor([[5, 9, 2]])
    rounding = torch.tensor([[3e-8, 3e-8, 3e-8]])  # what equal rewards leave
    ones = torch.ones(1, 3)
    for aggregation, side in itertools.product(["lambda", "power"], SIGNED):
        stacked = torch.cat([rounding, torch.tensor([[1.0, -1.0, 0.5]])])
        weights = length_weights(
            lengths.expand(2, 3), 2.0, aggregation=aggregation, side=side, advantages=stacked, scope="prompt"
        )
        assert weights[0].max() - weights[0].min() < 1e-6
        alone = length_weights(torch.tensor([[4], [7]]), 2.0, aggregation=aggregation, side=side,
                               advantages=torch.tensor([[1.0], [-1.0]]))  # fmt: skip
        torch.testing.assert_close(alone, torch.ones(2, 1))
    assert torch.equal(length_weights(lengths, aggregation="balanced", advantages=rounding * 0), ones)


def test_a_reward_at_its_groups_mean_has_no_sign():
    """Rounding leaves such an advantage at ±1e-8: which one must not decide."""
    lengths = torch.tensor([[4, 9, 2, 7]])
    for aggregation, options in (("balanced", {}), ("power", {"side": "positive"}), ("lambda", {"side": "signed"})):
        exact, above, below = (
            length_weights(lengths, 1.5, aggregation=aggregation, positive_weight=3.0, **options,
                           advantages=torch.tensor([[1.2, rest, -1.2, rest]]))
            for rest in (0.0, 3e-8, -3e-8)
        )  # fmt: skip
        assert torch.equal(exact, above) and torch.equal(exact, below)


@st.composite
def batches(draw):
    prompts, group = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    rows = st.lists(st.integers(0, 10**6), min_size=group, max_size=group)
    magnitude = st.floats(2**-10, 50, width=32)  # TRL's advantages are of the order of 1
    finite = st.one_of(st.just(0.0), magnitude, magnitude.map(lambda x: -x))
    advantages = st.lists(finite, min_size=group, max_size=group)
    return (
        [draw(rows) for _ in range(prompts)],
        [draw(advantages) for _ in range(prompts)],
        draw(st.floats(-500, 500, width=32)),
    )


@settings(
    max_examples=int(os.environ.get("TRL_LAMBDA_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(
    batches(),
    st.sampled_from(["lambda", "power", "balanced"]),
    st.sampled_from(SIDES),
    st.sampled_from(["batch", "prompt"]),
    st.sampled_from([1.0, 0.01, 30.0]),
)
def test_any_advantage_keeps_its_sign(batch, aggregation, side, scope, positive_weight):
    lengths, advantages, lam = torch.tensor(batch[0]), torch.tensor(batch[1]), batch[2]
    options = {} if aggregation == "balanced" else {"side": side}
    weights = length_weights(
        lengths, lam, aggregation=aggregation, scope=scope, advantages=advantages,
        positive_weight=positive_weight, **options,
    )  # fmt: skip
    assert weights.isfinite().all() and ((weights > 0) == (lengths > 0)).all()
    weighted = weights * advantages
    assert ((weighted > 0) == ((advantages > 0) & (lengths > 0))).all()
    assert (weighted.sign() * advantages.sign() >= 0).all()


# ---- The rule ----


def synthetic(slope, seed, prompts=64, group=8, noise=0.5):
    """Advantages that rise with ln|o| by `slope`, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 60, (prompts, group), generator=generator)
    x = lengths.double().log()
    a = slope * (x - x.mean(dim=1, keepdim=True)) + noise * torch.randn(prompts, group, generator=generator).double()
    return GenerationBatch(lengths.int(), (a - a.mean(dim=1, keepdim=True)).float())


def follow(rule, batches, steps=4, rate=0.1):
    lam, path = torch.zeros(1), []
    for batch in batches:
        rule.observe(batch, math.nan)
        for _ in range(steps):
            lam = lam - rate * rule.gradient(lam)
        path.append(lam.item())
    return path


@pytest.mark.parametrize("slope", [0.4, -0.7])
def test_the_rule_settles_at_gain_times_slope(slope):
    path = follow(Regression(("length",), 2.0), [synthetic(slope, seed) for seed in range(60)])
    assert path[-1] == pytest.approx(2 * slope, rel=0.05)
    assert max(map(abs, path)) < 2 * abs(slope) * 1.15


def test_without_a_slope_it_stays_within_its_noise():
    path = follow(Regression(("length",), 2.0), [synthetic(0.0, seed) for seed in range(60)])
    # The slope's standard error over 64 × 8 rows, ten batches in effect: 0.5 / √(10·448·0.42) = 0.012.
    assert max(map(abs, path)) < 2 * 3 * 0.012


def test_flipped_advantages_flip_the_path():
    data = [synthetic(0.3, seed) for seed in range(12)]
    flipped = [GenerationBatch(b.lengths, -b.advantages) for b in data]
    up, down = follow(Regression(("length",), 2.0), data), follow(Regression(("length",), 2.0), flipped)
    assert up == [-value for value in down] and up[-1] > 0.1


def test_several_features_equal_the_normal_equations():
    generator = torch.Generator().manual_seed(3)
    data, plain = [], []
    for seed in range(5):
        batch = synthetic(0.5, seed, prompts=6)
        logps = torch.randn(2, 6, 8, generator=generator)
        batch.lengths[0, 2] = 0
        batch.advantages[4] = 0.0
        data.append(GenerationBatch(batch.lengths, batch.advantages, dict(zip(THREE[1:], logps, strict=True))))
        plain.append((batch.lengths.tolist(), batch.advantages.double().tolist(), logps.double().tolist()))
    rule = Regression(tuple(THREE), 2.0)
    for batch, expected in zip(data, reference.regression(plain, 2, 2.0), strict=True):
        rule.observe(batch, math.nan)
        gradient = rule.gradient(torch.zeros(3, dtype=torch.float64))
        assert (-gradient).tolist() == pytest.approx(expected, rel=1e-8, abs=1e-12)
    assert rule.metrics()["lambda/r2"] > 0.05 and rule.metrics()["lambda/slope"] > 0.2


@pytest.mark.parametrize("slope", [0.6, -0.6])
@pytest.mark.parametrize("side", SIDES[1:])
def test_on_every_side_the_rule_pushes_where_the_slope_points(side, slope):
    """The part of |f·A| that speaks for what the slope says, Σ f·A·x / Σ f·|A|, is more than without f."""
    batch = synthetic(slope, 0)
    rule = Regression(("length",), 2.0, side)
    rule.observe(batch, math.nan)
    lam = -rule.gradient(torch.zeros(1)).item()
    assert abs(lam) == pytest.approx(1.2, abs=0.2)
    f = length_weights(batch.lengths, lam, aggregation="power", advantages=batch.advantages, side=side)
    x = batch.lengths.double().log()
    x = x - x.mean(dim=1, keepdim=True)
    push, plain = (((a * x).sum() / a.abs().sum()).item() / slope for a in (f * batch.advantages, batch.advantages))
    assert push > 1.05 * plain > 0


def test_groups_of_equal_rewards_are_no_signal():
    """Rewards of 0.7 leave advantages of 6e-4, all of one sign, where TRL divides rounding by its 1e-4."""
    batch, rule = synthetic(0.8, 0), Regression(("length",), 2.0)
    rule.observe(batch, math.nan)
    before = rule.slopes().item()
    rule.observe(GenerationBatch(batch.lengths, torch.full_like(batch.advantages, 6e-4)), math.nan)
    assert rule.slopes().item() == pytest.approx(before, rel=0.01)
    assert rule.state_dict()["count"] == pytest.approx(0.9 * 64 * 7)
    rows = torch.where(batch.advantages > 0, batch.lengths, 0)  # what is left of a group is right throughout
    rule.observe(GenerationBatch(rows, (batch.advantages > 0).float()), math.nan)
    assert rule.state_dict()["count"] == pytest.approx(0.81 * 64 * 7)


def test_a_rule_without_any_signal_asks_for_nothing():
    rule = Regression(("length",), 2.0)
    rule.observe(GenerationBatch(torch.tensor([[3, 5]]), torch.zeros(1, 2)), math.nan)
    assert rule.gradient(torch.zeros(1)).tolist() == [0.0]
    assert math.isnan(rule.metrics()["lambda/r2"])


# ---- In the trainer ----


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize(
    ("options", "f"),
    [
        (
            {"aggregation": aggregation, "lambda_side": side, "lambda_init": 0.8, "lambda_learnable": False},
            lambda lengths, a, aggregation=aggregation, side=side: reference.side_weights(
                lengths, a, [0.8], aggregation, side
            ),
        )
        for aggregation, side in itertools.product(["lambda", "power"], SIGNED)
    ]
    + [
        ({"aggregation": "balanced"}, reference.balanced_weights),
        (
            {"aggregation": "dapo", "positive_weight": 2.5},
            lambda lengths, a: reference.favour_positive([[1.0] * 4] * 3, lengths, a, 2.5),
        ),
    ],
)
def test_loss_equals_the_row_by_row_reference(options, f, loss_type):
    batch = Batch()
    regulation = {"token_regulation": "sigmoid"}
    trainer = build(
        LambdaGRPOTrainer, config(LambdaGRPOConfig, batch, loss_type=loss_type, **options, **regulation), batch
    )
    inputs = scored(trainer)
    loss = trainer.compute_loss(trainer.model, inputs)
    ids = trainer.processing_class(trainer.train_dataset["prompt"][:3])["input_ids"]
    advantages = inputs["advantages"].tolist()
    weights = f(LENGTHS, [advantages[i : i + 4] for i in (0, 4, 8)])
    old = [row[: len(c)].tolist() for row, c in zip(inputs["old_per_token_logps"], batch.completions, strict=True)]
    expected = reference.policy_loss(
        trainer.model, [row for row in ids for _ in range(4)], batch.completions, old, advantages,
        sum(weights, []), loss_type=loss_type, regulation="sigmoid",
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_positive_weight_on_trls_own_reduction(loss_type):
    """Each response's gradient counts c times where A > 0, over TRL's loss with the same advantages."""
    steps = {"max_steps": 1, "aggregation": None, "loss_type": loss_type}
    mine = train(LambdaGRPOTrainer, LambdaGRPOConfig, positive_weight=3.0, **steps)
    theirs = train(LambdaGRPOTrainer, LambdaGRPOConfig, max_steps=1, aggregation=loss_type, positive_weight=3.0)
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-5)
    unweighted = steps | {"token_regulation": "linear", "regulation_alpha": 0.0}  # v = 1
    assert mine.losses != pytest.approx(train(LambdaGRPOTrainer, LambdaGRPOConfig, **unweighted).losses, rel=1e-2)


@pytest.mark.parametrize("old", [True, False], ids=["TRL's old log-probabilities", "a forward pass of their own"])
def test_features_are_those_of_the_sampling_policys_own_tokens(old):
    own = [[0] * 7 if row == 8 else [int(t % 3 != 1) for t in range(n)] for row, n in enumerate(sum(LENGTHS, []))]
    batch = Batch(env_mask=lambda row, length: own[row])
    shared = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 6, "steps_per_generation": 2}
    options = {"aggregation": "power", "lambda_side": "positive", "lambda_features": THREE} | (shared if old else {})
    trainer = build(LambdaGRPOTrainer, config(LambdaGRPOConfig, batch, **options), batch)
    inputs = scored(trainer, noise=0.0)
    known = trainer._scoring.batches["train"]
    logps = inputs["old_per_token_logps"]
    for row, mask in enumerate(own):
        values = [logps[row, t].item() for t, m in enumerate(mask) if m]
        group, place = divmod(row, 4)
        mean = sum(values) / len(values) if values else 0.0
        assert known.features["mean_logp"][group, place].item() == pytest.approx(mean, abs=1e-5)
        assert known.features["min_logp"][group, place].item() == pytest.approx(min(values, default=0.0), abs=1e-5)


PREFERENCES = {
    "positive, three features": {
        "aggregation": "power", "lambda_side": "positive", "lambda_features": THREE, "lambda_learning_rate": 0.5,
    },
    "softmax, signed": {"aggregation": "lambda", "lambda_side": "signed", "lambda_learning_rate": 0.5},
    "target": {"aggregation": "power", "length_target": 4.0},
    "target, a part": {"aggregation": "power", "length_target": 0.5, "lambda_side": "negative"},
}  # fmt: skip
LONG = {"max_steps": 8, "learning_rate": 5e-3, "optim": "adamw_torch", "lr_scheduler_type": "linear"}


@pytest.mark.parametrize("home", ["the trainer's optimizer", "a companion"])
@pytest.mark.parametrize("name", PREFERENCES)
def test_a_resumed_run_equals_the_whole_one_to_the_bit(name, home, tmp_path):
    def go(folder, resume=None):
        batch, model = Batch(), build_model()
        options = LONG | PREFERENCES[name] | {"output_dir": str(tmp_path / folder)}
        arguments = {}
        if home == "a companion":
            arguments["optimizers"] = (torch.optim.SGD(model.parameters(), lr=5e-3, momentum=0.9), None)
        args = config(LambdaGRPOConfig, batch, save_strategy="steps", save_steps=5, **options)
        trainer = build(LambdaGRPOTrainer, args, batch, model, **arguments)
        run = watch(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return run

    whole = go("whole")
    assert len(set(whole.lambdas)) > 2
    resumed = go("resumed", str(tmp_path / "whole" / "checkpoint-5"))
    assert resumed.lambdas == whole.lambdas[5:] and resumed.losses == whole.losses[5:]
    assert resumed.trainer.lambda_values == whole.trainer.lambda_values
    for parameter, value in whole.parameters().items():
        assert torch.equal(resumed.parameters()[parameter], value), parameter


def test_resuming_with_another_preference_raises(tmp_path):
    options = LONG | {"save_strategy": "steps", "save_steps": 4, "output_dir": str(tmp_path)}
    train(LambdaGRPOTrainer, LambdaGRPOConfig, **options, **PREFERENCES["positive, three features"])
    for change, message in (
        ({"lambda_side": "signed"}, "lambda_side='signed', but .* was trained with 'positive'"),
        ({"lambda_features": ["length", "min_logp"]}, "lambda_features=.*, but .* was trained with"),
        ({"lambda_features": ["length"], "length_target": 4.0}, "but .* was trained with"),
    ):
        batch = Batch()
        changed = options | PREFERENCES["positive, three features"] | change
        trainer = build(LambdaGRPOTrainer, config(LambdaGRPOConfig, batch, **changed), batch)
        with pytest.raises(ValueError, match=message + ".*Resume with that one"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_learned_by_a_rule_to_fixed_and_back(tmp_path):
    signed = {"aggregation": "power", "lambda_side": "signed"}

    def go(folder, resume=None, **options):
        batch = Batch()
        saving = {"save_strategy": "steps", "save_steps": 4, "output_dir": str(tmp_path / folder)}
        trainer = build(LambdaGRPOTrainer, config(LambdaGRPOConfig, batch, **(LONG | saving | options)), batch)
        run = watch(trainer)
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume / "checkpoint-4"))
        return run

    mean_length = sum(map(len, Batch().completions)) / 12
    go("learned", **signed, length_target=4.0, lambda_rule="target")
    fixed = signed | {"lambda_learnable": False}
    with pytest.raises(ValueError, match="is fixed .*Resume with lambda_init=") as error:
        go("a", "learned", **fixed)
    advised = float(str(error.value).rpartition("lambda_init=")[2].rstrip("."))
    assert go("fixed", "learned", **fixed, lambda_init=advised).lambdas == [pytest.approx(advised)] * 4
    go("start", **fixed, lambda_init=0.25)
    on = go("b", "start", **signed, length_target=4.0, lambda_rule="target").lambdas
    # From the λ that was fixed, the first step is the controller's with the integral at 0, half way down the schedule.
    e = math.log(mean_length / 4.0)
    gap = (0.25 + 6 * e + 0.05 * min(e, 0.25)) / 6
    step = 0.5 * 6 * -math.expm1(-12 * 0.1) * gap / (1 + gap)
    assert len(on) == 4 and on[-1] != 0.25 and on[0] == pytest.approx(0.25 - step, abs=1e-5)


def test_damaged_statistics_of_a_rule_are_named(tmp_path):
    options = LONG | {"save_strategy": "steps", "save_steps": 4, "output_dir": str(tmp_path)}
    train(LambdaGRPOTrainer, LambdaGRPOConfig, **options, **PREFERENCES["softmax, signed"])
    path = tmp_path / "checkpoint-4" / "lambda.json"
    content = json.loads(path.read_text())
    for damage in ({}, {"sums": [1.0], "count": 1.0}, {"sums": ["x"] * 4, "count": 1.0}, {"count": 2.0}):
        path.write_text(json.dumps(content | {"rule_state": damage}))
        batch = Batch()
        args = config(LambdaGRPOConfig, batch, **(options | PREFERENCES["softmax, signed"]))
        trainer = build(LambdaGRPOTrainer, args, batch)
        with pytest.raises(ValueError, match="lambda.json is damaged .*To start λ's rule afresh"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_logs_and_card_name_every_lambda():
    options = PREFERENCES["positive, three features"]
    result = train(LambdaGRPOTrainer, LambdaGRPOConfig, **LONG, **options)
    last = result.logs[-1]
    assert {"lambda/value", "lambda/mean_logp", "lambda/min_logp", "lambda/r2", "lambda/slope"} <= last.keys()
    assert {"length_weight/positive/max", "length_weight/negative/min"} <= last.keys()
    values = result.trainer.lambda_values
    assert list(values) == THREE and result.trainer.lambda_value == values["length"]
    assert last["lambda/mean_logp"] == pytest.approx(values["mean_logp"])
    result.trainer.create_model_card("x")
    card = Path(result.trainer.args.output_dir, "README.md").read_text()
    assert "| side (`lambda_side`) | positive |" in card and "length, mean_logp, min_logp" in card
    assert "| how λ learns (`lambda_rule`) | regression |" in card


# ---- Refusals ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_side": "left"}, "lambda_side='left' is unknown; accepted: 'both', 'signed'"),
        ({"lambda_rule": "guess"}, "lambda_rule='guess' is unknown; accepted: descent, regression, target"),
        ({"lambda_side": "positive", "lambda_rule": "descent"}, "lambda_rule='descent' cannot serve"),
        ({"lambda_rule": "regression"}, "lambda_rule='regression' needs lambda_side='signed'"),
        ({"lambda_side": "signed", "lambda_gain": 0.0}, "lambda_gain=0.0 must be finite and > 0"),
        ({"lambda_gain": 3.0}, "lambda_gain=3.0 has no effect with lambda_rule='descent'"),
        ({"aggregation": "dapo", "lambda_side": "signed"}, "lambda_side='signed' has no effect"),
        (
            {"lambda_side": "signed", "lambda_learnable": False, "lambda_rule": "regression"},
            "lambda_rule='regression' has no effect with lambda_learnable=False",
        ),
        ({"lambda_features": ["length", "min_logp"]}, "lambda_features=['length', 'min_logp'] has no effect"),
        (
            {"aggregation": "power", "lambda_features": ["length", "min_logp"]},
            "lambda_features=['length', 'min_logp'] needs a lambda_side other than 'both'",
        ),
        (
            {"aggregation": "power", "lambda_side": "positive", "lambda_features": ["weight"]},
            "must be a list of 'length', 'mean_logp', 'min_logp'",
        ),
        (
            {"aggregation": "power", "lambda_side": "positive", "lambda_features": ["length", "length"]},
            "names a feature twice",
        ),
        ({"positive_weight": 0.0}, "positive_weight=0.0 must be finite and > 0"),
        ({"positive_weight": math.inf}, "positive_weight=inf must be finite and > 0"),
        ({"lambda_rule": "target"}, "lambda_rule='target' requires length_target"),
        ({"lambda_side": "positive", "lambda_rule": "target"}, "lambda_rule='target' requires length_target"),
        ({"length_target": -3.0}, "length_target=-3.0 must be > 0 and at most max_completion_length"),
        (
            {"length_target": 500.0, "max_completion_length": 256},
            "length_target=500.0 must be > 0 and at most max_completion_length=256",
        ),
        (
            {"length_target": 9.0, "lambda_side": "positive", "lambda_rule": "regression"},
            "length_target=9.0 has no effect with lambda_rule='regression'",
        ),
        (
            {"aggregation": "power", "length_target": 9.0, "lambda_features": ["length", "min_logp"]},
            "lambda_rule='target' weighs length alone",
        ),
        ({"aggregation": "dapo", "length_target": 9.0}, "length_target=9.0 has no effect"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match="(?s).*".join(map(__import__("re").escape, [message]))):
        LambdaGRPOConfig("unused", bf16=False, use_cpu=True, report_to="none", **options)


def test_one_advantage_per_token_is_refused_where_the_sign_is_needed():
    class PerToken(LambdaGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["advantages"] = output["advantages"].unsqueeze(1).expand_as(output["completion_mask"])
            return output

    batch = Batch()
    args = config(LambdaGRPOConfig, batch, lambda_side="signed")
    with pytest.raises(ValueError, match="advantages are required by side='signed'"):
        build(PerToken, args, batch).train()


def test_the_papers_defaults_stay():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        args = LambdaGRPOConfig("unused", bf16=False, use_cpu=True, report_to="none")
        assert args.rule_of(args.make_length_weight()) == "descent"
        assert TRGRPOConfig("unused", bf16=False, use_cpu=True, report_to="none").aggregation is None
    assert TRGRPOTrainer._config_class is TRGRPOConfig
