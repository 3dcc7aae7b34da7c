"""What a user's function is given inside a real training, and what its weights do to the loss: plain loops in fp64."""

import pytest
import reference
import torch
import user_weights
from harness import Batch, assert_same_bits, build, build_model, config, prompt, train, watch
from launch import launch
from trl import GRPOConfig, GRPOTrainer
from worker import run_job

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

LENGTHS = [[3, 1, 12, 6], [2, 4, 9, 5], [7, 8, 1, 11]]  # no length twice in a group: a row is found by it
# A row without own tokens, one with a tool's tokens in between, and all others.
TOOLS = [[0] * 7 if row == 8 else [int(t % 3 != 1) for t in range(n)] for row, n in enumerate(sum(LENGTHS, []))]
OPTIONS = {"lambda_init": 0.5, "learning_rate": 0.5, "max_steps": 4, "lambda_learning_rate": 0.5}
CUTS = {
    "on policy": {},
    "four micro-batches": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    "two iterations": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "num_iterations": 2},
}
double = torch.float64


class Recorded:
    """A training with two functions that note what they are given, and the plain loops' expectation of it."""

    def __init__(self, env_mask=None, **options):
        self.batch = Batch(lengths=LENGTHS, env_mask=env_mask)
        self.own = [[1] * n for n in sum(LENGTHS, [])] if env_mask is None else env_mask
        self.given_f, self.given_v, self.steps, self.sampled = [], [], {}, None
        self.model = build_model(double=True)
        recorded, off_policy = self, options.get("num_iterations", 1) > 1

        class Watched(LambdaGRPOTrainer):
            def _generate_and_score_completions(self, inputs):
                recorded.sampled = recorded.scores()
                return super()._generate_and_score_completions(inputs)

            def compute_loss(self, model, inputs, *args, **kwargs):
                del recorded.given_f[:], recorded.given_v[:]
                loss = super().compute_loss(model, inputs, *args, **kwargs)
                recorded.check(inputs, self.state.global_step, self.lambda_value, off_policy)
                return loss

        args = config(LambdaGRPOConfig, self.batch, **OPTIONS | options)
        weights = {"length_weight": self.f, "token_weight": self.v}
        self.scope = args.length_weight_scope
        self.trainer = build(Watched, args, self.batch, self.model, **weights)
        self.run = watch(self.trainer)
        self.losses, self.grads, self.lambda_grads = [], [], []
        self.trainer.train()

    def f(self, lengths, advantages, lam, mean_logp, min_logp, mean_entropy, rewards, step):
        self.given_f.append({name: value for name, value in locals().items() if name != "self"})
        return user_weights.every_response_argument(**self.given_f[-1])

    def v(self, probs, advantages, entropies, old_logps, mask, lengths, step):
        self.given_v.append({name: value for name, value in locals().items() if name != "self"})
        return user_weights.every_token_argument(**self.given_v[-1])

    def scores(self):
        """(log-probabilities, entropies) of every row under the model as it is now."""
        self.ids = [self.trainer.processing_class(prompt(p))["input_ids"] for p in range(3)]
        rows = enumerate(self.batch.completions)
        return [reference.score(self.model, self.ids[row // 4], tokens) for row, tokens in rows]

    def responses(self, step, lam):
        """The arguments of f as tensors (3, 4), rows without own tokens as their group's mean length."""
        known = [reference.response_statistics(*s, own) for s, own in zip(self.sampled, self.own, strict=True)]
        lengths = [sum(own) for own in self.own]
        for row, n in enumerate(lengths):
            group = [m for m in lengths[row // 4 * 4 : row // 4 * 4 + 4] if m]
            lengths[row] = n or sum(group) / len(group)
        rewards = torch.tensor(self.batch.rewards, dtype=double).view(3, 4)
        table = {name: [statistics[name] for statistics in known] for name in known[0]} | {"lengths": lengths}
        table = {name: torch.tensor(values, dtype=double).view(3, 4) for name, values in table.items()}
        advantages = torch.tensor(reference.group_advantages(rewards.tolist()), dtype=double)
        return table | {"rewards": rewards, "advantages": advantages, "lam": lam, "step": step}

    def check(self, inputs, step, lam, off_policy):
        """Every argument of both functions at one loss; then what loss and gradients are to be, once a step."""
        plain, now = self.responses(step, torch.tensor(lam, dtype=double)), self.scores()
        parts = [slice(None)] if self.scope == "batch" else [slice(p, p + 1) for p in range(3)]
        assert len(self.given_f) == len(parts) and len(self.given_v) == 1
        for part, given in zip(parts, self.given_f, strict=True):
            assert given["step"] == step and given["lam"].shape == ()
            for name, value in given.items():
                expected = plain[name] if name in ("step", "lam") else plain[name][part]
                # TRL makes advantages from rewards in float32.
                torch.testing.assert_close(value, expected, rtol=0, atol=2e-6 if name == "advantages" else 1e-9,
                                           check_dtype=name not in ("step", "lam"))  # fmt: skip
        given = self.given_v[0]
        assert given["step"] == step and (given["old_logps"] is not None) == off_policy
        for i, mask in enumerate(inputs["completion_mask"].bool()):
            tokens = inputs["completion_ids"][i][mask].tolist()
            prompt_ids = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist()
            p = self.ids.index(prompt_ids)
            row, n = 4 * p + LENGTHS[p].index(len(tokens)), len(tokens)
            close = {"rtol": 0, "atol": 1e-9}
            torch.testing.assert_close(given["probs"][i, :n], torch.tensor(now[row][0], dtype=double).exp(), **close)
            torch.testing.assert_close(given["entropies"][i, :n], torch.tensor(now[row][1], dtype=double), **close)
            if off_policy:
                sampled = torch.tensor(self.sampled[row][0], dtype=double)
                torch.testing.assert_close(given["old_logps"][i, :n], sampled, **close)
            assert given["mask"][i].tolist() == self.own[row] + [0] * (mask.numel() - n)
            assert given["lengths"][i].tolist() == [sum(self.own[row])]
            assert given["advantages"][i].tolist() == pytest.approx([plain["advantages"][p, row % 4].item()], abs=2e-6)
        if step not in self.steps:
            self.steps[step] = True
            self.expect(now, off_policy, step, lam)

    def expect(self, now, off_policy, step, lam):
        """Loss, its gradient and dL/dλ of a step by plain loops."""
        lam = torch.tensor(lam, dtype=double, requires_grad=True)
        plain = self.responses(step, lam)
        # TRL's own float32 advantages, in double: the loss is held to 1e-9.
        plain["advantages"] = self.trainer._scoring.batches["train"].advantages
        parts = [slice(None)] if self.scope == "batch" else [slice(p, p + 1) for p in range(3)]
        cut = [{n: x[part] if torch.is_tensor(x) and x.dim() else x for n, x in plain.items()} for part in parts]
        f = torch.cat([user_weights.every_response_argument(**values) for values in cut])
        own = torch.tensor([sum(mask) for mask in self.own], dtype=double).view(3, 4)
        if self.scope == "prompt":
            f = f * (own.sum() / 3) / own.sum(dim=1, keepdim=True)
        advantages, v = plain["advantages"].flatten().tolist(), []
        for row, (logps, entropies) in enumerate(now):
            tensors = (logps, entropies, self.sampled[row][0], self.own[row])
            probs, entropies, old, mask = (torch.tensor(values, dtype=double) for values in tensors)
            values = (
                probs.exp(),
                torch.tensor(advantages[row], dtype=double),
                entropies,
                old if off_policy else None,
                mask,
            )
            v.append(user_weights.every_token_argument(*values, mask.sum(), step).tolist())
        prompts = [self.ids[row // 4] for row in range(12)]
        old = [logps for logps, _ in (self.sampled if off_policy else now)]
        loss = reference.policy_loss(
            self.model, prompts, self.batch.completions, old, advantages, f.flatten(),
            loss_type="dapo", own=self.own, v=v,
        )  # fmt: skip
        named = dict(self.model.named_parameters())
        grads = torch.autograd.grad(loss, [*named.values(), lam])
        self.zeros = sum(weight == 0 for row in v for weight in row)
        self.losses.append(loss.item())
        self.grads.append(dict(zip(named, grads, strict=False)))
        self.lambda_grads.append(grads[-1].item())


@pytest.mark.parametrize("scope", ["batch", "prompt"])
@pytest.mark.parametrize("own", [None, TOOLS], ids=["all tokens", "tools"])
@pytest.mark.parametrize("cut", CUTS)
def test_every_argument_and_what_it_does_equal_plain_loops(cut, own, scope):
    recorded = Recorded(own, length_weight_scope=scope, **CUTS[cut])
    run, micro_batches = recorded.run, CUTS[cut].get("gradient_accumulation_steps", 1)
    assert list(recorded.steps) == [0, 1, 2, 3] and recorded.zeros > 2 and len(set(run.lambdas)) == 4
    losses = [sum(run.losses[i : i + micro_batches]) for i in range(0, 4 * micro_batches, micro_batches)]
    assert losses == pytest.approx(recorded.losses, rel=1e-9, abs=1e-9)
    assert run.lambda_grads == pytest.approx(recorded.lambda_grads, rel=1e-9, abs=1e-9)
    for mine, theirs in zip(run.grads, recorded.grads, strict=True):
        scale = max(grad.abs().max().item() for grad in theirs.values())
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-9 * scale)


def test_two_processes_equal_one(tmp_path):
    weights = {
        f"{x}_weight": f"user_weights.every_{y}_argument" for x, y in (("length", "response"), ("token", "token"))
    }
    job = {"trainer": "lambda", "batch": {"env_mask": TOOLS, "lengths": LENGTHS}, "build": {"double": True}} | weights
    two, one = (
        job
        | {
            "options": OPTIONS
            | {"num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": n}
        }
        for n in (3, 6)
    )
    alone, (ranks,) = run_job(one), launch([two], tmp_path, 2)
    assert ranks[0]["lambdas"] == ranks[1]["lambdas"] and len(set(alone["lambdas"])) == 4
    for rank in ranks:
        assert rank["lambdas"] == pytest.approx(alone["lambdas"], rel=1e-9)
        for mine, theirs in zip(rank["grads"], alone["grads"], strict=True):
            for name in theirs:
                torch.testing.assert_close(mine[name], theirs[name], rtol=1e-9, atol=1e-9)


TIED = [True, False, True]
PLAIN = reference.length_weights
IN_THE_LOSS = {  # options -> f, from lengths and advantages of the three groups, the second of them of equal rewards
    **{
        f"{name}, {side}": (
            {"length_weight": name, "lambda_side": side, "lambda_init": 0.75, "lambda_learnable": False},
            lambda n, a, name=name, side=side: reference.side_weights(n, a, [0.75], name, side),
        )
        for name in ("lambda_grpo", "power")
        for side in ("signed", "positive", "negative")
    },
    "balanced": ({"length_weight": "balanced"}, reference.balanced_weights),
    "positive weight": (
        {"length_weight": "grpo", "positive_weight": 2.5},
        lambda n, a: reference.favour_positive(PLAIN(n, None, "grpo"), n, a, 2.5),
    ),
    "positive weight on TRL's own": (
        {"length_weight": None, "loss_type": "grpo", "positive_weight": 2.5},
        lambda n, a: reference.favour_positive(PLAIN(n, None, "grpo"), n, a, 2.5),
    ),
    **{
        f"{name} without tied groups, {scope}": (
            {"length_weight": name, "length_weight_scope": scope, "drop_tied_groups": True},
            lambda n, a, name=name, scope=scope: reference.without_tied(
                PLAIN([group for group, live in zip(n, TIED, strict=True) if live], None, name, scope), n, TIED
            ),
        )
        for name, scope in (("dapo", "batch"), ("dapo", "prompt"), ("grpo", "batch"))
    },
}


@pytest.mark.parametrize("name", IN_THE_LOSS)
def test_every_f_in_the_loss_equals_plain_loops(name):
    """Loss and gradient on policy, TRL's PPO clip; rewards of 0.7 leave advantages of 6e-4 in the second group."""
    options, f = IN_THE_LOSS[name]
    batch, model = Batch(tied=[1]), build_model(double=True)
    run = train(LambdaGRPOTrainer, LambdaGRPOConfig, batch, model=model, token_weight="tr_grpo", **options)
    a = run.trainer._scoring.batches["train"].advantages
    clean = torch.where(torch.tensor(TIED).unsqueeze(1), a, 0.0)  # rounding has no sign
    weights = sum(f(batch.lengths, clean.tolist()), [])
    ids = [run.trainer.processing_class(prompt(row // 4))["input_ids"] for row in range(12)]
    old = [reference.score(model, *row)[0] for row in zip(ids, batch.completions, strict=True)]
    loss = reference.policy_loss(
        model, ids, batch.completions, old, a.flatten().tolist(), weights, loss_type="dapo", regulation="tr_grpo"
    )
    assert run.losses == [pytest.approx(loss.item(), rel=1e-9, abs=1e-12)]
    for (key, mine), theirs in zip(run.grads[0].items(), torch.autograd.grad(loss, model.parameters()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, msg=key)


# ---- A weight of 0, and weights that write into their arguments ----


def test_0_everywhere_is_a_loss_of_0_and_leaves_the_entropy_bonus():
    zero = {"token_weight": lambda probs: probs * 0}
    run = train(LambdaGRPOTrainer, LambdaGRPOConfig, trainer_options=zero, max_steps=2, learning_rate=0.1)
    assert run.losses == [0.0, 0.0] and run.lambda_grads == [0.0, 0.0]
    assert all(not grad.any() for grads in run.grads for grad in grads.values()) and run.grads[0]
    bonus = {"entropy_coef": 0.05, "model": build_model(double=True)}
    mine = train(LambdaGRPOTrainer, LambdaGRPOConfig, trainer_options=zero, **bonus)
    batch = Batch(tied=[0, 1, 2])
    batch.rewards = [0.5] * 12  # A = 0
    theirs = train(GRPOTrainer, GRPOConfig, batch, loss_type="dapo", **bonus | {"model": build_model(double=True)})
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-9) and abs(mine.losses[0]) > 1e-3
    for name, grad in theirs.grads[0].items():
        torch.testing.assert_close(mine.grads[0][name], grad, rtol=1e-9, atol=1e-9)


def writing(function):
    """The same function, which spoils its arguments afterwards."""

    def weight(lengths, advantages, lam, rewards):
        weights = function(lengths.clone(), lam)  # autograd keeps what it has used
        for argument in (lengths, advantages, rewards):
            argument.neg_()
        return weights

    return weight


def test_functions_that_write_into_their_arguments_train_the_same():
    def v(probs, advantages, entropies, old_logps, mask, lengths):
        weights = user_weights.linear(probs)
        for argument in (probs, advantages, entropies, old_logps, mask, lengths):
            argument.zero_()
        return weights

    options = {"max_steps": 4, "num_iterations": 2, "learning_rate": 0.1, "positive_weight": 3.0, "lambda_init": 0.3}
    runs = [
        train(LambdaGRPOTrainer, LambdaGRPOConfig, trainer_options={"length_weight": f, "token_weight": w}, **options)
        for f, w in ((user_weights.power, user_weights.linear), (writing(user_weights.power), v))
    ]
    assert_same_bits(*runs)
    assert runs[0].lambdas == runs[1].lambdas and len(set(runs[0].lambdas)) == 4


def test_a_class_that_asks_for_statistics_trains_as_the_function():
    def confident(lam, mean_logp, mean_entropy):
        return (lam * mean_logp + mean_entropy).exp()

    options = {"lambda_init": 0.5, "max_steps": 2}
    first, second = (
        train(LambdaGRPOTrainer, LambdaGRPOConfig, trainer_options={"length_weight": weight}, **options)
        for weight in (confident, user_weights.Confident())
    )
    assert_same_bits(first, second)
    assert first.lambda_grads == second.lambda_grads and first.lambda_grads[0] != 0


@pytest.mark.parametrize("scope", ["batch", "prompt"])
@pytest.mark.parametrize("truncated", [{0, 5}, {1, 4, 5, 6, 7}, set(range(12))])
def test_rows_without_tokens_never_make_the_gradient_of_lambda_nan(truncated, scope):
    options = {"mask_truncated_completions": True, "lambda_init": -1.5, "length_weight_scope": scope, "max_steps": 2}
    weight = {"trainer_options": {"length_weight": user_weights.power}}
    run = train(LambdaGRPOTrainer, LambdaGRPOConfig, Batch(truncated=truncated), **weight, **options)
    grads = torch.tensor(run.lambda_grads)
    assert grads.isfinite().all() and run.trainer._lambda.skipped == 0
    assert bool(grads.any()) == (len(truncated) < 12)
