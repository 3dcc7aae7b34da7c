"""
Loss, gradient, dL/dλ and metrics with tools equal plain loops over the policy's own tokens.

Tool output comes in twice: as masks of prepared completions, and by TRL's own tool loop around a scripted policy.
"""

import math

import pytest
import reference
import torch
from datasets import Dataset
from launch import launch
from support import LENGTHS, Batch, build, build_model, build_tokenizer, config, off_policy_logps, prompt, watch

from recipes.playground.lookup_agent import CHAT_TEMPLATE, RESPONSE_TEMPLATE, LookUp
from recipes.playground.make_base_model import LOOKUP_CHARACTERS, make_tokenizer
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

EPS = 0.2
G = 4
LAMBDA = 1.3
ALL = [n for group in LENGTHS for n in group]


# ---- Plain loops ----


def plain_advantages(rewards: list[float]) -> list[float]:
    """(r - mean) / (std + 1e-4) in each group, as GRPO has it."""
    advantages = []
    for start in range(0, len(rewards), G):
        group = rewards[start : start + G]
        mean = math.fsum(group) / G
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (G - 1))
        advantages += [(r - mean) / (std + 1e-4) for r in group]
    return advantages


def plain_logps(model, prompt_ids: list[int], completion: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + completion])).logits[0]
    return [
        torch.log_softmax(logits[len(prompt_ids) + t - 1].double(), dim=-1)[token].item()
        for t, token in enumerate(completion)
    ]


class Plain:
    """A generation batch as lists: prompts, completions, masks of own tokens, rewards; how far off policy it is."""

    def __init__(self, model, prompts, completions, own, rewards, noise, aggregation="lambda", regulation="sigmoid"):
        self.model, self.prompts, self.completions, self.own = model, prompts, completions, own
        self.advantages = plain_advantages(rewards)
        self.aggregation, self.regulation = aggregation, regulation
        self.counts = [sum(mask) for mask in own]
        self.logps = [plain_logps(model, p, c) for p, c in zip(prompts, completions, strict=True)]
        self.old = []
        for row, logps in enumerate(self.logps):
            off = torch.randn(64, generator=torch.Generator().manual_seed(row)).tolist()
            self.old.append([logp + noise * z for logp, z in zip(logps, off, strict=False)])

    def weights(self, lam: float) -> list[float]:
        groups = [self.counts[i : i + G] for i in range(0, len(self.counts), G)]
        return sum(reference.length_weights(groups, lam, self.aggregation, max_completion_length=16), [])

    def row_loss(self, row: int) -> torch.Tensor | float:
        """-1/Σ|o| Σ_t v s of a row, at f = 1."""
        if not self.counts[row]:
            return 0.0
        loss = reference.policy_loss(
            self.model,
            [self.prompts[row]],
            [self.completions[row]],
            [self.old[row]],
            [self.advantages[row]],
            [1.0],
            loss_type="dapo",
            regulation=self.regulation,
            own=[self.own[row]],
        )
        return loss * self.counts[row] / sum(self.counts)

    def step(self, lam: float) -> tuple[float, dict[str, torch.Tensor], float]:
        """Loss, its gradient in the model, dL/dλ (f's derivative by a difference in fp64)."""
        self.model.zero_grad()
        rows = [self.row_loss(row) for row in range(len(self.own))]
        loss = sum(f * row for f, row in zip(self.weights(lam), rows, strict=True))
        loss.backward()
        h = 1e-5
        slopes = [(b - a) / (2 * h) for a, b in zip(self.weights(lam - h), self.weights(lam + h), strict=True)]
        return (
            loss.item(),
            {name: p.grad.clone() for name, p in self.model.named_parameters()},
            math.fsum(slope * float(torch.as_tensor(row).detach()) for slope, row in zip(slopes, rows, strict=True)),
        )

    def tokens(self, lam: float):
        """Row, f, log π, v, ratio of every own token."""
        for row, (f, mask) in enumerate(zip(self.weights(lam), self.own, strict=True)):
            for t, mine in enumerate(mask):
                if mine:
                    logp = self.logps[row][t]
                    v = 1.0 if self.regulation is None else reference.probability_weight(logp, self.regulation)
                    yield row, f, logp, v, math.exp(logp - self.old[row][t])

    def metrics(self, lam: float) -> dict[str, float]:
        tokens = list(self.tokens(lam))
        weights = [f for f, n in zip(self.weights(lam), self.counts, strict=True) if n]
        found = {}
        if self.regulation is not None:
            vs = [v for *_, v, _ in tokens]
            found = {"token_weight/mean": math.fsum(vs) / len(vs), "token_weight/max": max(vs)}
            found["token_weight/min"] = min(vs)
        found |= {"length_weight/min": min(weights), "length_weight/max": max(weights)}
        for name, sign in (("positive", 1), ("negative", -1)):
            ratios = [ratio for row, *_, ratio in tokens if self.advantages[row] * sign > 0]
            clipped = [ratio > 1 + EPS if sign > 0 else ratio < 1 - EPS for ratio in ratios]
            found[f"clipped/advantage_{name}"] = sum(clipped) / len(clipped)
        mass = [abs(self.advantages[row]) * f * v for row, f, _, v, _ in tokens]
        present = sorted(n for n in self.counts if n)
        edges = [present[math.ceil(q * len(present) / 4) - 1] for q in (1, 2, 3)]
        shares = [0.0] * 4
        for part, (row, *_) in zip(mass, tokens, strict=True):
            shares[sum(edge < self.counts[row] for edge in edges)] += part / math.fsum(mass)
        return found | {f"share/length_q{q + 1}": share for q, share in enumerate(shares)}

    def response_metrics(self) -> dict[str, float]:
        """What is logged once per generation batch."""
        cross = squares_a = squares_n = 0.0
        by_sign = {1: [], -1: []}
        for start in range(0, len(self.counts), G):
            rows = [row for row in range(start, start + G) if self.counts[row]]
            mean_a = math.fsum(self.advantages[row] for row in rows) / len(rows)
            mean_n = math.fsum(self.counts[row] for row in rows) / len(rows)
            for row in rows:
                a, n = self.advantages[row] - mean_a, self.counts[row] - mean_n
                cross, squares_a, squares_n = cross + a * n, squares_a + a * a, squares_n + n * n
                by_sign[math.copysign(1, self.advantages[row])].append(self.counts[row])
        return {
            "advantage/length_correlation": cross / math.sqrt(squares_a * squares_n),
            "advantage/positive_mean_length": sum(by_sign[1]) / len(by_sign[1]),
            "advantage/negative_mean_length": sum(by_sign[-1]) / len(by_sign[-1]),
            "completions/mean_length": sum(self.counts) / len(self.counts),
            "completions/min_length": min(self.counts),
            "completions/max_length": max(self.counts),
        }


def assert_close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    scale = max(grad.abs().max() for grad in theirs.values()).item()
    for name, grad in theirs.items():
        torch.testing.assert_close(mine[name], grad, rtol=0, atol=2e-5 * scale)


def assert_equals_plain_loops(plains: list[Plain], losses, grads, lambda_grads, lambdas, logs, per_step: int) -> None:
    """Every optimizer step: `plains` one for each, `losses` one for each micro-batch."""
    before = [LAMBDA if lambdas[0] is not None else 0.0, *lambdas[:-1]]
    for k, (plain, lam) in enumerate(zip(plains, before, strict=True)):
        loss, gradient, slope = plain.step(lam)
        assert sum(losses[k * per_step : (k + 1) * per_step]) == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert_close(grads[k], gradient)
        if plain.aggregation == "lambda":
            assert lambda_grads[k] == pytest.approx(slope, rel=2e-4, abs=1e-7)
        expected = plain.metrics(lam)
        if "advantage/length_correlation" in logs[k]:
            expected |= plain.response_metrics()
        for name, value in expected.items():
            assert logs[k][name] == pytest.approx(value, rel=2e-5, abs=1e-6), (k, name)


# ---- Prepared completions with masks ----


def interleaved(row: int) -> list[int]:
    return [0] * 7 if row == 8 else [int(t % 3 != 1) for t in range(ALL[row])]  # row 8 has no token of its own


MASKS = {
    "interleaved": [interleaved(row) for row in range(12)],
    "in some rows only": [interleaved(row) if row in (2, 6, 10) else [1] * ALL[row] for row in range(12)],
    "no call": [[1] * n for n in ALL],
    "cut off in the tool's answer": [[1] * math.ceil(n / 2) + [0] * (n // 2) for n in ALL],
}
CUT_OFF = {row for row, n in enumerate(ALL) if n > 1}
OPTIONS = {
    "whole": {},
    "micro-batches": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    "two iterations": {"num_iterations": 2, "max_steps": 4, "log_completions": True},
    "dr_grpo": {"aggregation": "dr_grpo"},
}


class SometimesMasked(Batch):
    """Every second generation batch comes without a mask, as one in which nobody calls does from some rollouts."""

    def rollout(self, prompts, trainer):
        self.batches = getattr(self, "batches", 0) + 1
        output = super().rollout(prompts, trainer)
        if self.batches % 2 == 0:
            del output["env_mask"]
        return output


def plain_of(batch: Batch, own: list[list[int]], noise: float, **options) -> Plain:
    prompts = [build_tokenizer()(prompt(row // G))["input_ids"] for row in range(12)]
    return Plain(build_model(), prompts, batch.completions, own, batch.rewards, noise, **options)


def run_batch(batch: Batch, noise: float, **options):
    init = {} if options.get("aggregation") == "dr_grpo" else {"lambda_init": LAMBDA}
    args = config(LambdaGRPOConfig, batch, token_regulation="sigmoid", **init, **options)
    trainer = build(LambdaGRPOTrainer, args, batch, noise=noise)
    run = watch(trainer)
    trainer.train()
    return run


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_masked_tokens_take_no_part_in_anything(mask, options):
    own, chosen = MASKS[mask], OPTIONS[options]
    batch = Batch(env_mask=own, truncated=CUT_OFF if "cut off" in mask else set())
    run = run_batch(batch, 0.3, **chosen)
    plain = plain_of(batch, own, 0.3, aggregation=chosen.get("aggregation", "lambda"))
    steps = chosen.get("max_steps", 1)
    # `noise` depends on the row alone, and the model does not learn: each step has the same batch and a λ of its own.
    assert_equals_plain_loops(
        [plain] * steps,
        run.losses,
        run.grads,
        run.lambda_grads,
        run.lambdas,
        run.logs,
        chosen.get("gradient_accumulation_steps", 1),
    )
    if steps > 1:
        assert len(set(run.lambdas)) == steps  # so that f differed from step to step


def test_a_mask_in_some_generation_batches_only():
    own = MASKS["interleaved"]
    batch = SometimesMasked(env_mask=own)
    run = run_batch(batch, 0.3, max_steps=3)
    masked, unmasked = plain_of(batch, own, 0.3), plain_of(batch, MASKS["no call"], 0.3)
    plains = [masked, unmasked, masked]
    assert_equals_plain_loops(plains, run.losses, run.grads, run.lambda_grads, run.lambdas, run.logs, 1)


def test_two_processes_give_the_same(tmp_path):
    """A group of four over two ranks' micro-batches of three rows."""
    own = MASKS["interleaved"]
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "token_regulation": "sigmoid"}
    options |= {"num_iterations": 2, "max_steps": 2, "log_completions": True, "lambda_init": LAMBDA}
    options["output_dir"] = str(tmp_path / "out")
    job = {"trainer": "lambda", "options": options, "batch": {"env_mask": own}, "noise": 0.3}
    (ranks,) = launch([job], tmp_path, 2)
    plain = plain_of(Batch(), own, 0.3)
    losses = [sum(pair) / 2 for pair in zip(*(rank["losses"] for rank in ranks), strict=True)]
    for rank in ranks:
        logs = [entry for entry in ranks[0]["history"] if "loss" in entry]
        assert_equals_plain_loops(
            [plain] * 2, losses, rank["grads"], rank["lambda_grads"], rank["lambdas"], logs, per_step=2
        )


# ---- TRL's own tool loop around a scripted policy ----

LIMIT = 20
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
CALLS, FAILURES = 2 + 1 + 3 + 2 + 1 + 2, 1
REWARDS = [1.0, 0.2, 0.0, 0.5, 0.7, 0.1, 0.0, 1.0]


def as_ids(text: str, tokenizer) -> list[int]:
    return tokenizer(text.replace("$", "<eos>"))["input_ids"]


class Scripted(LambdaGRPOTrainer):
    """Says what the script says, turn by turn; everything else is TRL's and this package's."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        tokenizer = self.processing_class
        if len(prompt_ids) == len(CONVERSATIONS):
            self.turns = [[as_ids(turn, tokenizer) for turn in turns] for turns, *_ in CONVERSATIONS]
            self.said = [list(ids) for ids in prompt_ids]
            rows = range(len(prompt_ids))
        else:  # the conversations that go on, in their order
            rows, open_rows = [], iter(range(len(CONVERSATIONS)))
            for context in prompt_ids:
                found = (r for r in open_rows if self.turns[r] and context[: len(self.said[r])] == self.said[r])
                rows.append(next(found))
        spoken = [self.turns[row].pop(0) for row in rows]
        for row, context, turn in zip(rows, prompt_ids, spoken, strict=True):
            self.said[row] = context + turn
        return spoken, None

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output["old_per_token_logps"] = off_policy_logps(self, output, 0.3)
        return output

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.seen_losses.append(loss.item())
        return loss


def scripted_rewards(completions, **kwargs) -> list[float]:
    return REWARDS


@pytest.mark.parametrize("micro", [8, 2])
@pytest.mark.parametrize("regulation", ["sigmoid", None])
def test_trls_own_tool_loop(micro, regulation, tmp_path):
    tokenizer = make_tokenizer(LOOKUP_CHARACTERS, 128, CHAT_TEMPLATE, RESPONSE_TEMPLATE)
    rows = [
        {"prompt": [{"role": "user", "content": f"F{key}"}], "table": t} for key, t in zip("ab", TABLES, strict=True)
    ]
    batch = Batch(lengths=LENGTHS[:2])
    options = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro, "num_iterations": 2}
    options |= {"max_completion_length": LIMIT, "max_steps": 2, "log_completions": True, "lambda_init": LAMBDA}
    options["token_regulation"] = regulation
    trainer = Scripted(
        model=build_model(),
        reward_funcs=scripted_rewards,
        args=config(LambdaGRPOConfig, batch, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        environment_factory=LookUp,
    )
    trainer.seen_losses = []
    run = watch(trainer)
    trainer.train()
    plain = Plain(
        build_model(),
        [as_ids(f"F{key}=", tokenizer) for key in "aaaabbbb"],
        [as_ids(text, tokenizer) for _, text, _ in CONVERSATIONS],
        [[int(x) for x in mask] for *_, mask in CONVERSATIONS],
        REWARDS,
        0.3,
        regulation=regulation,
    )
    assert_equals_plain_loops(
        [plain] * 2, run.losses, run.grads, run.lambda_grads, run.lambdas, run.logs, per_step=8 // micro
    )
    assert run.lambdas[0] != run.lambdas[1]
    assert run.logs[0]["tools/call_frequency"] == pytest.approx(CALLS / 8)
    assert run.logs[0]["tools/failure_frequency"] == pytest.approx(FAILURES / CALLS)
    # Two are cut off in a turn. The one whose answer did not fit ends with the end token, and TRL does not count it.
    assert run.logs[0]["completions/clipped_ratio"] == pytest.approx(2 / 8)
    table = trainer._logs["completion"]
    assert len(table) == 8 and len(trainer._logs["extra"]["length_weight"]) == 8
