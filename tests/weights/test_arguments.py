"""What a user's function is given inside a real training, and what its weights do to the loss: plain loops in fp64."""

import harness
import pytest
import reference
import torch
import user_weights
from harness import Batch, assert_same_bits, build_model, largest_deviation, make, train_ours, watch
from launch import launch
from worker import run_job

from trl_lambda import LambdaGRPOTrainer

LENGTHS = [[3, 1, 12, 6], [2, 4, 9, 5], [7, 8, 1, 11]]
TOOLS = harness.tool_mask(LENGTHS)
OPTIONS = {"lambda_init": 0.5, "learning_rate": 0.5, "max_steps": 4, "lambda_learning_rate": 0.5}
CUTS = {
    "on policy": {},
    "four micro-batches": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    "two iterations": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "num_iterations": 2},
}
double = torch.float64


class Recorded:
    """A training with functions that each of their arguments moves, and what plain loops make of it."""

    def __init__(self, env_mask=None, **options):
        self.batch = Batch(lengths=LENGTHS, env_mask=env_mask)
        self.own = [[1] * n for n in sum(LENGTHS, [])] if env_mask is None else env_mask
        self.model, self.ids, self.steps = build_model(double=True), harness.prompt_ids(self.batch), []
        self.losses, self.grads, self.lambda_grads, self.zeros = [], [], [], 0
        self.off_policy = options.get("num_iterations", 1) > 1
        of_prompts = options["length_weight_scope"] == "prompt"
        self.parts = [slice(p, p + 1) for p in range(3)] if of_prompts else [slice(None)]
        recorded = self

        class Watched(LambdaGRPOTrainer):
            def _generate_and_score_completions(self, inputs):
                recorded.sampled = recorded.scores()
                return super()._generate_and_score_completions(inputs)

            def compute_loss(self, *args, **kwargs):
                loss = super().compute_loss(*args, **kwargs)
                if self.state.global_step not in recorded.steps:
                    recorded.expect(self.state.global_step, self.lambda_value)
                return loss

        weights = {"length_weight": user_weights.every_response_argument, "token_weight": self.v}
        self.run = watch(make(self.batch, self.model, trainer_class=Watched, arguments=weights, **OPTIONS | options))
        self.run.trainer.train()

    def v(self, probs, advantages, entropies, old_logps, mask, lengths, step):
        assert (old_logps is not None) == self.off_policy
        return user_weights.every_token_argument(probs, advantages, entropies, old_logps, mask, lengths, step)

    def scores(self):
        """(log-probabilities, entropies) of every row under the model as it is now."""
        return [reference.score(self.model, *row) for row in zip(self.ids, self.batch.completions, strict=True)]

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

    def expect(self, step, lam):
        self.steps.append(step)
        now, off_policy = self.scores(), self.off_policy
        lam = torch.tensor(lam, dtype=double, requires_grad=True)
        plain = self.responses(step, lam)
        # TRL makes them in float32, and the loss is held to 1e-9.
        trls = self.run.trainer._scoring.batches["train"].advantages
        torch.testing.assert_close(trls, plain["advantages"], rtol=0, atol=2e-6)
        plain["advantages"] = trls
        cut = [{n: x[part] if torch.is_tensor(x) and x.dim() else x for n, x in plain.items()} for part in self.parts]
        f = torch.cat([user_weights.every_response_argument(**values) for values in cut])
        own = torch.tensor([sum(mask) for mask in self.own], dtype=double).view(3, 4)
        if len(self.parts) > 1:
            f = f * (own.sum() / 3) / own.sum(dim=1, keepdim=True)
        advantages, v = plain["advantages"].flatten().tolist(), []
        for row, (logps, entropies) in enumerate(now):
            tensors = (logps, entropies, self.sampled[row][0], self.own[row])
            probs, entropies, old, mask = (torch.tensor(values, dtype=double) for values in tensors)
            values = probs.exp(), torch.tensor(advantages[row], dtype=double), entropies, old if off_policy else None
            v.append(user_weights.every_token_argument(*values, mask, mask.sum(), step).tolist())
        old = [logps for logps, _ in (self.sampled if off_policy else now)]
        rows = self.ids, self.batch.completions, old, advantages, f.flatten()
        loss = reference.policy_loss(self.model, *rows, loss_type="dapo", own=self.own, v=v)
        named = dict(self.model.named_parameters())
        grads = torch.autograd.grad(loss, [*named.values(), lam])
        self.zeros += sum(weight == 0 for row in v for weight in row)
        self.losses.append(loss.item())
        self.grads.append(dict(zip(named, grads, strict=False)))
        self.lambda_grads.append(grads[-1].item())


@pytest.mark.parametrize("scope", ["batch", "prompt"])
@pytest.mark.parametrize("own", [None, TOOLS], ids=["all tokens", "tools"])
@pytest.mark.parametrize("cut", CUTS)
def test_every_argument_and_what_it_does_equal_plain_loops(cut, own, scope):
    recorded = Recorded(own, length_weight_scope=scope, **CUTS[cut])
    run, micro_batches = recorded.run, CUTS[cut].get("gradient_accumulation_steps", 1)
    assert recorded.steps == [0, 1, 2, 3] and recorded.zeros > 2 and len(set(run.lambdas)) == 4
    losses = [sum(run.losses[i : i + micro_batches]) for i in range(0, 4 * micro_batches, micro_batches)]
    assert losses == pytest.approx(recorded.losses, rel=1e-9, abs=1e-9)
    assert run.lambda_grads == pytest.approx(recorded.lambda_grads, rel=1e-9, abs=1e-9)
    assert all(largest_deviation(*pair) < 1e-9 for pair in zip(run.grads, recorded.grads, strict=True))


def test_two_processes_equal_one(tmp_path):
    job = {"trainer": "lambda", "batch": {"env_mask": TOOLS, "lengths": LENGTHS}, "build": {"double": True}}
    job |= {"length_weight": "user_weights.every_response_argument"}
    job |= {"token_weight": "user_weights.every_token_argument"}
    options = OPTIONS | {"num_iterations": 2, "gradient_accumulation_steps": 2}
    one, two = (job | {"options": options | {"per_device_train_batch_size": rows}} for rows in (6, 3))
    alone, (ranks,) = run_job(one), launch([two], tmp_path, 2)
    assert ranks[0]["lambdas"] == ranks[1]["lambdas"] and len(set(alone["lambdas"])) == 4
    for rank in ranks:
        assert rank["lambdas"] == pytest.approx(alone["lambdas"], rel=1e-9)
        assert all(largest_deviation(*pair) < 1e-9 for pair in zip(rank["grads"], alone["grads"], strict=True))


def test_0_everywhere_is_a_loss_of_0_and_leaves_the_entropy_bonus():
    zero = {"token_weight": lambda probs: probs * 0}
    run = train_ours(trainer_options=zero, max_steps=2, learning_rate=0.1)
    assert run.losses == [0.0, 0.0] and run.lambda_grads == [0.0, 0.0]
    assert all(not grad.any() for grads in run.grads for grad in grads.values()) and run.grads[0]
    bonus = {"entropy_coef": 0.05, "model": build_model(double=True)}
    mine, batch = train_ours(trainer_options=zero, **bonus), Batch()
    batch.rewards = [0.5] * 12  # A = 0
    theirs = harness.train_trl(batch, loss_type="dapo", **bonus | {"model": build_model(double=True)})
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-9) and abs(mine.losses[0]) > 1e-3
    assert largest_deviation(mine.grads[0], theirs.grads[0]) < 1e-9


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
        train_ours(trainer_options={"length_weight": f, "token_weight": w}, **options)
        for f, w in ((user_weights.power, user_weights.linear), (writing(user_weights.power), v))
    ]
    assert_same_bits(*runs)
    assert runs[0].lambdas == runs[1].lambdas and len(set(runs[0].lambdas)) == 4


def test_a_class_that_asks_for_statistics_trains_as_the_function():
    def confident(lam, mean_logp, mean_entropy):
        assert lam.shape == ()
        return (lam * mean_logp + mean_entropy).exp()

    options = {"lambda_init": 0.5, "max_steps": 2}
    first, second = (
        train_ours(trainer_options={"length_weight": weight}, **options)
        for weight in (confident, user_weights.Confident())
    )
    assert_same_bits(first, second)
    assert first.lambda_grads == second.lambda_grads and first.lambda_grads[0] != 0


@pytest.mark.parametrize("scope", ["batch", "prompt"])
@pytest.mark.parametrize("truncated", [{0, 5}, {1, 4, 5, 6, 7}, set(range(12))])
def test_rows_without_tokens_never_make_the_gradient_of_lambda_nan(truncated, scope):
    options = {"mask_truncated_completions": True, "lambda_init": -1.5, "length_weight_scope": scope, "max_steps": 2}
    weight = {"trainer_options": {"length_weight": user_weights.power}}
    run = train_ours(Batch(truncated=truncated), **weight, **options)
    grads = torch.tensor(run.lambda_grads)
    assert grads.isfinite().all() and run.trainer._lambda.skipped == 0
    assert bool(grads.any()) == (len(truncated) < 12)
