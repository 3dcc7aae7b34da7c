"""Loss, gradient, dL/dλ and metrics with tools equal plain loops over the policy's own tokens, in float64."""

import math

import pytest
import reference
import torch
from datasets import Dataset
from harness import LENGTHS, Batch, build_model, largest_deviation, make, prompt_ids, tool_mask, watch

from recipes.playground.lookup_agent import CHAT_TEMPLATE, RESPONSE_TEMPLATE, LookUp
from recipes.playground.make_base_model import LOOKUP_CHARACTERS, make_tokenizer
from trl_lambda import LambdaGRPOTrainer

G, LAMBDA, NOISE = 4, 1.25, 0.3  # λ begins as a float32
ALL = [n for group in LENGTHS for n in group]


def advantages_of(run, rewards):
    """TRL's own, in float32: checked, and then taken as they are."""
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
        self.terms = reference.policy_terms(
            self.model, prompts, completions, old, self.advantages, loss_type="dapo", own=own, v=self.v
        )

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


def assert_equals_plain_loops(plains, run, per_step=1):
    """Every optimizer step, `plains` one for each, `per_step` micro-batches in it."""
    for k, (plain, lam) in enumerate(zip(plains, [LAMBDA, *run.lambdas[:-1]], strict=True)):
        loss, gradient, slope = plain.step(lam)
        assert sum(run.losses[k * per_step : (k + 1) * per_step]) == pytest.approx(loss, rel=1e-9, abs=1e-12)
        assert largest_deviation(run.grads[k], gradient) < 1e-9
        assert run.lambda_grads[k] == pytest.approx(slope, rel=1e-7)  # the difference in λ has 1e-10 itself
        for name, value in plain.metrics(lam).items():
            assert run.logs[k][name] == pytest.approx(value, rel=1e-5, abs=1e-6), (k, name)


TOOLS = tool_mask(LENGTHS)
MASKS = {
    "interleaved": TOOLS,
    "in some rows only": [TOOLS[row] if row in (2, 6, 10) else [1] * n for row, n in enumerate(ALL)],
    "no call": [[1] * n for n in ALL],
    "cut off in the tool's answer": [[1] * math.ceil(n / 2) + [0] * (n // 2) for n in ALL],
}
OPTIONS = {
    "whole": {},
    "micro-batches": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    "two iterations": {"num_iterations": 2, "max_steps": 4, "log_completions": True},
}


def plain_of(run, batch, own):
    return Plain(prompt_ids(batch), batch.completions, own, advantages_of(run, batch.rewards))


def run_batch(batch, **options):
    options |= {"token_weight": "tr_grpo", "lambda_init": LAMBDA, "arguments": {"noise": NOISE}}
    run = watch(make(batch, build_model(double=True), **options))
    run.trainer.train()
    return run


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_masked_tokens_take_no_part_in_anything(mask, options):
    own, chosen = MASKS[mask], OPTIONS[options]
    batch = Batch(env_mask=own, truncated={r for r, n in enumerate(ALL) if n > 1} if "cut off" in mask else set())
    run = run_batch(batch, **chosen)
    # `noise` depends on the row alone, and the model does not learn: each step has the same batch and a λ of its own.
    plains = [plain_of(run, batch, own)] * chosen.get("max_steps", 1)
    assert_equals_plain_loops(plains, run, chosen.get("gradient_accumulation_steps", 1))


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


@pytest.mark.parametrize("micro", [8, 2])
def test_trls_own_tool_loop(micro):
    tokenizer = make_tokenizer(LOOKUP_CHARACTERS, 128, CHAT_TEMPLATE, RESPONSE_TEMPLATE)
    rows = [{"prompt": [{"role": "user", "content": f"F{k}"}], "table": t} for k, t in zip("ab", TABLES, strict=True)]
    options = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro, "num_iterations": 2}
    options |= {"max_completion_length": 20, "max_steps": 2, "lambda_init": LAMBDA, "token_weight": "tr_grpo"}
    tools = {"train_dataset": Dataset.from_list(rows), "environment_factory": LookUp, "processing_class": tokenizer}
    tools |= {"reward_funcs": lambda completions, **kwargs: REWARDS, "rollout_func": None, "noise": NOISE}
    batch, model = Batch(lengths=LENGTHS[:2]), build_model(double=True)
    run = watch(make(batch, model, trainer_class=Scripted, arguments=tools, **options))
    run.trainer.train()
    _, texts, masks = zip(*CONVERSATIONS, strict=True)
    prompts, completions = (as_ids(t, tokenizer) for t in ([f"F{key}=" for key in "aaaabbbb"], texts))
    plain = Plain(prompts, completions, [list(map(int, mask)) for mask in masks], advantages_of(run, REWARDS))
    assert_equals_plain_loops([plain] * 2, run, 8 // micro)
    assert run.lambdas[0] != run.lambdas[1]
