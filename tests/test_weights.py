"""`weights.py` against plain fp64 loops, closed forms and its own guarantees."""

import math
import random

import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_lambda.weights import (
    LEARNABLE_AGGREGATIONS,
    LENGTH_AGGREGATIONS,
    TOKEN_REGULATIONS,
    length_weights,
    probability_weights,
    sequence_mean_weights,
)

LAMBDAS = [-20.0, -3.7, -1.0, -0.3, 0.0, 0.5, 1.0, 2.0, 7.0, 20.0]


def groups(case: str) -> list[list[int]]:
    rng = random.Random(case)
    return {
        "paper": [[120, 190, 260, 320, 400, 470, 530, 600]],
        "unequal": [[1, 32768, 7, 400], [3, 3, 3, 9000], [12, 5, 77, 1]],
        "zero rows": [[0, 5, 9, 0], [4, 0, 0, 0], [8, 2, 6, 3]],
        "equal": [[6, 6, 6], [1, 1, 1]],
        "one response": [[5], [9], [1]],
        "sixty-four": [[rng.randint(1, 32768) for _ in range(64)] for _ in range(3)],
        "one long": [[1] * 63 + [32768]],
    }[case]


CASES = ["paper", "unequal", "zero rows", "equal", "one response", "sixty-four", "one long"]


@pytest.mark.parametrize("scope", ["batch", "prompt"])
@pytest.mark.parametrize("aggregation", LENGTH_AGGREGATIONS)
@pytest.mark.parametrize("case", CASES)
def test_length_weights_equal_the_reference(case, aggregation, scope):
    lengths = groups(case)
    for lam in LAMBDAS if aggregation in LEARNABLE_AGGREGATIONS else [0.0]:
        rng = random.Random(case)
        advantages = [[rng.choice([-1.0, -0.5, 0.0, 2.0]) for _ in group] for group in lengths]
        expected = torch.tensor(
            reference.length_weights(lengths, lam, aggregation, scope, 1 / 9, 512, advantages), dtype=torch.float64
        )
        options = {"aggregation": aggregation, "scope": scope, "max_completion_length": 512}
        options["advantages"] = torch.tensor(advantages, dtype=torch.float64)
        exact = length_weights(torch.tensor(lengths), torch.tensor(lam, dtype=torch.float64), **options)
        assert exact.dtype == torch.float64
        # exp(h^20) magnifies the 1e-8 that the package adds to σ and the reference does not.
        torch.testing.assert_close(exact, expected, rtol=1e-7, atol=1e-10)
        single = length_weights(torch.tensor(lengths), lam, **options)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["lambda", "power"])
def test_fp64_agrees_to_1e10_where_nothing_is_near_underflow(aggregation):
    lengths = groups("paper")
    for lam in (-3.7, -1.0, 0.5, 2.0, 7.0):
        expected = torch.tensor(reference.length_weights(lengths, lam, aggregation), dtype=torch.float64)
        exact = length_weights(torch.tensor(lengths), torch.tensor(lam, dtype=torch.float64), aggregation=aggregation)
        torch.testing.assert_close(exact, expected, rtol=1e-10, atol=1e-10)


def test_known_weights_of_one_group_and_of_its_halves():
    """Lengths {100, 120, 400, 420} at λ = 2: a group cut in two weighs something else."""
    whole = length_weights(torch.tensor([[100, 120, 400, 420]]), 2.0, aggregation="lambda")
    halves = length_weights(torch.tensor([[100, 120], [400, 420]]), 2.0, aggregation="lambda")
    torch.testing.assert_close(whole, torch.tensor([[0.77, 0.79, 1.20, 1.24]]), atol=5e-3, rtol=0)
    torch.testing.assert_close(halves, torch.tensor([[0.78, 1.22], [0.78, 1.22]]), atol=5e-3, rtol=0)


@pytest.mark.parametrize("scope", ["batch", "prompt"])
@pytest.mark.parametrize("aggregation", ["lambda", "power"])
@pytest.mark.parametrize("case", CASES)
def test_lambda_zero_is_dapo_bit_for_bit(case, aggregation, scope):
    lengths = torch.tensor(groups(case))
    dapo = length_weights(lengths, aggregation="dapo", scope=scope)
    assert torch.equal(length_weights(lengths, 0.0, aggregation=aggregation, scope=scope), dapo)


@pytest.mark.parametrize("case", CASES)
def test_power_minus_one_is_grpo(case):
    """Up to rows without tokens, which GRPO counts as rows and power does not."""
    lengths = torch.tensor(groups(case))
    counted = lengths.numel() / (lengths > 0).sum()
    power = length_weights(lengths, -1.0, aggregation="power")
    torch.testing.assert_close(power, counted * length_weights(lengths, aggregation="grpo"), rtol=1e-6, atol=0)


def test_power_share_is_length_to_the_one_plus_lambda():
    lengths, lam = torch.tensor([[3, 50, 700]]), 0.6
    share = lengths * length_weights(lengths, lam, aggregation="power")
    expected = lengths.double() ** (1 + lam)
    torch.testing.assert_close(share / share.sum(), (expected / expected.sum()).float())


@pytest.mark.parametrize("lam", LAMBDAS)
def test_what_is_preserved(lam):
    lengths = torch.tensor(groups("zero rows"))
    softmax = length_weights(lengths, lam, aggregation="lambda")
    torch.testing.assert_close(softmax.sum(dim=1), (lengths > 0).sum(dim=1).float())
    power = length_weights(lengths, lam, aggregation="power")
    torch.testing.assert_close((power * lengths).sum(), lengths.sum().float())
    per_prompt = length_weights(lengths, lam, aggregation="power", scope="prompt")
    means = torch.full((3,), lengths.sum().item() / 3)  # every prompt has the same mass
    torch.testing.assert_close((per_prompt * lengths).sum(dim=1), means)


@pytest.mark.parametrize("aggregation", ["lambda", "power"])
@pytest.mark.parametrize("lam", [-20.0, 20.0])
@pytest.mark.parametrize("case", CASES)
def test_weights_stay_positive_and_an_advantage_survives_them(case, lam, aggregation):
    lengths = torch.tensor(groups(case))
    weights = length_weights(lengths, lam, aggregation=aggregation)
    assert weights.isfinite().all()
    assert torch.equal(weights > 0, lengths > 0)
    assert ((1e-6 * weights > 0) == (lengths > 0)).all()


@pytest.mark.parametrize("lam", [-2.0, 0.0, 0.7, 3.0])
def test_gradient_in_lambda_is_the_closed_form(lam):
    lengths = groups("paper") + [[40, 800, 90, 10, 333, 5, 64, 1000]]
    generator = torch.Generator().manual_seed(0)
    surrogates = torch.randn(2, 8, generator=generator, dtype=torch.float64) * 100
    parameter = torch.tensor([lam], dtype=torch.float64, requires_grad=True)
    weights = length_weights(torch.tensor(lengths), parameter, aggregation="lambda")
    ((weights * surrogates).sum() / torch.tensor(lengths).sum()).backward()
    expected = reference.softmax_objective_gradient(lengths, surrogates.tolist(), lam)
    assert parameter.grad.item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("scope", ["batch", "prompt"])
@pytest.mark.parametrize("aggregation", ["lambda", "power"])
@pytest.mark.parametrize("lam", [-2.5, 0.0, 1.3])
def test_gradcheck(lam, aggregation, scope):
    lengths = torch.tensor(groups("zero rows"))
    parameter = torch.tensor([lam], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: length_weights(lengths, x, aggregation=aggregation, scope=scope), (parameter,)
    )


def test_lambda_rises_where_longer_responses_have_the_positive_advantage():
    lengths = torch.tensor([[10, 20, 30, 40]])
    for sign in (1.0, -1.0):
        parameter = torch.zeros(1, requires_grad=True)
        advantage_sums = sign * torch.tensor([[-1.0, -0.5, 0.5, 1.0]]) * lengths
        (length_weights(lengths, parameter, aggregation="lambda") * advantage_sums).sum().backward()
        assert parameter.grad.item() * sign > 0


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 5).flatmap(
        lambda g: st.lists(st.lists(st.integers(0, 32768), min_size=g, max_size=g), min_size=1, max_size=4)
    ),
    st.floats(-50, 50),
    st.sampled_from(["lambda", "power"]),
    st.sampled_from(["batch", "prompt"]),
)
def test_any_input_gives_finite_weights_and_gradient(lengths, lam, aggregation, scope):
    lengths = torch.tensor(lengths)
    parameter = torch.tensor([lam], requires_grad=True)
    weights = length_weights(lengths, parameter, aggregation=aggregation, scope=scope)
    assert weights.isfinite().all() and torch.equal(weights > 0, lengths > 0)
    (weights * torch.linspace(-1, 1, lengths.numel()).view_as(lengths)).sum().backward()
    assert parameter.grad.isfinite().all()


def test_order_within_a_group_and_of_groups_does_not_matter():
    lengths = torch.tensor(groups("unequal"))
    permutation = torch.tensor([2, 0, 3, 1])
    for aggregation in ("lambda", "power"):
        whole = length_weights(lengths, 1.7, aggregation=aggregation)
        torch.testing.assert_close(
            length_weights(lengths[:, permutation], 1.7, aggregation=aggregation), whole[:, permutation]
        )
        torch.testing.assert_close(length_weights(lengths.flip(0), 1.7, aggregation=aggregation), whole.flip(0))


def test_weights_are_finite_and_differentiable_when_h_to_the_lambda_overflows():
    lengths = torch.tensor([[1] * 80 + [1000]])  # h of the short ones is near 1, of the long one 1.99
    parameter = torch.tensor([5000.0], requires_grad=True)
    weights = length_weights(lengths, parameter, aggregation="lambda")
    assert weights[0, -1].item() == pytest.approx(81)
    weights.sum().backward()
    assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("lam", [-5000.0, -150.0, -40.0, 60.0, 5000.0])
@pytest.mark.parametrize("ties", [2, 5])
def test_ties_at_the_top_have_no_gradient_however_large_lambda_is(lam, ties):
    """The tied rows share everything: their weights are constants in λ."""
    top, rest = (3, 9000) if lam < 0 else (9000, 3)
    lengths = torch.tensor([[top] * ties + [rest] * (8 - ties)])
    parameter = torch.tensor([lam], requires_grad=True)
    weights = length_weights(lengths, parameter, aggregation="lambda")
    torch.testing.assert_close(weights[0, :ties], torch.full((ties,), 8 / ties))
    (weights * torch.arange(1.0, 9.0)).sum().backward()
    assert abs(parameter.grad.item()) < 1e-3


def test_sequence_mean_weights_turn_a_mean_of_means_into_a_token_mean():
    lengths = torch.tensor([[3, 0, 5], [2, 7, 1]])
    sums = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)) * (lengths > 0)
    weights = length_weights(lengths, 1.2, aggregation="lambda")
    token_mean = (weights * sums).sum() / lengths.sum()
    restated = (sequence_mean_weights(weights, lengths) * sums / lengths.clamp(min=1)).mean()
    torch.testing.assert_close(restated, token_mean)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"aggregation": "mean"}, "aggregation='mean' is unknown"),
        ({"aggregation": None}, "aggregation=None is unknown"),
        ({"scope": "token"}, "scope='token' is unknown"),
        ({"lengths": torch.tensor([1, 2])}, r"lengths must be a non-empty tensor of shape \(P, G\)"),
        ({"lengths": torch.zeros(0, 4)}, "lengths must be a non-empty tensor"),
        ({"lengths": [[1, 2]]}, "lengths must be a non-empty tensor of shape .*got list"),
        ({"lengths": torch.tensor([[True, False]])}, "lengths must be integer or float"),
        ({"lengths": torch.tensor([[3, -1]])}, "lengths must be finite and >= 0"),
        ({"lengths": torch.tensor([[3.0, math.nan]])}, "lengths must be finite and >= 0"),
        ({"lam": None}, "lam is required"),
        ({"lam": math.inf}, "lam=inf must be finite"),
        ({"lam": torch.tensor(math.nan)}, "lam=nan must be finite"),
        ({"lam": torch.zeros(2)}, "lam must be one real number"),
        ({"length_scale": 0.0}, "length_scale=0.0 must be finite and > 0"),
        ({"length_scale": 1.0}, "length_scale=1 is too large for groups of 2"),
        ({"lengths": torch.ones(1, 82)}, "length_scale=0.111111 is too large for groups of 82"),
        ({"aggregation": "dr_grpo"}, "max_completion_length=None must be > 0"),
    ],
)
def test_length_weights_name_the_bad_argument(arguments, message):
    given = {"lengths": torch.tensor([[1, 2]]), "lam": 0.5, "aggregation": "lambda"} | arguments
    with pytest.raises(ValueError, match=message):
        length_weights(given.pop("lengths"), given.pop("lam"), **given)


@pytest.mark.parametrize("regulation", TOKEN_REGULATIONS)
@pytest.mark.parametrize("alpha", [None, 0.7])
def test_probability_weights_equal_the_reference(regulation, alpha):
    logps = torch.linspace(-12, 0, 97, dtype=torch.float64).view(1, -1)
    expected = [[reference.probability_weight(x, regulation, alpha) for x in logps[0].tolist()]]
    weights = probability_weights(logps, regulation=regulation, alpha=alpha)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    single = probability_weights(logps.float(), regulation=regulation, alpha=alpha)
    torch.testing.assert_close(single, weights.float(), rtol=1e-5, atol=1e-5)


def test_reading_of_the_sigmoid_constants():
    """w = 1 up to π = 0.25 and 1.4 from π = 0.344: with the formula taken literally it would be 1.0 everywhere."""
    probs = torch.tensor([0.001, 0.2, 0.25, 0.3, 0.343, 0.345, 0.9, 1.0])
    weights = probability_weights(probs.log(), regulation="sigmoid")
    assert weights[:2].tolist() == [1.0, 1.0]
    assert weights[2].item() == pytest.approx(1.0, abs=1e-6)
    assert 1.0 < weights[3].item() < weights[4].item() < 1.4
    assert weights[5:].tolist() == pytest.approx([1.4, 1.4, 1.4])


@pytest.mark.parametrize("regulation", TOKEN_REGULATIONS)
def test_probability_weights_increase_are_detached_and_positive(regulation):
    logps = torch.tensor([-1e30, -500.0, -50.0, -3.0, -1.2, -0.5, 0.0], requires_grad=True)
    weights = probability_weights(logps, regulation=regulation, alpha=1.0 if regulation == "linear" else 2.0)
    assert not weights.requires_grad
    assert (weights.diff() >= 0).all() and weights[-1] > weights[0]
    assert (weights > 0).all() and (weights * 1e-6 > 0).all()


def test_probability_weights_keep_the_shape_and_leave_half_precision():
    for shape in [(), (3,), (2, 3, 5)]:
        assert probability_weights(torch.zeros(shape) - 1, regulation="linear").shape == shape
    half = torch.tensor([-1.0, -0.1], dtype=torch.bfloat16)
    assert probability_weights(half, regulation="sigmoid").dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"regulation": "tanh"}, "regulation='tanh' is unknown; accepted: 'sigmoid', 'linear'"),
        ({"alpha": 0.0}, "alpha=0.0 must be finite and > 0"),
        ({"regulation": "linear", "alpha": 1.5}, r"alpha=1.5 must be in \[0, 1\]"),
        ({"slope": -1.0}, "slope=-1.0 must be finite and > 0"),
        ({"center": 1.2}, "center=1.2 must be a probability"),
        ({"min": 0.0}, "min=0.0 must be finite and > 0"),
        ({"min": 1.5}, "max=1.4 must be finite and >= min=1.5"),
        ({"max": math.inf}, "max=inf must be finite"),
        ({"logps": torch.tensor([0.4, 0.9])}, "logps must be natural-log probabilities"),
        ({"logps": torch.tensor([0, -1])}, "logps must be a floating tensor"),
        ({"logps": [-1.0]}, "logps must be a floating tensor"),
    ],
)
def test_probability_weights_name_the_bad_argument(arguments, message):
    given = {"logps": torch.tensor([-1.0]), "regulation": "sigmoid"} | arguments
    with pytest.raises(ValueError, match=message):
        probability_weights(given.pop("logps"), **given)
