"""Weights of the user's own: how they are called, what they may return, what is refused, and a new member."""

import functools
from dataclasses import dataclass, field

import pytest
import torch
import user_weights
from harness import Batch, config, train, train_ours

from trl_lambda import LambdaGRPOConfig, LengthWeight, TokenWeight, TRGRPOConfig, TRGRPOTrainer
from trl_lambda.weights import (
    LENGTH_WEIGHTS,
    TOKEN_WEIGHTS,
    ResponseRows,
    TokenRows,
    as_length_weight,
    as_token_weight,
    length_weights,
    token_weights,
    weigh_responses,
    weigh_tokens,
)


def rows_of(lengths, **known) -> ResponseRows:
    lengths = torch.tensor(lengths, dtype=torch.float64)
    return ResponseRows(lengths, lengths.sum(), (0, 1), **known)


def test_keyword_arguments_are_those_it_names_and_a_default_is_overwritten():
    seen = {}

    def weight(*, lengths, advantages=None, my_own=3.0, **rest):
        seen.update(lengths=lengths, advantages=advantages, my_own=my_own, **rest)
        return torch.ones_like(lengths)

    member = as_length_weight(weight)
    assert not member.has_lambda and member.needs == ()
    advantages = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    weigh_responses(member, rows_of([[3, 5]], advantages=advantages), None)
    assert seen.keys() == {"lengths", "advantages", "my_own"} and seen["my_own"] == 3.0
    assert seen["lengths"].tolist() == [[3, 5]] and torch.equal(seen["advantages"], advantages)


def test_a_partial_fixes_arguments_and_shows_them_in_its_name():
    fixed = as_length_weight(functools.partial(user_weights.power, lam=torch.tensor(-1.0)))
    assert not fixed.has_lambda and fixed.name == "user_weights.power(lam=tensor(-1.))"
    lengths = [[3, 50], [7, 20]]
    mine = weigh_responses(fixed, rows_of(lengths), None)
    torch.testing.assert_close(mine, length_weights(torch.tensor(lengths), length_weight="grpo"))


def test_rows_without_tokens_are_shown_as_the_mean_and_dropped():
    seen = []

    def weight(lengths):
        seen.append(lengths.tolist())
        return 1 / lengths

    member, third = as_length_weight(weight), 1 / 3
    weights = weigh_responses(member, rows_of([[2, 0, 6], [0, 0, 0], [0, 1, 3]]), None)
    # A group without any tokens is shown as the mean of all rows that have some.
    assert seen == [[[2, 4, 6], [3, 3, 3], [2, 1, 3]]]
    torch.testing.assert_close(weights, torch.tensor([[1 / 2, 0, 1 / 6], [0, 0, 0], [0, 1, third]]))
    assert torch.equal(weigh_responses(member, rows_of([[0, 0, 0]]), None), torch.zeros(1, 3))


def test_a_statistic_that_a_class_does_not_ask_for_is_an_error():
    with pytest.raises(ValueError, match="mean_logp is not known: name it in .* `needs`"):
        weigh_responses(user_weights.Confident(), rows_of([[2, 4]]), torch.tensor([0.7]))


def put(change):
    """A function that returns something else for its second row."""

    def weight(lengths):
        weights = torch.ones_like(lengths)
        weights[0, 1] = change
        return weights

    return weight


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda lengths: lengths[:, :1], "must return floating weights of shape .* got a tensor of shape"),
        (lambda lengths: lengths.sum(), "must return floating weights of shape"),
        (lambda lengths: lengths.long(), "must return floating weights of shape .* dtype torch.int64"),
        (lambda lengths: lengths.tolist(), "must return floating weights of shape .* got list"),
        (put(float("nan")), "must return finite weights > 0, got nan"),
        (put(float("inf")), "must return finite weights > 0, got inf"),
        (put(0.0), "must return finite weights > 0, got 0.0"),
        (put(-0.25), "must return finite weights > 0, got -0.25"),
        (lambda lengths, lam: lengths ** lam.item(), "names lam, and its weights have no gradient in it"),
    ],
)
def test_what_a_length_weight_returns_is_checked(weight, message):
    with pytest.raises(ValueError, match=rf"^test_own_functions\.\S*(<lambda>|weight) {message}"):
        train_ours(trainer_options={"length_weight": weight})


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda probs: probs[:, :1], "must return floating weights of shape"),
        (lambda probs: probs > 0.5, "must return floating weights of shape"),
        (lambda probs: probs * float("nan"), "must return finite weights >= 0, got nan"),
        (lambda probs: -probs, "must return finite weights >= 0, got -"),
        (lambda probs: probs * 0, "must return finite weights > 0, got 0.0"),  # inside the clip
    ],
)
def test_what_a_token_weight_returns_is_checked(weight, message):
    inside = {"token_weight_inside_clip": "> 0" in message}
    with pytest.raises(ValueError, match=rf"^test_own_functions\.<lambda> {message}"):
        train(TRGRPOTrainer, TRGRPOConfig, trainer_options={"token_weight": weight}, **inside)


def test_low_precision_is_taken_as_it_is():
    lengths = [[3, 50], [7, 20]]
    member = as_length_weight(lambda lengths: (lengths / lengths.mean()).half())
    assert torch.equal(weigh_responses(member, rows_of(lengths), None), (torch.tensor(lengths) / 20).half().float())
    logps = torch.tensor([[-3.0, -0.4, -0.1]])
    for dtype in (torch.float16, torch.bfloat16):
        weights = weigh_tokens(as_token_weight(lambda probs, d=dtype: probs.to(d)), TokenRows(logps.exp()))
        assert torch.equal(weights, logps.exp().to(dtype).float())


def test_a_fixed_lambda_needs_no_gradient_and_padding_or_a_diverged_policy_no_weight():
    weight, lam = as_length_weight(lambda lengths, lam: lengths ** lam.item()), torch.nn.Parameter(torch.ones(1))
    with torch.no_grad():
        weigh_responses(weight, rows_of([[1, 2]]), lam)
    weigh_responses(weight, rows_of([[1, 2]]), lam.detach())
    nan = float("nan")
    rows = TokenRows(torch.tensor([[0.5, nan, 0.5]]), mask=torch.tensor([[1, 1, 0]]))
    weights = weigh_tokens(as_token_weight(lambda probs, mask: probs / mask), rows)
    assert weights.tolist() == [[0.5, 1.0, 1.0]]  # the second is NaN in TRL's own loss


def test_a_path_in_the_config_is_a_function_an_object_or_a_class_with_its_kwargs():
    for path, kwargs, name, exponent in (
        ("user_weights.half", None, "user_weights.half", None),
        ("user_weights.square", None, "square", 2.0),
        ("user_weights.Square", {"exponent": 1.0}, "square", 1.0),
    ):
        f, _ = config(LambdaGRPOConfig, Batch(), length_weight=path, length_weight_kwargs=kwargs).make_weights()
        assert f.name == name and (exponent is None or f == user_weights.Square(exponent))
    options = {"token_weight": "user_weights.linear", "token_weight_kwargs": {"alpha": 0.2}}
    _, v = config(LambdaGRPOConfig, Batch(), **options).make_weights()
    logps = torch.linspace(-3, 0, 7).view(1, 7)
    expected = token_weights(logps, token_weight="ar", alpha=0.2)
    torch.testing.assert_close(weigh_tokens(v, TokenRows(logps.exp())), expected)
    assert v.name == "user_weights.linear(alpha=0.2)"


@dataclass(frozen=True)
class Root(LengthWeight):
    rate: float = field(default=1.0, metadata={"symbol": "q"})
    name, formula, source, has_lambda = "root", "(length/μ)^(qλ/2)", "a test", True

    def check(self, group_size):
        if self.rate > 5:
            raise ValueError(f"rate={self.rate} is too large for a root.")

    def __call__(self, rows, lam):
        return (rows.lengths.clamp(min=1) / rows.mean_length) ** (self.rate * lam / 2)


@dataclass(frozen=True)
class Squared(TokenWeight):
    alpha: float = field(default=3.0, metadata={"symbol": "α"})
    name, formula, source = "squared", "α·π² + 1", "a test"

    def __call__(self, rows):
        return self.alpha * rows.probs**2 + 1


@dataclass
class Capped(LengthWeight):  # of named arguments
    cap: float = 2.0
    name, formula, has_scope = "capped", "a ratio with a cap", False

    def check(self, group_size):
        if self.cap <= 0:
            raise ValueError(f"cap={self.cap} must be > 0.")

    def __call__(self, lengths):
        return (lengths / lengths.mean()).clamp(max=self.cap)


def test_an_object_of_named_arguments_keeps_what_its_class_says(tmp_path):
    with pytest.raises(ValueError, match="cap=-1 must be > 0"):
        train_ours(trainer_options={"length_weight": Capped(-1)})
    trainer = train_ours(trainer_options={"length_weight": Capped()}, output_dir=str(tmp_path)).trainer
    assert not trainer.length_weight.has_scope and as_length_weight(lambda lengths: lengths).has_scope
    assert trainer._settings()["length_weight_kwargs"] == {"cap": "2.0"}  # another cap is another weight
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| a ratio with a cap |" in card and "| `cap` | 2 |" in card


def named(weight_class, name):
    return type(weight_class.__name__, (weight_class,), {"name": name})()


def test_a_new_member_is_one_class_and_one_entry(monkeypatch, tmp_path):
    monkeypatch.setitem(LENGTH_WEIGHTS, "root", Root)
    monkeypatch.setitem(TOKEN_WEIGHTS, "squared", Squared)
    options = {"length_weight": "root", "length_weight_kwargs": {"rate": 2.0}, "token_weight": "squared"}
    run = train_ours(**options, lambda_init=0.5, output_dir=str(tmp_path))
    assert run.lambda_grads[0] != 0 and run.trainer.lambda_value != 0.5
    log, lengths = run.logs[0], torch.tensor(Batch().lengths).double()
    assert log["length_weight/max"] == pytest.approx((lengths.max() / lengths.mean()).sqrt().item(), rel=1e-5)
    assert 1 < log["token_weight/mean"] < log["token_weight/max"] <= 4
    run.trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "(length/μ)^(qλ/2)" in card and "| q" in card and "α·π² + 1" in card
    for wrong, message in (({"rate": 6.0}, "rate=6.0 is too l"), ({"scale": 1.0}, "'root' accepts numbers for: rate")):
        with pytest.raises(ValueError, match=message):
            config(LambdaGRPOConfig, Batch(), **options | {"length_weight_kwargs": wrong})


@pytest.mark.parametrize(
    ("make", "weight", "message"),
    [
        (as_length_weight, user_weights.misspelled, "user_weights.misspelled requires length. A weight is called by"),
        (as_length_weight, lambda lengths, other: lengths, "requires lengths, other. A weight is called by name"),
        (as_length_weight, lambda lengths, /: lengths, "<lambda> requires lengths. A weight is called by name"),
        (as_length_weight, lambda **known: known, "<lambda> requires nothing. A weight is called by name"),
        (as_length_weight, user_weights.Square, "a weight must be a function or an object with __call__, got <class"),
        (as_length_weight, torch.square, "square hides its arguments, .*: wrap it in a Python function"),
        (as_token_weight, functools.partial(user_weights.linear, kap=1), r"linear\(kap=1\) hides .* a fixed one"),
        (as_length_weight, named(Root, ""), "Root needs a name of its own, got name='': set its class attribute"),
        (as_length_weight, named(Root, "power"), "Root needs a name of its own, got name='power'"),
        (as_token_weight, user_weights.power, "user_weights.power requires lengths, lam. A weight is called by name"),
        (as_token_weight, lambda p=0.5: p, "<lambda> requires nothing. A weight is called by name with any of: probs"),
        (as_token_weight, "user_weights.linear", "a weight must be a function or an object with __call__, got 'user"),
        (as_token_weight, named(Squared, "ar"), "Squared needs a name of its own, got name='ar'"),
    ],
)
def test_what_cannot_be_called_by_name_is_refused(make, weight, message):
    with pytest.raises(ValueError, match=message):
        make(weight)
