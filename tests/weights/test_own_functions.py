"""Weights of the user's own: how they are called, what they may return, what is refused, and a new member."""

import functools
from dataclasses import dataclass, field

import pytest
import reference
import torch
import user_weights
from harness import Batch, config, train

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer, LengthWeight, TokenWeight, TRGRPOConfig, TRGRPOTrainer
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
    weight_from_name,
)


def rows_of(lengths, dim=(0, 1), **known) -> ResponseRows:
    lengths = torch.tensor(lengths, dtype=torch.float64)
    return ResponseRows(lengths, lengths.sum(), dim, **known)


# ---- How they are called ----


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
    linear = as_token_weight(functools.partial(user_weights.linear, alpha=0.2))
    logps = torch.linspace(-3, 0, 7).view(1, 7)
    expected = token_weights(logps, token_weight="ar", alpha=0.2)
    torch.testing.assert_close(weigh_tokens(linear, TokenRows(logps.exp())), expected)


@pytest.mark.parametrize("dim", [(0, 1), (1,)], ids=["batch", "prompt"])
def test_scope_prompt_calls_once_per_prompt(dim):
    seen, statistic = [], torch.arange(6.0, dtype=torch.float64).view(2, 3)

    def weight(lengths, rewards, step):
        seen.append((lengths.tolist(), rewards.tolist(), step))
        return lengths / lengths.mean()

    rows = rows_of([[2, 4, 6], [1, 1, 10]], dim, statistics={"rewards": statistic}, step=7)
    weights = weigh_responses(as_length_weight(weight), rows, None, dtype=torch.float64)
    if dim == (0, 1):
        assert seen == [([[2, 4, 6], [1, 1, 10]], [[0, 1, 2], [3, 4, 5]], 7)]
        assert weights.tolist() == [[0.5, 1, 1.5], [0.25, 0.25, 2.5]]
    else:
        assert seen == [([[2, 4, 6]], [[0, 1, 2]], 7), ([[1, 1, 10]], [[3, 4, 5]], 7)]
        plain = reference.per_prompt([[0.5, 1, 1.5], [0.25, 0.25, 2.5]], [[2, 4, 6], [1, 1, 10]])
        torch.testing.assert_close(weights, torch.tensor(plain, dtype=torch.float64))


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


def test_a_class_gets_the_rows_and_the_statistics_that_it_needs():
    """A class and a function of the same formula; what is not named in `needs` is an error, not silence."""

    def confident(mean_logp, mean_entropy, lam):
        return (lam * mean_logp + mean_entropy).exp()

    assert as_length_weight(user_weights.Confident()).needs == as_length_weight(confident).needs
    values = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    statistics = {"mean_logp": -values[0], "mean_entropy": values[1]}
    rows, lam = rows_of([[2, 4, 6], [1, 1, 10]], statistics=statistics), torch.tensor([0.7])
    own = weigh_responses(as_length_weight(user_weights.Confident()), rows, lam)
    assert torch.equal(own, weigh_responses(as_length_weight(confident), rows, lam)) and own.unique().numel() == 6
    with pytest.raises(ValueError, match="mean_logp is not known: name it in .* `needs`"):
        weigh_responses(user_weights.Confident(), rows_of([[2, 4]]), lam)


def test_what_it_writes_into_its_arguments_changes_nothing():
    lengths, advantages = [[3, 5, 8], [1, 2, 2]], torch.tensor([[1.0, -2.0, 1.0], [0.5, 0.5, -1.0]]).double()

    def f(lengths, advantages, rewards):
        weights = torch.exp(lengths / 10 + 0.1 * rewards)
        for argument in (lengths, advantages, rewards):
            argument.neg_()
        return weights

    rows = rows_of(lengths, advantages=advantages.clone(), statistics={"rewards": advantages.clone()})
    weights = weigh_responses(as_length_weight(f), rows, None, positive_weight=3.0, dtype=torch.float64)
    raw = torch.exp(torch.tensor(lengths) / 10 + 0.1 * advantages)
    expected = reference.favour_positive(raw.tolist(), lengths, advantages.tolist(), 3.0)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(rows.advantages, advantages) and torch.equal(rows.statistics["rewards"], advantages)
    tokens = {name: torch.rand(1, 4) for name in ("probs", "advantages", "entropies", "old_logps", "mask", "lengths")}
    before = {name: values.clone() for name, values in tokens.items()}
    names = ", ".join(tokens)
    writes = eval(f"lambda {names}: sum(x.mul_(-1) for x in ({names})) * 0 + 1")
    weigh_tokens(as_token_weight(writes), TokenRows(**tokens))
    assert all(torch.equal(tokens[name], before[name]) for name in tokens)


# ---- What they return ----


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
@pytest.mark.parametrize("scope", ["batch", "prompt"])
def test_what_a_length_weight_returns_is_checked(weight, message, scope):
    options = {"trainer_options": {"length_weight": weight}, "length_weight_scope": scope}
    with pytest.raises(ValueError, match=rf"^test_own_functions\.\S*(<lambda>|weight) {message}"):
        train(LambdaGRPOTrainer, LambdaGRPOConfig, **options)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda probs: probs[:, :1], "must return floating weights of shape"),
        (lambda probs: probs > 0.5, "must return floating weights of shape"),
        (lambda probs: probs * float("nan"), "must return finite weights >= 0, got nan"),
        (lambda probs: -probs, "must return finite weights >= 0, got -"),
    ],
)
def test_what_a_token_weight_returns_is_checked(weight, message):
    options = {"trainer_options": {"token_weight": weight}, "length_weight": None}
    with pytest.raises(ValueError, match=rf"^test_own_functions\.<lambda> {message}"):
        train(LambdaGRPOTrainer, LambdaGRPOConfig, **options)
    if "-" in message:  # 0 is allowed outside the clip, and inside it is not
        zero = {"trainer_options": {"token_weight": lambda probs: probs * 0}, "token_weight_inside_clip": True}
        with pytest.raises(ValueError, match="must return finite weights > 0, got 0.0"):
            train(TRGRPOTrainer, TRGRPOConfig, **zero)


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


# ---- By a dotted path ----


def test_a_path_in_the_config_is_a_function_an_object_or_a_class_with_its_kwargs():
    for path, kwargs, name, exponent in (
        ("user_weights.half", None, "user_weights.half", None),
        ("user_weights.square", None, "square", 2.0),
        ("user_weights.Square", {"exponent": 1.0}, "square", 1.0),
    ):
        f, _ = config(LambdaGRPOConfig, Batch(), length_weight=path, length_weight_kwargs=kwargs).make_weights()
        assert f.name == name and (exponent is None or f == user_weights.Square(exponent))
    args = config(
        LambdaGRPOConfig, Batch(), length_weight=None, token_weight="user_weights.linear",
        token_weight_kwargs={"alpha": 0.2},
    )  # fmt: skip
    v = args.make_weights()[1]
    logps = torch.linspace(-3, 0, 7).view(1, 7)
    expected = token_weights(logps, token_weight="ar", alpha=0.2)
    torch.testing.assert_close(weigh_tokens(v, TokenRows(logps.exp())), expected)
    assert v.name == "user_weights.linear(alpha=0.2)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length_weight": "nowhere.f"}, r"length_weight='nowhere.f' cannot be imported \(ModuleNotFoundError"),
        ({"length_weight": "user_weights.nothing"}, r"cannot be imported \(AttributeError"),
        ({"length_weight": "user_weights.misspelled"}, "user_weights.misspelled requires length. A weight is called"),
        (
            {"token_weight": "user_weights.power"},
            "user_weights.power requires lengths, lam. A weight is called by name",
        ),
        ({"length_weight": "root"}, "length_weight='root' is unknown; accepted: lambda_grpo, .*, a dotted path"),
        ({"length_weight_kwargs": {"scale": 1.0}}, "length_weight_kwargs has 'scale': 1.0; 'lambda_grpo' accepts"),
        ({"length_weight_kwargs": {"length_scale": "x"}}, "length_weight_kwargs has 'length_scale': 'x'"),
        ({"token_weight": "ar", "token_weight_kwargs": {"slope": 1.0}}, "token_weight_kwargs has 'slope': 1.0; 'ar'"),
    ],
)
def test_a_wrong_path_or_parameter_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        config(LambdaGRPOConfig, Batch(), **options)


class Nameless(LengthWeight):
    def __call__(self, rows, lam):
        return rows.lengths


class Impostor(Nameless):
    name = "power"


class TokenNameless(TokenWeight):
    def __call__(self, probs):
        return probs


class TokenImpostor(TokenWeight):
    name = "ar"

    def __call__(self, rows):
        return rows.probs


@pytest.mark.parametrize(
    ("make", "weight", "message"),
    [
        (as_length_weight, user_weights.misspelled, "user_weights.misspelled requires length. A weight is called by"),
        (as_length_weight, lambda lengths, other: lengths, "requires lengths, other. A weight is called by name"),
        (as_length_weight, lambda lengths, /: lengths, "<lambda> requires lengths. A weight is called by name"),
        (as_length_weight, lambda **known: known, "<lambda> requires nothing. A weight is called by name"),
        (as_length_weight, user_weights.Square, "a weight must be a function or an object with __call__, got <class"),
        (as_length_weight, 1.0, "a weight must be a function or an object with __call__, got 1.0"),
        (as_length_weight, torch.square, "square hides its arguments: wrap it in a Python function"),
        (as_length_weight, Nameless(), "Nameless needs a name of its own, got name='': set its class attribute"),
        (as_length_weight, Impostor(), "Impostor needs a name of its own, got name='power'"),
        (as_token_weight, user_weights.power, "user_weights.power requires lengths, lam. A weight is called by name"),
        (as_token_weight, lambda p=0.5: p, "<lambda> requires nothing. A weight is called by name with any of: probs"),
        (as_token_weight, user_weights.Linear, "a weight must be a function or an object with __call__, got <class"),
        (as_token_weight, "user_weights.linear", "a weight must be a function or an object with __call__, got 'user"),
        (as_token_weight, TokenNameless(), "TokenNameless needs a name of its own, got name='': set its class"),
        (as_token_weight, TokenImpostor(), "TokenImpostor needs a name of its own, got name='ar'"),
    ],
)
def test_what_cannot_be_called_by_name_is_refused(make, weight, message):
    with pytest.raises(ValueError, match=message):
        make(weight)


def test_options_of_what_it_replaces_are_refused():
    f, v = {"length_weight": user_weights.half}, {"token_weight": user_weights.linear}
    for weights, options, message in (
        (f, {"length_weight": "power"}, "length_weight='power' has no effect beside the trainer's own length_weight"),
        (f, {"lambda_init": 0.5}, "lambda_init=0.5 has no effect with length_weight='user_weights.half'"),
        (f, {"length_weight_kwargs": {"length_scale": 0.2}}, "length_weight_kwargs=.* has no effect beside"),
        (v, {"token_weight": "tr_grpo"}, "token_weight='tr_grpo' has no effect beside the trainer's own token_weight"),
        ({"length_weight": user_weights.power}, {"lambda_side": "signed"}, "lambda_side='signed' has no effect with"),
    ):
        with pytest.raises(ValueError, match=message):
            train(LambdaGRPOTrainer, LambdaGRPOConfig, trainer_options=weights, **options)


# ---- A new member: one class and one entry ----


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


def test_a_new_member_is_one_class_and_one_entry(monkeypatch, tmp_path):
    monkeypatch.setitem(LENGTH_WEIGHTS, "root", Root)
    monkeypatch.setitem(TOKEN_WEIGHTS, "squared", Squared)
    options = {"length_weight": "root", "length_weight_kwargs": {"rate": 2.0}, "token_weight": "squared"}
    own = {"lambda_init": 0.5, "output_dir": str(tmp_path)}
    run = train(LambdaGRPOTrainer, LambdaGRPOConfig, **options, **own)
    assert run.lambda_grads[0] != 0 and run.trainer.lambda_value != 0.5
    log, lengths = run.logs[0], torch.tensor(Batch().lengths).double()
    f = (lengths / lengths.mean()) ** 0.5
    assert log["length_weight/min"] == pytest.approx(f.min().item(), rel=1e-5)
    assert log["length_weight/max"] == pytest.approx(f.max().item(), rel=1e-5)
    assert 1 < log["token_weight/mean"] < log["token_weight/max"] <= 4
    run.trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "(length/μ)^(qλ/2)" in card and "| q" in card and "α·π² + 1" in card
    for wrong, message in (
        ({"rate": 6.0}, "rate=6.0 is too large"),
        ({"scale": 1.0}, "'root' accepts numbers for: rate"),
    ):
        with pytest.raises(ValueError, match=message):
            config(LambdaGRPOConfig, Batch(), **options | {"length_weight_kwargs": wrong})
    assert weight_from_name("root", None, {}, LENGTH_WEIGHTS, "length_weight") == Root()
