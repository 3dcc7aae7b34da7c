"""
Loss, gradient, dL/dλ and metrics with tools equal plain loops over the policy's own tokens, in float64.

Tool output comes in twice: as masks of prepared completions, and by TRL's own tool loop around a scripted policy.
"""

import math

import harness
import pytest
import reference
import torch
from datasets import Dataset
from harness import LENGTHS, Batch, build, build_model, build_tokenizer, config, largest_deviation, prompt, watch
from launch import launch

from recipes.playground.lookup_agent import CHAT_TEMPLATE, RESPONSE_TEMPLATE, LookUp
from recipes.playground.make_base_model import LOOKUP_CHARACTERS, make_tokenizer
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

G, LAMBDA, NOISE = 4, 1.25, 0.3  # λ begins as a float32
ALL = [n for group in LENGTHS for n in group]


def advantages_of(run, rewards):
    """TRL's own, which it computes in float32: checked here, and then taken as they are."""
    advantages = list(run.trainer._logs["advantages"])[: len(rewards)]
    plain = reference.group_advantages([rewards[i : i + G] for i in range(0, len(rewards), G)])
    assert advantages == pytest.approx(sum(plain, []), abs=1e-6)
    return advantages


class Plain:
    """A generation batch as lists: prompts, completions, masks of own tokens, A."""

    def __init__(self, prompts, completions, own, advantages):
        self.model, self.own, self.advantages = build_model(double=True), own, advantages
        self.counts = [sum(mask) for mask in own]
        self.logps = [reference.score(self.model, p, c)[0] for p, c in zip(prompts, completions, strict=True)]
        drawn = (torch.randn(64, generator=torch.Generator().manual_seed(row)) for row in range(len(own)))
        off = [(NOISE * noise).tolist() for noise in drawn]
        old = [[x + z for x, z in zip(*pair, strict=False)] for pair in zip(self.logps, off, strict=True)]
        self.v = [[reference.probability_weight(x, "tr_grpo") for x in logps] for logps in self.logps]
        terms = {"loss_type": "dapo", "own": own, "v": self.v}
        self.terms = reference.policy_terms(self.model, prompts, completions, old, self.advantages, **terms)

    def weights(self, lam):
        groups = [self.counts[i : i + G] for i in range(0, len(self.counts), G)]
        return sum(reference.length_weights(groups, lam, "lambda_grpo"), [])

    def step(self, lam):
        """Loss, its gradient in the model, dL/dλ (f's derivative by a difference)."""
        self.model.zero_grad()
        loss = sum(f * term for f, term in zip(self.weights(lam), self.terms, strict=True))
        loss.backward(retain_graph=True)
        h = 1e-5
        slopes = [(b - a) / (2 * h) for a, b in zip(self.weights(lam - h), self.weights(lam + h), strict=True)]
        grads = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        terms = [float(torch.as_tensor(term).detach()) for term in self.terms]
        return loss.item(), grads, math.fsum(s * t for s, t in zip(slopes, terms, strict=True))

    def metrics(self, lam):
        own = [v for pair in zip(self.v, self.own, strict=True) for v, mine in zip(*pair, strict=True) if mine]
        return {"length_weight/max": max(self.weights(lam)), "token_weight/mean": math.fsum(own) / len(own)}


def seen(run):
    return run.losses, run.grads, run.lambda_grads, run.lambdas, run.logs


def assert_equals_plain_loops(plains, losses, grads, lambda_grads, lambdas, logs, per_step=1):
    """Every optimizer step: `plains` one for each, `losses` one for each micro-batch."""
    for k, (plain, lam) in enumerate(zip(plains, [LAMBDA, *lambdas[:-1]], strict=True)):
        loss, gradient, slope = plain.step(lam)
        assert sum(losses[k * per_step : (k + 1) * per_step]) == pytest.approx(loss, rel=1e-9, abs=1e-12)
        assert largest_deviation(grads[k], gradient) < 1e-9
        assert lambda_grads[k] == pytest.approx(slope, rel=1e-7)  # the difference in λ has 1e-10 itself
        for name, value in plain.metrics(lam).items():
            assert logs[k][name] == pytest.approx(value, rel=1e-5, abs=1e-6), (k, name)


# ---- Prepared completions with masks ----


def interleaved(row):
    return [0] * 7 if row == 8 else [int(t % 3 != 1) for t in range(ALL[row])]  # row 8 has no token of its own


MASKS = {
    "interleaved": [interleaved(row) for row in range(12)],
    "in some rows only": [interleaved(row) if row in (2, 6, 10) else [1] * ALL[row] for row in range(12)],
    "no call": [[1] * n for n in ALL],
    "cut off in the tool's answer": [[1] * math.ceil(n / 2) + [0] * (n // 2) for n in ALL],
}
OPTIONS = {
    "whole": {},
    "micro-batches": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    "two iterations": {"num_iterations": 2, "max_steps": 4, "log_completions": True},
}


class SometimesMasked(Batch):
    """Every second generation batch comes without a mask, as one in which nobody calls does from some rollouts."""

    def rollout(self, prompts, trainer):
        self.calls = getattr(self, "calls", 0) + 1
        output = super().rollout(prompts, trainer)
        return output if self.calls % 2 else {key: value for key, value in output.items() if key != "env_mask"}


def plain_of(run, batch, own):
    prompts = [build_tokenizer()(prompt(row // G))["input_ids"] for row in range(12)]
    return Plain(prompts, batch.completions, own, advantages_of(run, batch.rewards))


def run_batch(batch, **options):
    args = config(LambdaGRPOConfig, batch, token_weight="tr_grpo", lambda_init=LAMBDA, **options)
    run = watch(build(LambdaGRPOTrainer, args, batch, build_model(double=True), noise=NOISE))
    run.trainer.train()
    return run


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_masked_tokens_take_no_part_in_anything(mask, options):
    own, chosen = MASKS[mask], OPTIONS[options]
    batch = Batch(env_mask=own, truncated={r for r, n in enumerate(ALL) if n > 1} if "cut off" in mask else set())
    run = run_batch(batch, **chosen)
    # `noise` depends on the row alone, and the model does not learn: each step has the same batch and a λ of its own.
    plains, per_step = (
        [plain_of(run, batch, own)] * chosen.get("max_steps", 1),
        chosen.get("gradient_accumulation_steps", 1),
    )
    assert_equals_plain_loops(plains, *seen(run), per_step)


def test_a_mask_in_some_generation_batches_only():
    batch = SometimesMasked(env_mask=MASKS["interleaved"])
    run = run_batch(batch, max_steps=3)
    masked, unmasked = (plain_of(run, batch, MASKS[name]) for name in ("interleaved", "no call"))
    assert_equals_plain_loops([masked, unmasked, masked], *seen(run))


def test_two_processes_give_the_same(tmp_path):
    """A group of four over two ranks' micro-batches of three rows."""
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "token_weight": "tr_grpo"}
    options |= {"num_iterations": 2, "max_steps": 2, "lambda_init": LAMBDA, "output_dir": str(tmp_path / "out")}
    job = {"trainer": "lambda", "options": options, "batch": {"env_mask": MASKS["interleaved"]}, "noise": NOISE}
    (ranks,) = launch([job | {"build": {"double": True}}], tmp_path, 2)
    plain = plain_of(run_batch(Batch(env_mask=MASKS["interleaved"])), Batch(), MASKS["interleaved"])
    losses = [sum(pair) / 2 for pair in zip(*(rank["losses"] for rank in ranks), strict=True)]
    logs = [entry for entry in ranks[0]["history"] if "loss" in entry]
    for rank in ranks:
        assert_equals_plain_loops([plain] * 2, losses, rank["grads"], rank["lambda_grads"], rank["lambdas"], logs, 2)


# ---- TRL's own tool loop around a scripted policy ----

TABLES = ("bc700000", "3a500000")  # a -> b -> c -> 7; b -> a -> 3, c -> 5
# The policy's turns in each conversation of two groups, $ the end token; and by hand what comes of them, where the
# template puts answers in brackets and = behind them, as a completion and a mask of own tokens.
CONVERSATIONS = [
    (["[a]$", "[b]$", "7$"], "[a]$(b)=[b]$(c)=7$", "111100001111000011"),
    (["7$"], "7$", "11"),  # no call
    (["[?]$", "7$"], "[?]$(e?)=7$", "11110000011"),  # it raises: {'error': '?'}, of which the tokenizer knows e and ?
    (["[a]$", "[b]$", "[c]$"], "[a]$(b)=[b]$(c)=[c]$", "11110000111100001111"),  # a third answer would not fit
    (["[a][c]$", "8$"], "[a][c]$(3)(5)=8$", "1111111000000011"),  # two calls in one turn
    (["01234567890123456789"], "01234567890123456789", "1" * 20),  # cut off in its first turn
    (["[a]$", "0123456789012345"], "[a]$(3)=012345678901", "11110000111111111111"),  # cut off after an answer
    (["0[b]$", "[a]$", "3$"], "0[b]$(a)=[a]$(3)=3$", "1111100001111000011"),  # text before a call
]
as_ids = lambda texts, tokenizer: tokenizer([text.replace("$", "<eos>") for text in texts])["input_ids"]  # noqa: E731
REWARDS = [1.0, 0.2, 0.0, 0.5, 0.7, 0.1, 0.0, 1.0]


class Scripted(LambdaGRPOTrainer):
    """Says what the script says, turn by turn; everything else is TRL's and this package's."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        rows = list(range(len(prompt_ids)))
        if len(prompt_ids) == len(CONVERSATIONS):
            self.turns = [as_ids(turns, self.processing_class) for turns, *_ in CONVERSATIONS]
            self.said = [list(ids) for ids in prompt_ids]
        else:  # the conversations that go on, in their order
            open_rows = iter(range(len(CONVERSATIONS)))
            for i, context in enumerate(prompt_ids):
                rows[i] = next(r for r in open_rows if self.turns[r] and context[: len(self.said[r])] == self.said[r])
        spoken = [self.turns[row].pop(0) for row in rows]
        for row, context, turn in zip(rows, prompt_ids, spoken, strict=True):
            self.said[row] = context + turn
        return spoken, None

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        old = harness.off_policy_logps(self, output, NOISE)
        return output | {"old_per_token_logps": old, "advantages": output["advantages"].double()}

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.seen_losses.append(loss.item())
        return loss


@pytest.mark.parametrize("micro", [8, 2])
def test_trls_own_tool_loop(micro):
    tokenizer = make_tokenizer(LOOKUP_CHARACTERS, 128, CHAT_TEMPLATE, RESPONSE_TEMPLATE)
    rows = [{"prompt": [{"role": "user", "content": f"F{k}"}], "table": t} for k, t in zip("ab", TABLES, strict=True)]
    options = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro, "num_iterations": 2}
    options |= {"max_completion_length": 20, "max_steps": 2, "lambda_init": LAMBDA, "token_weight": "tr_grpo"}
    args = config(LambdaGRPOConfig, Batch(lengths=LENGTHS[:2]), **options)
    tools = {"train_dataset": Dataset.from_list(rows), "environment_factory": LookUp, "processing_class": tokenizer}
    trainer = Scripted(build_model(double=True), lambda completions, **kwargs: REWARDS, args, **tools)
    harness.score_in_double(trainer.model)
    trainer._lambda.tensor.data, trainer.seen_losses = trainer._lambda.tensor.data.double(), []
    run = watch(trainer)
    trainer.train()
    prompts = as_ids([f"F{key}=" for key in "aaaabbbb"], tokenizer)
    completions = as_ids([text for _, text, _ in CONVERSATIONS], tokenizer)
    own = [[int(x) for x in mask] for *_, mask in CONVERSATIONS]
    plain = Plain(prompts, completions, own, advantages_of(run, REWARDS))
    assert_equals_plain_loops([plain] * 2, *seen(run), per_step=8 // micro)
    assert run.lambdas[0] != run.lambdas[1]
