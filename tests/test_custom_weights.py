"""`length_weight=` and `token_weight=`: a user's function does what the package's own member does, or is refused."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import user_weights
from launch import launch
from support import Batch, assert_same_bits, build, config, train
from test_refusals import refused
from worker import run_job

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer, LengthWeight, TokenWeight, TRGRPOConfig, TRGRPOTrainer
from trl_lambda.weights import as_length_weight, as_token_weight, length_weights, weigh_responses, weigh_tokens

OPTIONS = {
    "lambda_init": -0.4,
    "lambda_learning_rate": 0.5,
    "optim": "adamw_torch",
    "learning_rate": 5e-3,
    "max_steps": 10,
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 2,
}
OWN = {"length_weight": "user_weights.power", "token_weight": "user_weights.linear"}
BUILT_IN = {"aggregation": "power", "token_regulation": "linear", "regulation_alpha": 0.6}


def job(folder: Path, rest: dict | None = None, **options) -> dict:
    options = OPTIONS | {"output_dir": str(folder)} | options
    return {"trainer": "lambda", "noise": 0.2, "options": options} | (rest or {})


def assert_equal(mine: dict, theirs: dict) -> None:
    """Losses, dL/dλ, λ and the model's gradients of ten steps, to 1e-5."""
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    assert len(theirs["lambdas"]) == 10 and len(set(theirs["lambdas"])) == 10
    for part in ("losses", "lambda_grads", "lambdas"):
        close(torch.tensor(mine[part]), torch.tensor(theirs[part]))
    for a, b in zip(mine["grads"], theirs["grads"], strict=True):
        assert a.keys() == b.keys() and b
        for name in b:
            close(a[name], b[name])


# ---- Equal to the package's own ----


@pytest.mark.parametrize("scope", ["batch", "prompt"])
def test_a_users_power_is_the_packages_for_ten_steps(scope, tmp_path):
    own = run_job(job(tmp_path, OWN, aggregation_scope=scope))
    assert_equal(own, run_job(job(tmp_path, aggregation_scope=scope, **BUILT_IN)))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, list[dict]]:
    """Results of both ranks: of the package's own weights, of the user's, and of the user's killed and resumed."""
    folder = tmp_path_factory.mktemp("two")
    saving = {"per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 4}
    kill = {"event": "between two micro-batches", "step": 6, "marker": str(folder / "died"), "rank": 1}
    with pytest.raises(RuntimeError, match=r"Signal 9 \(SIGKILL\)"):  # says torchrun, and returns
        launch([job(folder / "killed", OWN | {"kill": kill}, **saving)], folder / "first", 2)
    assert (folder / "died").read_text() == kill["event"]
    jobs = {
        "built in": job(folder / "built_in", **saving, **BUILT_IN),
        "own": job(folder / "own", OWN, **saving),
        "resumed": job(folder / "killed", OWN | {"resume": True}, **saving),
    }
    return dict(zip(jobs, launch(list(jobs.values()), folder / "second", 2), strict=True))


def test_on_two_processes(two_processes):
    for own, built_in in zip(two_processes["own"], two_processes["built in"], strict=True):
        assert_equal(own, built_in)
    assert two_processes["own"][0]["lambdas"] == two_processes["own"][1]["lambdas"]


def test_killed_and_resumed_it_equals_the_uninterrupted_run(two_processes):
    for resumed, own in zip(two_processes["resumed"], two_processes["own"], strict=True):
        assert resumed["lambdas"] == own["lambdas"][4:]
        for part in ("model", "lambda_state"):
            assert own[part].keys() == resumed[part].keys() and own[part]
            assert all(torch.equal(resumed[part][name], value) for name, value in own[part].items())


@dataclass(frozen=True)
class Linear(TokenWeight):
    """The package's, as an object of the user's."""

    alpha: float = 0.6

    name = "my linear"

    def __call__(self, probs):
        return self.alpha * probs + (1 - self.alpha)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("weight", [user_weights.linear, Linear(), lambda **known: 0.6 * known["probs"] + (1 - 0.6)])
def test_a_users_linear_is_the_packages_to_the_bit(weight, inside):
    # The default of this trainer, the sigmoid, gives way as an option that is not set does.
    options = {"regulation_inside_clip": inside}
    own = train(TRGRPOTrainer, TRGRPOConfig, trainer_options={"token_weight": weight, "noise": 0.2}, **options)
    options |= {"token_regulation": "linear", "regulation_alpha": 0.6}
    assert_same_bits(own, train(TRGRPOTrainer, TRGRPOConfig, trainer_options={"noise": 0.2}, **options))


# ---- What a function is given ----


def test_a_function_sees_lengths_and_advantages_by_group():
    batch, seen = Batch(), []

    def weight(advantages, lengths):
        seen.append((lengths, advantages))
        return torch.ones_like(lengths)

    train(LambdaGRPOTrainer, LambdaGRPOConfig, batch, trainer_options={"length_weight": weight})
    lengths, advantages = seen[0]
    assert lengths.tolist() == batch.lengths
    rewards = torch.tensor(batch.rewards, dtype=torch.float64).view(3, 4)
    expected = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-4)


def test_keyword_arguments_get_lengths_and_advantages_and_no_lambda():
    seen = {}

    def weight(**known):
        seen.update(known)
        return torch.ones_like(known["lengths"])

    member = as_length_weight(weight)
    assert not member.has_lambda
    advantages = torch.tensor([[1.0, -1.0]])
    weigh_responses(member, torch.tensor([[3, 5]]), advantages=advantages)
    assert {name: value.tolist() for name, value in seen.items()} == {
        "lengths": [[3.0, 5.0]],
        "advantages": [[1.0, -1.0]],
    }
    assert as_length_weight(lambda lam, **known: lam * known["lengths"]).has_lambda


def test_what_a_partial_fixes_is_not_given_and_is_in_its_name():
    fixed = functools.partial(user_weights.power, lam=torch.tensor(-1.0))
    member = as_length_weight(fixed)
    assert not member.has_lambda
    assert member.name == "user_weights.power(lam=tensor(-1.))"
    lengths = torch.tensor([[3, 50], [7, 20]])
    torch.testing.assert_close(weigh_responses(member, lengths), length_weights(lengths, aggregation="grpo"))


def test_rows_without_tokens_are_shown_as_the_mean_and_dropped():
    seen = []

    def weight(lengths):
        seen.append(lengths)
        return 1 / lengths

    lengths = torch.tensor([[2, 0, 6], [0, 0, 0], [0, 1, 3]])
    weights = weigh_responses(as_length_weight(weight), lengths)
    # A group without any tokens is shown as the mean of all that have some.
    assert seen[0].tolist() == [[2, 4, 6], [3, 3, 3], [2, 1, 3]]
    torch.testing.assert_close(weights, torch.tensor([[1 / 2, 0, 1 / 6], [0, 0, 0], [0, 1, 1 / 3]]))
    nothing = weigh_responses(as_length_weight(weight), torch.zeros(2, 3))
    assert torch.equal(nothing, torch.zeros(2, 3))


@pytest.mark.parametrize("scope", ["batch", "prompt"])
@pytest.mark.parametrize("truncated", [{0, 5}, {1, 4, 5, 6, 7}, set(range(12))])
def test_rows_without_tokens_never_make_the_gradient_of_lambda_nan(truncated, scope):
    batch = Batch(truncated=truncated)
    options = {"mask_truncated_completions": True, "lambda_init": -1.5, "aggregation_scope": scope, "max_steps": 2}
    run = train(
        LambdaGRPOTrainer,
        LambdaGRPOConfig,
        batch,
        trainer_options={"length_weight": user_weights.power},
        **options,
    )
    grads = torch.tensor(run.lambda_grads)
    assert grads.isfinite().all() and run.trainer._lambda.skipped == 0
    assert (grads.abs().sum() > 0) == (len(truncated) < 12)


# ---- Its name ----


def test_its_name_is_in_arguments_card_and_file(tmp_path):
    batch = Batch()
    args = config(LambdaGRPOConfig, batch, output_dir=str(tmp_path), lambda_learning_rate=0.5)
    weights = {"length_weight": user_weights.power, "token_weight": user_weights.linear}
    trainer = build(LambdaGRPOTrainer, args, batch, **weights)
    trainer.train()
    trainer.save_model()
    assert (trainer.args.aggregation, trainer.args.token_regulation) == ("user_weights.power", "user_weights.linear")
    assert (args.aggregation, args.token_regulation) == ("lambda", None)  # the caller's own stay
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| length weight (`aggregation`) | user_weights.power (the user's) |" in card
    assert "| token weight (`token_regulation`) | user_weights.linear (the user's) |" in card
    assert f"| λ | {trainer.lambda_value:.4f} at step 1" in card
    saved = json.loads((tmp_path / "lambda.json").read_text())
    assert (saved["aggregation"], saved["token_weight"]) == ("user_weights.power", "user_weights.linear")
    assert saved["lambda"] == trainer.lambda_value != 0.0


@dataclass(frozen=True)
class Steep(LengthWeight):
    """What the card knows nothing of: a parameter without a symbol that is no number."""

    side: str = "long"
    power: float = 2.0

    name = "steep"

    def __call__(self, lengths):
        return lengths**self.power / (lengths**self.power).mean()


def test_an_object_without_formula_or_symbols_has_a_card(tmp_path):
    batch = Batch()
    weights = {"length_weight": Steep(), "token_weight": Linear()}
    trainer = build(LambdaGRPOTrainer, config(LambdaGRPOConfig, batch, output_dir=str(tmp_path)), batch, **weights)
    assert trainer.lambda_value is None
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| length weight (`aggregation`) | steep (the user's) |" in card
    assert "| side (`side`) | long |\n| power (`power`) | 2 |" in card
    assert "| its parameters | alpha = 0.6 |" in card


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Two steps with both functions."""
    folder = tmp_path_factory.mktemp("named")
    run_job(job(folder, OWN, max_steps=2, save_strategy="steps", save_steps=2))
    return folder / "checkpoint-2"


@pytest.mark.parametrize(
    ("rest", "options", "message"),
    [
        (OWN | {"length_weight": "user_weights.same_power"}, {}, "aggregation='user_weights.same_power', but {}"),
        (OWN | {"token_weight": "user_weights.same_linear"}, {}, "token_weight='user_weights.same_linear', but {}"),
        ({"length_weight": OWN["length_weight"]}, {}, "token_weight=None, but {}"),
        ({"token_weight": OWN["token_weight"]}, {"aggregation": "power"}, "aggregation='power', but {}"),
        (OWN | {"length_weight": "user_weights.half"}, {}, "aggregation='user_weights.half' has no λ, but {}"),
    ],
)
def test_resuming_with_another_raises(rest, options, message, checkpoint, tmp_path):
    lam = {"lambda_init": 0.0, "lambda_learning_rate": 0.1} if "half" in message else {}
    resumed = job(tmp_path, rest | {"resume": str(checkpoint), "is_refused": True}, **(options | lam), max_steps=4)
    assert run_job(resumed)["error"].startswith(message.format(checkpoint))


def test_without_a_lambda_too(tmp_path):
    plain = {"lambda_init": 0.0, "lambda_learning_rate": 0.1, "save_strategy": "steps", "save_steps": 2}
    first = run_job(job(tmp_path, {"length_weight": "user_weights.half"}, **plain, max_steps=4))
    assert set(first["lambdas"]) == {None}
    resume = {"resume": str(tmp_path / "checkpoint-2")}
    again = run_job(job(tmp_path, resume | {"length_weight": "user_weights.half"}, **plain, max_steps=4))
    assert all(torch.equal(again["model"][name], value) for name, value in first["model"].items())
    other = resume | {"length_weight": "user_weights.square", "is_refused": True}
    error = run_job(job(tmp_path, other, **plain, max_steps=4))["error"]
    assert "aggregation='square'" in error and "'user_weights.half'" in error


# ---- Refused before a model is loaded ----


class NamesLambda(LengthWeight):
    name = "names lambda"

    def __call__(self, lengths, lam):
        return lengths**lam


class SaysItHasLambda(LengthWeight):
    name = "says so"
    has_lambda = True

    def __call__(self, lengths):
        return lengths


class Nameless(LengthWeight):
    def __call__(self, lengths):
        return lengths


class Impostor(Nameless):
    name = "power"


class NamelessToken(TokenWeight):
    def __call__(self, probs):
        return probs


class TokenImpostor(NamelessToken):
    name = "linear"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"length_weight": user_weights.misspelled},
            "user_weights.misspelled requires 'length'; a weight is called by",
        ),
        ({"length_weight": lambda lengths, /: lengths}, "<lambda> requires 'lengths'; a weight is called by name"),
        ({"length_weight": user_weights.Square}, "length_weight=Square is a class: pass an object, Square()"),
        ({"length_weight": 1.0}, "a weight must be a function or an object with __call__, got float"),
        ({"length_weight": torch.square}, "square does not tell the names of its arguments"),
        ({"length_weight": NamesLambda()}, "NamesLambda names lam, and there is no λ: set its has_lambda = True"),
        ({"length_weight": SaysItHasLambda()}, "SaysItHasLambda does not name lam, and there is a λ"),
        ({"length_weight": Nameless()}, "Nameless has no name"),
        ({"length_weight": Impostor()}, "Impostor has the name 'power' of another member"),
        ({"token_weight": user_weights.power}, "user_weights.power requires 'lengths'; a weight is called by name"),
        ({"token_weight": lambda p=0.5: p}, "<lambda> must take probs"),
        ({"token_weight": Linear}, "token_weight=Linear is a class: pass an object, Linear()"),
        ({"token_weight": "user_weights.linear"}, "a weight must be a function or an object with __call__, got str"),
        ({"token_weight": NamelessToken()}, "NamelessToken has no name"),
        ({"token_weight": TokenImpostor()}, "TokenImpostor has the name 'linear' of another member"),
    ],
)
def test_refused(weights, message):
    refused(message, trainer_options=weights)


def test_options_of_what_it_replaces_are_refused():
    f, v = {"length_weight": user_weights.half}, {"token_weight": user_weights.linear}
    refused("aggregation='power' has no effect beside user_weights.half", trainer_options=f, aggregation="power")
    refused("lambda_init=0.5 has no effect with aggregation='user_weights.half'", trainer_options=f, lambda_init=0.5)
    refused("length_scale=0.2 has no effect", trainer_options=f, length_scale=0.2)
    refused("token_regulation='sigmoid' has no effect", trainer_options=v, token_regulation="sigmoid")
    refused("regulation_alpha=0.5 has no effect", trainer_options=v, regulation_alpha=0.5)


# ---- Refused at the loss ----


def wrong(change):
    """A function that returns something else for its second row."""

    def weight(lengths):
        weights = torch.ones_like(lengths)
        weights[0, 1] = change
        return weights

    return weight


@pytest.mark.parametrize("scope", ["batch", "prompt"])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda lengths: lengths[:, :1], "must return floating weights of shape .* got a tensor of shape"),
        (lambda lengths: lengths.sum(), "must return floating weights of shape"),
        (lambda lengths: lengths.long(), "must return floating weights of shape .* dtype torch.int64"),
        (lambda lengths: lengths.tolist(), "must return floating weights of shape .* got list"),
        (wrong(float("nan")), "must return finite weights > 0, got nan"),
        (wrong(float("inf")), "must return finite weights > 0, got inf"),
        (wrong(0.0), "must return finite weights > 0, got 0.0"),
        (wrong(-0.25), "must return finite weights > 0, got -0.25"),
        (lambda lengths, lam: lengths ** lam.item(), "names lam, and its weights have no gradient in it"),
    ],
)
def test_what_a_length_weight_returns_is_checked(weight, message, scope):
    with pytest.raises(ValueError, match=rf"^test_custom_weights\.\S*(<lambda>|weight) {message}"):
        train(LambdaGRPOTrainer, LambdaGRPOConfig, trainer_options={"length_weight": weight}, aggregation_scope=scope)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda probs: probs[:, :1], "must return floating weights of shape"),
        (lambda probs: probs * float("nan"), "must return finite weights > 0, got nan"),
        (lambda probs: probs * 0, "must return finite weights > 0, got 0.0"),
        (lambda probs: -probs, "must return finite weights > 0, got -"),
    ],
)
def test_what_a_token_weight_returns_is_checked(weight, message):
    with pytest.raises(ValueError, match=rf"^test_custom_weights\.<lambda> {message}"):
        train(LambdaGRPOTrainer, LambdaGRPOConfig, trainer_options={"token_weight": weight}, aggregation=None)


def test_a_lambda_that_is_fixed_or_only_read_needs_no_gradient():
    weight = as_length_weight(lambda lengths, lam: lengths ** lam.item())
    lam = torch.nn.Parameter(torch.tensor([1.0]))
    with torch.no_grad():
        weigh_responses(weight, torch.tensor([[1, 2]]), lam)
    weigh_responses(weight, torch.tensor([[1, 2]]), lam.detach())
    with pytest.raises(ValueError, match="names lam"):
        weigh_responses(weight, torch.tensor([[1, 2]]), lam)


def test_a_policy_that_has_diverged_is_not_the_functions_fault():
    logps = torch.tensor([[-1.0, float("nan")]])
    weights = weigh_tokens(as_token_weight(user_weights.linear), logps)
    assert weights.isnan().tolist() == [[False, True]]
