"""v of every member against plain fp64 loops, and what its docstring promises."""

import math
import os

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_lambda.weights import TOKEN_WEIGHTS, token_weights

CASES = [(name, options, ()) for name in TOKEN_WEIGHTS for options in ({}, {"alpha": 0.7}, {"alpha": 1.0})]
for values in ((4.0, 0.5, 0.6, 1.2), (20.0, 0.1, 0.01, 3.0), (9.0, 1.0, 0.9, 0.9)):
    sigmoid = dict(zip(("slope", "center", "min", "max"), values, strict=True))
    CASES.append(("tr_grpo", sigmoid | {"alpha": 1.5}, values))


@pytest.mark.parametrize(("name", "options", "values"), CASES)
def test_token_weights_equal_plain_loops(name, options, values):
    logps = torch.linspace(-12, 0, 97, dtype=torch.float64).view(1, -1)
    expected = [[reference.probability_weight(x, name, options.get("alpha"), *values) for x in logps[0].tolist()]]
    weights = token_weights(logps, token_weight=name, **options)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    single = token_weights(logps.float(), token_weight=name, **options)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, weights.float(), rtol=1e-6, atol=1e-6)


def test_reading_of_the_papers_constants():
    """v = 1 up to π = 0.25 and 1.4 from π = 0.344: with the formula taken literally it would be 1.0 everywhere."""
    probs = torch.tensor([0.001, 0.2, 0.25, 0.3, 0.343, 0.345, 0.9, 1.0])
    weights = token_weights(probs.log(), token_weight="tr_grpo")
    assert TOKEN_WEIGHTS["tr_grpo"]() == TOKEN_WEIGHTS["tr_grpo"](alpha=2.0, slope=9.0, center=0.25, min=1.0, max=1.4)
    assert weights[:2].tolist() == [1.0, 1.0] and weights[2].item() == pytest.approx(1.0, abs=1e-6)
    assert 1.0 < weights[3].item() < weights[4].item() < 1.4
    assert weights[5:].tolist() == pytest.approx([1.4, 1.4, 1.4])


@settings(max_examples=int(os.environ.get("TRL_LAMBDA_EXAMPLES", "300")), deadline=None)
@given(
    st.lists(st.floats(max_value=0.0, allow_nan=False), min_size=1, max_size=40),
    st.sampled_from(list(TOKEN_WEIGHTS)),
    st.floats(1e-3, 1.0),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_any_log_probabilities_have_detached_rising_positive_weights(logps, name, alpha, dtype):
    logps = torch.tensor(logps, dtype=torch.float64).clamp(min=-3e4).to(dtype).requires_grad_()
    weights = token_weights(logps, token_weight=name, alpha=alpha)
    assert not weights.requires_grad and weights.shape == logps.shape
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert weights.isfinite().all() and (weights * 1e-6 > 0).all()
    assert (weights[logps.detach().argsort()].diff() >= 0).all()
    assert token_weights(logps.view(1, -1, 1), token_weight=name).shape == (1, len(logps), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_weight": "tanh"}, "token_weight='tanh' is unknown; accepted: tr_grpo, ar"),
        ({"alpha": 0.0}, r"TRGRPO\(alpha=0.0, .*\) needs finite alpha, slope > 0"),
        ({"token_weight": "ar", "alpha": 1.5}, r"AR\(alpha=1.5\) needs alpha in \[0, 1\]"),
        ({"slope": -1.0}, "slope=-1.0.* needs finite alpha, slope > 0"),
        ({"slope": math.inf}, "slope=inf.* needs finite alpha, slope > 0"),
        ({"center": 1.2}, r"center=1.2.* needs .* center in \[0, 1\]"),
        ({"min": 0.0}, "min=0.0.* needs .* 0 < min <= max"),
        ({"min": 1.5}, "min=1.5.* needs .* 0 < min <= max"),
        ({"max": math.inf}, "max=inf.* needs"),
        ({"logps": torch.tensor([0.4, 0.9])}, "logps must be a floating tensor of natural-log probabilities"),
        ({"logps": torch.tensor([0, -1])}, "logps must be a floating tensor .* got a tensor .* torch.int64"),
        ({"logps": [-1.0]}, "logps must be a floating tensor .* got list"),
    ],
)
def test_token_weights_name_the_bad_argument(arguments, message):
    given = {"logps": torch.tensor([-1.0]), "token_weight": "tr_grpo"} | arguments
    with pytest.raises(ValueError, match=message):
        token_weights(given.pop("logps"), **given)
