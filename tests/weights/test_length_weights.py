"""f of every member against plain fp64 loops, and what the docstrings promise."""

import itertools
import math
import os
import random

import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_lambda.weights import LENGTH_WEIGHTS, SIDES, ResponseRows, groups_with_signal, length_weights, weigh_responses
from trl_lambda.weights.rows import sides

LAMBDAS = (-20.0, -3.7, -1.0, 0.0, 0.5, 2.0, 12.0)
SIGNED = tuple(side for side in SIDES if side != "both")
WITH_LAMBDA = ("lambda_grpo", "power")
SCOPES = ("batch", "prompt")
NAMES = ("mean_logp", "min_logp")
# (member, side, features): every f there is.
MEMBERS = [(name, "both", ("length",)) for name in LENGTH_WEIGHTS]
MEMBERS += [(name, side, ("length",)) for name in WITH_LAMBDA for side in SIGNED]
MEMBERS += [("power", side, features) for side in SIGNED for features in (("length", *NAMES), NAMES)]
double = torch.float64


CASES = {
    "paper": [[120, 190, 260, 320, 400, 470, 530, 600]],
    "unequal": [[1, 32768, 7, 400], [3, 3, 3, 9000], [12, 5, 77, 1], [6, 4, 8, 2]],
    "empty rows": [[0, 5, 9, 0], [4, 0, 0, 0], [8, 2, 6, 3]],
    "an empty group": [[3, 5, 9, 4], [0, 0, 0, 0], [8, 2, 6, 3]],
    "equal": [[6, 6, 6], [1, 1, 1]],
    "one response": [[5], [9], [1]],
    "sixty-four": [random.Random(p).choices(range(1, 32769), k=64) for p in range(3)],
}


def rows_of(lengths, advantages, scope="batch", statistics=None) -> ResponseRows:
    lengths = torch.tensor(lengths, dtype=double)
    statistics = {name: torch.tensor(values, dtype=double) for name, values in (statistics or {}).items()}
    dim, advantages = (1,) if scope == "prompt" else (0, 1), torch.tensor(advantages, dtype=double)
    return ResponseRows(lengths, lengths.sum(), dim, advantages, statistics)


def member_of(name, side="both", features=("length",)):
    options = {"side": side, "features": features, "max_completion_length": 512}
    fields = LENGTH_WEIGHTS[name].__dataclass_fields__
    return LENGTH_WEIGHTS[name](**{key: value for key, value in options.items() if key in fields})


def expected(lengths, advantages, lam, name, side, features, statistics, scope, c, live):
    if live is not None:
        left = [p for p, is_live in enumerate(live) if is_live]
        rest = {key: [values[p] for p in left] for key, values in statistics.items()}
        some = [lengths[p] for p in left], [advantages[p] for p in left]
        weights = expected(*some, lam, name, side, features, rest, scope, c, None) if left else []
        return reference.without_tied(weights, lengths, live)
    if side == "both":
        weights = reference.length_weights(lengths, lam[0], name, scope, 1 / 9, 512, advantages)
    else:
        lam = lam if features[0] == "length" else [0.0, *lam]
        raw = [statistics[feature] for feature in features if feature != "length"]
        weights = reference.side_weights(lengths, advantages, lam, name, side, scope, raw)
    own_scope = "batch" if name in ("grpo", "dr_grpo") else scope
    return reference.favour_positive(weights, lengths, advantages, c, own_scope)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("name", "side", "features"), MEMBERS)
@pytest.mark.parametrize("case", CASES)
def test_every_member_equals_plain_loops(case, name, side, features, scope):
    lengths, rng = CASES[case], random.Random(case)
    member, prompts = member_of(name, side, features), len(lengths)
    advantages = [[rng.choice([-1.0, -0.5, 0.0, 2.0]) for _ in group] for group in lengths]
    statistics = {n: [[-3 * rng.random() for _ in group] for group in lengths] for n in NAMES}
    rows = rows_of(lengths, advantages, scope, statistics)
    raw = torch.stack([rows.statistic(n) for n in NAMES], dim=-1)
    for lam in LAMBDAS if member.has_lambda else [0.0]:
        lam = [lam, *(rng.uniform(-2, 2) for _ in features[1:])]
        tensor = torch.tensor(lam, dtype=double) if member.has_lambda else None
        some = [p % 2 == 0 for p in range(prompts)]
        for c, live in itertools.product((1.0, 3.0, 0.4), (None, some, [False] * prompts)):
            is_live = None if live is None else torch.tensor(live).unsqueeze(1)
            mine = weigh_responses(member, rows, tensor, positive_weight=c, live=is_live, dtype=double)
            theirs = expected(lengths, advantages, lam, name, side, features, statistics, scope, c, live)
            # exp(h^12) magnifies the rounding of h twelvefold times h^12.
            torch.testing.assert_close(mine, torch.tensor(theirs, dtype=double), rtol=1e-9, atol=1e-12)
            if live is None:  # the public function is the same, and float32 unless it is given float64
                given = {"length_weight": name, "scope": scope, "side": side, "positive_weight": c}
                given |= {"features": raw} if features != ("length",) else {}
                given |= {"advantages": rows.advantages, "max_completion_length": 512}
                assert torch.equal(length_weights(rows.lengths, tensor, **given), mine)
                single = length_weights(rows.lengths.long(), tensor if tensor is None else tensor.float(), **given)
                torch.testing.assert_close(single, mine.float(), rtol=1e-5, atol=1e-5)


def test_groups_of_equal_rewards_have_no_signal():
    nan = math.nan
    cases = {False: [[0.7, 0.7, 0.7], [0.1 + 0.2, 0.3, 0.3], [nan, 0.5, 0.5], [nan, nan, nan], [0.0, 0.0, 0.0]]}
    cases[True] = [[1.0, 0.0, 1.0], [nan, 0.5, 0.4], [-2.0, -2.0, -2.001], [1e-9, 0.0, 0.0], [1e6, 1e6, 1e6 + 2]]
    for signal, groups in cases.items():
        assert groups_with_signal(torch.tensor(groups, dtype=double)).squeeze(1).tolist() == [signal] * 5
        assert [reference.has_signal([None if math.isnan(r) else r for r in g]) for g in groups] == [signal] * 5


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("name", "side"), list(itertools.product(WITH_LAMBDA, SIDES)))
@pytest.mark.parametrize("case", CASES)
def test_lambda_0_is_dapo_bit_for_bit(case, name, side, scope):
    rng, lengths = random.Random(case), CASES[case]
    rows = rows_of(lengths, [[rng.choice([-1.0, 0.0, 1.0]) for _ in group] for group in lengths], scope)
    live = torch.tensor([p % 2 == 0 for p in range(len(lengths))]).unsqueeze(1)
    for dtype, c, is_live in itertools.product((torch.float32, double), (1.0, 2.5), (None, live)):
        options = {"positive_weight": c, "live": is_live, "dtype": dtype}
        zero = weigh_responses(member_of(name, side), rows, torch.zeros(1), **options)
        assert torch.equal(zero, weigh_responses(member_of("dapo"), rows, None, **options))


def test_known_weights_of_one_group_and_of_its_halves():
    """Lengths {100, 120, 400, 420} at λ = 2: a group cut in two weighs something else."""
    whole = length_weights(torch.tensor([[100, 120, 400, 420]]), 2.0, length_weight="lambda_grpo")
    halves = length_weights(torch.tensor([[100, 120], [400, 420]]), 2.0, length_weight="lambda_grpo")
    assert length_weights(torch.tensor([[5]]), 2.0, length_weight="lambda_grpo").tolist() == [[1.0]]
    torch.testing.assert_close(whole, torch.tensor([[0.77, 0.79, 1.20, 1.24]]), atol=5e-3, rtol=0)
    torch.testing.assert_close(halves, torch.tensor([[0.78, 1.22], [0.78, 1.22]]), atol=5e-3, rtol=0)


@pytest.mark.parametrize("rest", [0.0, 3e-8, -3e-4])
def test_rounding_has_no_sign(rest):
    """Of a reward that is its group's mean, and of equal rewards, also beside a response without one: exactly 0."""
    lengths = torch.tensor([[4, 9, 2, 7], [5, 1, 8, 3], [6, 2, 3, 4]])
    for name, options in (("balanced", {}), ("power", {"side": "positive"}), ("lambda_grpo", {"side": "signed"})):
        clean, noisy = (
            length_weights(
                lengths, 1.5, length_weight=name, positive_weight=3.0, **options,
                advantages=torch.tensor([[99.0, y, -99.0, y], [x] * 4, [x, x, 0.0, x]]),
            )
            for x, y in ((0.0, 0.0), (rest, min(rest, 3e-8, key=abs)))
        )  # fmt: skip
        assert torch.equal(clean, noisy)
    assert sides(torch.tensor([[99.0, -99.0], [0.1, -0.1]]), torch.ones(2, 2) > 0, "signed").abs().min() == 1


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("name", "side", "features"), [m for m in MEMBERS if m[0] in WITH_LAMBDA])
def test_gradient_in_lambda_is_that_of_finite_differences(name, side, features, scope):
    lengths, rng = CASES["empty rows"], random.Random(1)
    advantages = [[1.0, -2.0, 0.5, 1.0], [-1.0, 0.0, 2.0, -1.0], [0.3, -0.3, 0.0, 1.0]]
    statistics = {n: [[-rng.random() for _ in group] for group in lengths] for n in NAMES}
    rows, member = rows_of(lengths, advantages, scope, statistics), member_of(name, side, features)
    options = {"positive_weight": 2.0, "live": torch.tensor([[True], [False], [True]]), "dtype": double}
    for value in (-0.9, 0.0, 0.6):
        lam = torch.full((len(features),), value, dtype=double, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: weigh_responses(member, rows, x, **options), lam)


@st.composite
def batches(draw):
    prompts, group = draw(st.integers(1, 4)), draw(st.integers(1, 64))
    lengths = st.lists(st.integers(0, 131072), min_size=group, max_size=group)
    magnitude = st.floats(2**-10, 50, width=32)  # TRL's advantages are of the order of 1
    signed = st.one_of(st.just(0.0), magnitude, magnitude.map(lambda x: -x))
    advantages = st.lists(signed, min_size=group, max_size=group)
    return [draw(lengths) for _ in range(prompts)], [draw(advantages) for _ in range(prompts)]


@settings(
    max_examples=int(os.environ.get("TRL_LAMBDA_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    batches(),
    st.floats(-5000, 5000, width=32),
    st.sampled_from(["lambda_grpo", "power", "balanced"]),
    st.sampled_from(SIDES),
    st.sampled_from(SCOPES),
    st.sampled_from([1.0, 0.01, 30.0]),
    st.sampled_from([torch.int32, torch.int64, torch.float32]),
)
def test_any_batch_has_finite_weights_and_keeps_the_sign_of_its_advantages(
    batch, lam, name, side, scope, positive_weight, dtype
):
    lengths, advantages = torch.tensor(batch[0], dtype=dtype), torch.tensor(batch[1])
    lam = torch.tensor([lam], requires_grad=True)
    options = {} if name == "balanced" else {"side": side}
    options |= {"length_weight": name, "scope": scope, "positive_weight": positive_weight}
    weights = length_weights(lengths, lam, advantages=advantages, **options)
    assert weights.isfinite().all() and torch.equal(weights > 0, lengths > 0)
    weighted = 1e-6 * weights * advantages
    assert torch.equal(weighted.sign(), advantages.sign() * (lengths > 0))
    if weights.requires_grad:
        (weights * torch.linspace(-3, 3, lengths.numel()).view_as(weights)).sum().backward()
        assert lam.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length_weight": "mean"}, "length_weight='mean' is unknown; accepted: lambda_grpo, power, grpo"),
        ({"length_weight": None}, "length_weight=None is unknown"),
        ({"scope": "token"}, "scope='token' is unknown; accepted: batch, prompt"),
        ({"side": "left"}, "side='left' is unknown; accepted: both, signed"),
        ({"lengths": torch.tensor([1, 2])}, r"lengths must be a non-empty real tensor of shape \(P, G\)"),
        ({"lengths": [[1, 2]]}, "lengths must be a non-empty real tensor .*got list"),
        ({"lengths": torch.tensor([[True, False]])}, "lengths must be .*got a tensor .* dtype torch.bool"),
        ({"lengths": torch.tensor([[3, -1]])}, "lengths must be finite and >= 0"),
        ({"lengths": torch.tensor([[3.0, math.nan]])}, "lengths must be finite and >= 0"),
        ({"lam": None}, "lam is required by length_weight='lambda_grpo'"),
        ({"lam": torch.tensor([math.nan])}, r"lam=\[nan\] must be finite"),
        ({"lam": torch.zeros(2)}, "lam must have 1 real elements, got a tensor of shape"),
        ({"length_scale": 0.0}, "length_scale=0 must be > 0"),
        ({"length_scale": 1.0}, "length_scale=1 .* for groups of 2 responses, below .* = 1"),
        ({"lengths": torch.ones(1, 83)}, "length_scale=0.111111 .* for groups of 83 responses"),
        ({"length_weight": "dr_grpo"}, "length_weight='dr_grpo' needs max_completion_length, got None"),
        ({"positive_weight": 0.0}, "positive_weight=0.0 must be finite and > 0"),
        ({"positive_weight": math.inf}, "positive_weight=inf must be finite and > 0"),
        ({"side": "positive"}, "This weight needs one advantage per response"),
        ({"positive_weight": 2.0}, "This weight needs one advantage per response"),
        ({"length_weight": "balanced"}, "This weight needs one advantage per response"),
        ({"advantages": torch.ones(1, 3)}, "advantages must have the shape of lengths, got .*1, 3"),
        ({"features": torch.ones(1, 2, 1)}, "features have no effect with length_weight='lambda_grpo' and side"),
        ({"length_weight": "power", "features": torch.ones(1, 2, 1)}, "features have no effect .* side='both'"),
        ({"length_weight": "power", "side": "signed", "features": torch.ones(1, 3, 1)},
         r"features must be a tensor of shape \(P, G, K\) beside lengths, got .*1, 3, 1"),
    ],
)  # fmt: skip
def test_length_weights_name_the_bad_argument(arguments, message):
    given = {"lengths": torch.tensor([[1, 2]]), "lam": 0.5, "length_weight": "lambda_grpo"} | arguments
    with pytest.raises(ValueError, match=message):
        length_weights(given.pop("lengths"), given.pop("lam"), **given)
