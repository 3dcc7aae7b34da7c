"""
The alignment of weighted gradients: its estimator on a bandit whose gradients are written out by hand, its weights
against the gradients that TRL's own losses have, its file when a study is killed.
"""

import csv
import itertools
import math
import random
import statistics
import sys
from dataclasses import replace

import pytest
import torch
from support import Batch as Prepared
from support import build, build_model, build_tokenizer, config, prompt, train, watch
from transformers import AutoTokenizer, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from recipes.playground.make_base_model import BASE_MODELS
from recipes.playground.rewards import exact_answer
from recipes.playground.tasks import make_splits
from recipes.studies.alignment import study as alignment
from recipes.studies.alignment.batches import own_tokens, sample_batches, token_logps
from recipes.studies.alignment.measure import RULE_COLUMNS
from recipes.studies.alignment.policy_gradient import (
    Batch,
    Products,
    cosine_ratios,
    cosines,
    group_advantages,
    inner_products,
    jackknife_error,
    truth_term,
    weighted_gradient,
    without_each,
)
from recipes.studies.alignment.settled import settled_lambda, settled_lambdas
from recipes.studies.alignment.summary import pooled_error, summary_rows
from recipes.studies.alignment.weights import (
    CONTROLS,
    STEPPING,
    all_weights,
    lambda_gradient,
    make_weight,
    same_direction,
    slope_sides,
)
from recipes.studies.shared.arms import ARMS, BASELINES, LEARNED, Arm
from recipes.studies.shared.ledger import Ledger
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
from trl_lambda.weights import SIDES

# ---- A bandit of two steps: context → first action; action 0 ends, any other → second action, then the end ----

CONTEXTS, FIRST, SECOND = 2, 3, 3
SIGNED = tuple(side for side in SIDES if side != "both")
PROMPTS, GROUP = 5, 4


class Bandit:
    """Softmax policies θ (context, first action) and φ (first action, second action), rewards in a table."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        draw = {"generator": generator, "dtype": torch.float64}
        self.theta = torch.randn(CONTEXTS, FIRST, **draw).requires_grad_()
        self.phi = torch.randn(FIRST, SECOND, **draw).requires_grad_()
        self.table = torch.rand(CONTEXTS, FIRST, SECOND, **draw)

    @property
    def parameters(self):
        return [self.theta, self.phi]

    @torch.no_grad()
    def sample(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        context = torch.randint(CONTEXTS, (PROMPTS,), generator=generator).repeat_interleave(GROUP)
        first = torch.multinomial(self.theta.softmax(1)[context], 1, generator=generator).squeeze(1)
        second = torch.multinomial(self.phi.softmax(1)[first], 1, generator=generator).squeeze(1)
        mask = torch.stack([torch.ones_like(first), first != 0], dim=1).bool()
        rewards = self.table[context, first, second.masked_fill(first == 0, 0)]
        return Batch({"context": context, "first": first, "second": second}, mask, rewards.view(PROMPTS, GROUP))

    def logps(self, batch: Batch) -> torch.Tensor:
        context, first, second = batch.inputs.values()
        return torch.stack([self.theta.log_softmax(1)[context, first], self.phi.log_softmax(1)[first, second]], dim=1)

    def expected_gradient(self) -> torch.Tensor:
        """∇E[r] by the policy gradient theorem: probability of being there, times π(a) (Q(a) - V)."""
        theta, phi = torch.zeros(CONTEXTS, FIRST).double(), torch.zeros(FIRST, SECOND).double()
        pi, mu = self.theta.detach().softmax(1), self.phi.detach().softmax(1)
        for c in range(CONTEXTS):
            q = [self.table[c, 0, 0], *(mu[a] @ self.table[c, a] for a in range(1, FIRST))]
            value = sum(pi[c, a] * q[a] for a in range(FIRST))
            for a in range(FIRST):
                theta[c, a] = pi[c, a] * (q[a] - value) / CONTEXTS
                for b in range(SECOND) if a else ():
                    phi[a, b] += pi[c, a] * mu[a, b] * (self.table[c, a, b] - q[a]) / CONTEXTS
        return torch.cat([theta.flatten(), phi.flatten()])

    def score_sum(self, batch: Batch, coefficients: list[list[float]]) -> torch.Tensor:
        """Σ_it c_it ∇log π_it with ∇log π(a) = e_a - π, row by row."""
        theta, phi = torch.zeros(CONTEXTS, FIRST).double(), torch.zeros(FIRST, SECOND).double()
        pi, mu = self.theta.detach().softmax(1), self.phi.detach().softmax(1)
        for c, a, b, (one, two) in zip(*(x.tolist() for x in batch.inputs.values()), coefficients, strict=True):
            theta[c] -= one * pi[c]
            theta[c, a] += one
            if a:
                phi[a] -= two * mu[a]
                phi[a, b] += two
        return torch.cat([theta.flatten(), phi.flatten()])


def by_hand(batch: Batch) -> tuple[list[float], list[float]]:
    """Per row: the advantage of GRPO, and the reward minus the mean of the group's others."""
    standardised, left_out = [], []
    for group in batch.rewards.tolist():
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            left_out.append(reward - statistics.fmean(others))
            standardised.append((reward - statistics.fmean(group)) / (statistics.stdev(group) + 1e-4))
    return standardised, left_out


def two_weights(batch: Batch, logps: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.ones_like(logps), logps.exp() / batch.mask.sum(1, keepdim=True)])


@pytest.fixture(scope="module")
def bandit() -> Bandit:
    return Bandit()


def test_the_mean_truth_term_is_the_policy_gradient(bandit):
    terms = torch.stack([truth_term(b, bandit.logps(b), bandit.parameters) for b in map(bandit.sample, range(2500))])
    error = terms.std(dim=0) / len(terms) ** 0.5
    exact = bandit.expected_gradient()
    assert error.norm() < 0.05 * exact.norm()  # else the next line would let anything pass
    assert ((terms.mean(dim=0) - exact).abs() <= 4 * error + 1e-12).all()


def test_gradients_of_a_batch_are_the_sums_over_its_tokens(bandit):
    batch = bandit.sample(1)
    logps = bandit.logps(batch)
    weights = two_weights(batch, logps.detach())[1]
    standardised, left_out = by_hand(batch)
    tokens = int(batch.mask.sum())
    coefficients = [[a * w / tokens for w in row] for a, row in zip(standardised, weights.tolist(), strict=True)]
    gradient = weighted_gradient(batch, logps, weights, bandit.parameters)
    torch.testing.assert_close(gradient, bandit.score_sum(batch, coefficients), rtol=1e-10, atol=1e-12)
    term = truth_term(batch, logps, bandit.parameters)
    by_rows = bandit.score_sum(batch, [[a / (PROMPTS * GROUP)] * 2 for a in left_out])
    torch.testing.assert_close(term, by_rows, rtol=1e-10, atol=1e-12)


def test_inner_products_are_those_of_the_gradients_in_both_metrics(bandit):
    batches = [bandit.sample(seed) for seed in range(4)]
    ticks = []
    products = inner_products(batches, bandit.logps, two_weights, bandit.parameters, lambda: ticks.append(1))
    assert len(ticks) == 8
    gradients, truths = [], []
    for batch in batches:
        logps = bandit.logps(batch)
        pair = two_weights(batch, logps.detach())
        gradients.append([weighted_gradient(batch, logps, w, bandit.parameters) for w in pair])
        truths.append(truth_term(batch, logps, bandit.parameters))
    moment = sum(pair[0] ** 2 for pair in gradients) / 4
    for metric, scale in {"raw": torch.ones_like(moment), "adam": 1 / (moment.sqrt() + 1e-8)}.items():
        got = products[metric]
        for k, j in itertools.product(range(4), repeat=2):
            assert got.gram[k, j].item() == pytest.approx((truths[k] * truths[j] * scale).sum().item(), abs=1e-12)
            for w in range(2):
                inner = (gradients[k][w] * truths[j] * scale).sum().item()
                assert got.cross[w, k, j].item() == pytest.approx(inner, abs=1e-12)
                norm = (gradients[k][w] ** 2 * scale).sum().sqrt().item()
                assert got.norms[w, k].item() == pytest.approx(norm, rel=1e-10)


# ---- Cosines and their errors, from vectors ----


def products_of(gradients: torch.Tensor, truths: torch.Tensor) -> Products:
    """Of gradients (W, K, D) and terms (K, D)."""
    return Products(torch.einsum("wkd,jd->wkj", gradients, truths), gradients.norm(dim=2), truths @ truths.T)


def random_vectors(seed: int, weights: int, batches: int, size: int, signal: float):
    """Every batch has noise that its gradients and its term share, and noise of each gradient."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(batches, size, generator=generator, dtype=torch.float64)
    own = torch.randn(weights, batches, size, generator=generator, dtype=torch.float64)
    direction = torch.ones(size, dtype=torch.float64)
    return shared + own + signal * direction, shared + signal * direction


def test_cosines_leave_their_own_batch_out():
    x, y = torch.eye(2).double()
    truths = torch.stack([x, x, y])
    gradients = torch.stack([torch.stack([x, y, x]), torch.stack([2 * y, 3 * x, torch.zeros(2)])]).double()
    half = math.sqrt(0.5)
    # T_0 = T_1 = x + y, T_2 = 2x; a gradient of zero has cosine 0.
    expected = torch.tensor([[half, half, 1.0], [half, half, 0.0]]).double()
    torch.testing.assert_close(cosines(products_of(gradients, truths)), expected)
    ratios = cosine_ratios(products_of(gradients, truths))
    assert ratios.tolist() == pytest.approx([1, 2 * half / (2 * half + 1)])


def test_noise_is_not_alignment_unless_a_batch_is_its_own_reference():
    count, without, with_own = 25, [], []
    for seed in range(20):
        products = products_of(*random_vectors(seed, 1, count, 300, signal=0.0))
        without.append(cosines(products).mean().item())
        own = products.cross.sum(dim=2) / (products.norms * products.gram.sum().sqrt())
        with_own.append(own.mean().item())
    error = statistics.stdev(without) / len(without) ** 0.5
    assert abs(statistics.fmean(without)) < 4 * error < 0.02
    assert min(with_own) > 0.1  # √(1/2) / √25 = 0.14 in the mean


def test_the_jackknife_is_recomputed_from_the_vectors_of_all_other_batches():
    gradients, truths = random_vectors(0, 3, 7, 50, signal=0.5)
    deleted = []
    for k in range(7):
        kept = [j for j in range(7) if j != k]
        cos = [
            [
                torch.cosine_similarity(g[i], sum(truths[j] for j in kept if j != i), dim=0).item()
                for i in kept
            ]
            for g in gradients
        ]  # fmt: skip
        deleted.append([statistics.fmean(c) / statistics.fmean(cos[0]) for c in cos])
    torch.testing.assert_close(
        without_each(products_of(gradients, truths), cosine_ratios), torch.tensor(deleted, dtype=torch.float64)
    )
    errors = jackknife_error(torch.tensor(deleted, dtype=torch.float64)).tolist()
    for w, error in enumerate(errors):
        column = [row[w] for row in deleted]
        centre = statistics.fmean(column)
        assert error == pytest.approx(math.sqrt(6 / 7 * sum((x - centre) ** 2 for x in column)), rel=1e-10)
    assert errors[0] == 0


def test_the_jackknife_error_is_the_spread_of_repeated_studies():
    ratios, errors = [], []
    for seed in range(150):
        products = products_of(*random_vectors(seed, 2, 12, 60, signal=0.4))
        ratios.append(cosine_ratios(products)[1].item())
        errors.append(jackknife_error(without_each(products, cosine_ratios))[1].item())
    assert statistics.stdev(ratios) == pytest.approx(statistics.fmean(errors), rel=0.25)


# ---- Weights, against the gradients of the trainers themselves ----


def prepared_batch(prepared: Prepared) -> Batch:
    """The completions that `support` trains on, as the estimator takes them."""
    tokenizer, group = build_tokenizer(), prepared.num_generations
    prompts = tokenizer(
        [prompt(row // group) for row in range(len(prepared.completions))], return_tensors="pt", padding=True
    )
    width = max(map(len, prepared.completions))
    completions = torch.tensor([c + [0] * (width - len(c)) for c in prepared.completions])
    inputs = {
        "prompt_ids": prompts["input_ids"],
        "prompt_mask": prompts["attention_mask"],
        "completion_ids": completions,
    }
    return Batch(inputs, own_tokens(completions, 1), torch.tensor(prepared.rewards).view(-1, group))


def trainer_run(arm: Arm):
    pair = (GRPOTrainer, GRPOConfig) if arm.trl else (LambdaGRPOTrainer, LambdaGRPOConfig)
    return train(*pair, Prepared(), **arm.options)


def distinct_losses() -> dict[str, Arm]:
    """Arms and controls, without those that differ from an earlier one in how λ is stepped only."""
    losses = {}
    for name, arm in {**ARMS, **CONTROLS}.items():
        options = {key: value for key, value in arm.options.items() if key not in STEPPING}
        losses.setdefault((arm.trl, *sorted(map(str, options.items()))), name)
    return {name: {**ARMS, **CONTROLS}[name] for name in losses.values()}


PARITY = distinct_losses()


@pytest.mark.parametrize("name", PARITY)
def test_the_direction_of_every_arm_is_that_of_its_trainer(name):
    """The weight that `same_as` names gives the gradient of the arm's own loss, and of λ where it is learned."""
    run = trainer_run(PARITY[name])
    weights = {weight.name: weight for weight in all_weights()}
    batch, logps, direction = direction_of(weights[same_direction(weights.values())[name]])
    assert torch.cosine_similarity(direction, trained_direction(run), dim=0).item() == pytest.approx(1, abs=1e-5)
    if weights[name].learnable:
        assert lambda_gradient(weights[name], batch, logps) == pytest.approx(run.lambda_grads[0], rel=1e-4)


def direction_of(weight, lam=None, prepared=None):
    """The prepared batch, log π of its tokens, and the weighted gradient as one vector."""
    model, batch = build_model(), prepared_batch(prepared or Prepared())
    logps = token_logps(model, batch)
    values = weight(batch.lengths, logps.detach(), group_advantages(batch.rewards), lam)
    return batch, logps.detach(), weighted_gradient(batch, logps, values, list(model.parameters()))


def trained_direction(run):
    return torch.cat([-run.grads[0][parameter].flatten() for parameter, _ in build_model().named_parameters()])


def held(aggregation: str, side: str, **options) -> dict:
    return {
        "aggregation": aggregation, "lambda_side": side, "lambda_init": 1.5, "lambda_learnable": False, **options
    }  # fmt: skip


SIDED = {
    **{f"{family}, {side}": held(family, side) for family in ("lambda", "power") for side in SIGNED},
    "least log π": held("power", "positive", lambda_features=["min_logp", "length"]),
    "mean log π, each prompt": held("power", "signed", lambda_features=["mean_logp"], aggregation_scope="prompt"),
    "length × TR": held("power", "positive", token_regulation="sigmoid"),
    "right answers 3 times": {"aggregation": "dapo", "positive_weight": 3.0},
    "the same, of TRL's grpo": {"aggregation": None, "loss_type": "grpo", "positive_weight": 3.0},
    "balanced": {"aggregation": "balanced"},
    "balanced, each prompt": {"aggregation": "balanced", "aggregation_scope": "prompt"},
}


@pytest.mark.parametrize("name", SIDED)
def test_the_direction_of_a_weight_with_a_side_is_that_of_its_trainer(name):
    """λ away from 0, where sides and features differ, which no arm begins with."""
    expected = trained_direction(trainer_run(Arm("", SIDED[name])))
    *_, mine = direction_of(make_weight(name, Arm("", SIDED[name])))
    assert torch.cosine_similarity(mine, expected, dim=0).item() == pytest.approx(1, abs=1e-5)
    *_, plain = direction_of(make_weight("dapo", Arm("", {"aggregation": "dapo"})))
    assert torch.cosine_similarity(plain, expected, dim=0).item() < 0.999


@pytest.mark.parametrize("arm", ["signed", "positive3"])
def test_a_settled_weight_is_the_trainers_at_the_lambda_that_its_rule_is_drawn_to(arm):
    weight = next(weight for weight in all_weights() if weight.name == f"{arm}_settled")
    prepared = Prepared()
    drawn = zip(prepared.completions, prepared.rewards, strict=True)
    prepared.rewards = [math.log(len(completion)) + 0.1 * reward for completion, reward in drawn]
    count = len(weight.options["lambda_features"])
    batch, logps, _ = direction_of(weight, torch.zeros(count), prepared)
    lam = settled_lambda(weight, [batch], [logps])
    assert lam.abs().min() > 0.05
    run = watch(build(LambdaGRPOTrainer, config(LambdaGRPOConfig, prepared, **ARMS[arm].options), prepared))
    run.trainer._lambda.tensor.data.copy_(lam / 2)
    run.trainer.train()
    # Log-probabilities come from passes of other shapes, in float32.
    of_trainer = -run.trainer._lambda.rule.gradient(torch.zeros(count, dtype=torch.float64))
    assert lam.tolist() == pytest.approx(of_trainer.tolist(), rel=1e-4)
    *_, mine = direction_of(weight, lam / 2, prepared)
    assert torch.cosine_similarity(mine, trained_direction(run), dim=0).item() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match=f"{arm}_settled is measured at a λ"):
        weight(batch.lengths, logps, group_advantages(batch.rewards))


def test_a_batchs_own_rewards_are_not_in_the_lambda_that_it_is_measured_at():
    weight = next(weight for weight in all_weights() if weight.name == "positive3_settled")
    generator = torch.Generator().manual_seed(0)
    logps = [torch.rand(20, 9, generator=generator).log() for _ in range(3)]
    lengths = [torch.randint(1, 10, (20, 1), generator=generator) for _ in range(3)]
    batches = [
        Batch({}, torch.arange(9) < length, torch.randn(4, 5, generator=generator) + length.view(4, 5))
        for length in lengths
    ]
    before = settled_lambdas(weight, batches, logps)
    flipped = [*batches[:2], replace(batches[2], rewards=-batches[2].rewards)]
    after = settled_lambdas(weight, flipped, logps)
    assert torch.equal(before[2], after[2]) and not torch.equal(before[0], after[0])
    assert before[2].tolist() == settled_lambda(weight, batches[:2], logps[:2]).tolist() and before[2][0] > 0.1


def test_which_arms_coincide():
    same = same_direction(all_weights())
    assert set(ARMS) <= set(same)
    assert {name for name in BASELINES if same[name] != "dapo"} == {"grpo", "sapo"}
    assert {same[name] for name in (*LEARNED, "constant", "signed", "positive", "positive3")} == {"dapo"}
    assert same["positive3_tr"] == "tr" and same["positive3_ar"] == "ar_0.6"
    assert same["sapo"] == same["power_-1"] == "grpo" and same["softmax_tr"] == same["power_tr"] == "tr"
    alone = (
        "grpo",
        "delta_l",
        "power_-1.75",
        "tr",
        "tr_b",
        "tr_inside",
        "ar",
        "ar_0.6",
        "tr_reversed",
        "power_tr_-1",
        "softmax_+2",
        "balanced",
        "positive_weight_3",
        "signed_settled",
        "positive_settled",
        "positive3_settled",
        "positive3_tr_settled",
        "positive3_ar_settled",
    )
    assert [same[name] for name in alone] == list(alone)


def test_the_reversed_weight_decreases_as_the_other_grows():
    weights = {weight.name: weight for weight in all_weights()}
    given = (torch.ones(1, 3).int(), torch.tensor([[0.1], [0.3], [0.9]]).log(), torch.zeros(1, 3))
    assert (weights["tr"](*given) * weights["tr_reversed"](*given)).flatten().tolist() == pytest.approx([1, 1, 1])
    assert weights["tr_reversed"](*given).flatten().tolist() == sorted(weights["tr_reversed"](*given), reverse=True)


def test_a_new_arm_is_picked_up_and_a_learnable_one_gets_its_slope():
    arms = ARMS | {"new": Arm("", {"aggregation": "power", "token_regulation": "linear"})}
    arms["late"] = Arm("", {"aggregation": "lambda", "lambda_init": 1.0})
    weights = {weight.name: weight for weight in all_weights(arms)}
    below, above = slope_sides(weights["new"], weights.values())
    assert (below.name, above.name) == ("new_-0.5", "new_+0.5")
    assert [w.options["lambda_init"] for w in (below, above)] == [-0.5, 0.5]
    assert [w.options["lambda_init"] for w in slope_sides(weights["late"], weights.values())] == [-1, 3]
    assert [w.name for w in slope_sides(weights["softmax_adamw"], weights.values())] == ["softmax_-2", "softmax_+2"]


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"importance_sampling_level": "sequence", "token_regulation": "sigmoid"},
        {"regulation_inside_clip": True, "token_regulation": "sigmoid"},
        {"loss_type": "cispo"},
        {"lambda_side": "positive", "lambda_rule": "target"},
    ],
)
def test_an_option_that_is_not_covered_is_refused(options):
    with pytest.raises(ValueError, match="'odd'"):
        make_weight("odd", Arm("", options))


# ---- Batches ----


def test_log_probabilities_are_those_of_each_row_alone():
    model, batch = build_model(), prepared_batch(Prepared())
    padded = {name: torch.nn.functional.pad(x, (2, 0)) for name, x in batch.inputs.items() if name != "completion_ids"}
    batch = Batch({**batch.inputs, **padded}, batch.mask, batch.rewards)
    logps = token_logps(model, batch)
    for row, completion in enumerate(Prepared().completions):
        ids = batch.inputs["prompt_ids"][row, 2:].tolist() + completion
        alone = model(torch.tensor([ids])).logits[0, -len(completion) - 1 : -1].log_softmax(-1)
        expected = alone.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
        torch.testing.assert_close(logps[row, : len(completion)], expected, rtol=1e-4, atol=1e-5)


def test_own_tokens_end_with_the_end_token():
    completions = torch.tensor([[5, 1, 0, 0], [5, 0, 7, 1], [5, 6, 7, 8], [1, 0, 0, 0]])
    assert own_tokens(completions, 1).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]


@pytest.fixture(scope="module")
def base():
    folder = BASE_MODELS["running_sum"].folder
    return Qwen2ForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_batches_are_samples_of_training_problems(base):
    state = torch.get_rng_state()
    batches = sample_batches(*base, "running_sum", seed=0, count=2)
    assert torch.equal(state, torch.get_rng_state())
    tokenizer, solutions = base[1], {p.prompt: p.solution for p in make_splits("running_sum")["train"]}
    seen = []
    for batch in batches:
        prompts = tokenizer.batch_decode(batch.inputs["prompt_ids"], skip_special_tokens=True)
        texts = tokenizer.batch_decode(batch.inputs["completion_ids"], skip_special_tokens=True)
        assert batch.rewards.flatten().tolist() == exact_answer(texts, [solutions[p] for p in prompts])
        assert batch.rewards.shape == (8, 8) and [prompts[i : i + 8] for i in range(0, 64, 8)] == [
            [p] * 8 for p in prompts[::8]
        ]
        seen += prompts[::8]
    assert len(set(seen)) == 16
    again, other = (sample_batches(*base, "running_sum", seed=seed, count=1)[0] for seed in (0, 1))
    assert not torch.equal(again.inputs["prompt_ids"], other.inputs["prompt_ids"])
    with pytest.raises(ValueError, match="4096"):
        sample_batches(*base, "running_sum", seed=0, count=513)


def test_batches_are_drawn_from_the_policy_itself(base):
    """Σ_t (log π_t + entropy_t) over its own samples is a martingale: of mean 0, for no other temperature or cut."""
    excess, variance = 0.0, 0.0
    for batch in sample_batches(*base, "running_sum", seed=3, count=8):
        inputs, width = batch.inputs, batch.mask.size(1)
        with torch.no_grad():
            logps = (
                base[0](
                    input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                    attention_mask=torch.cat([inputs["prompt_mask"], batch.mask.long()], dim=1),
                )
                .logits[:, -width - 1 : -1]
                .log_softmax(dim=-1)
            )
            taken = token_logps(base[0], batch)[batch.mask]
        entropy = -(logps.exp() * logps).sum(dim=-1)[batch.mask]
        second_moment = (logps.exp() * logps.square()).sum(dim=-1)[batch.mask]
        excess += (taken + entropy).sum().item()
        variance += (second_moment - entropy.square()).sum().item()
    assert abs(excess) < 4 * math.sqrt(variance)


# ---- The study and its file ----


def stub_measure(model, batches, on_batch=lambda: None):
    """Columns of the right names, at once."""
    figures = ("cosine_raw", "ratio_raw", "ratio_raw_se", "cosine_adam", "ratio_adam", "ratio_adam_se")
    draw = random.Random(0)
    return {
        w.name: {"same_as": "", **{f: draw.random() for f in figures}, **dict.fromkeys(RULE_COLUMNS, "")}
        for w in all_weights()
    }


def test_a_killed_study_goes_on_where_it_stopped(monkeypatch, tmp_path, base):
    state = base[0].state_dict()
    trained = []
    monkeypatch.setattr(alignment, "measure", stub_measure)
    monkeypatch.setattr(alignment, "train", lambda task, seed, *a: trained.append(seed) or {1: state, 2: state})
    plan = alignment.Plan(["running_sum"], seeds=2, batches=1, steps=(1, 2), learning_rate=0.12345678)
    path = tmp_path / "alignment.csv"
    assert alignment.study(plan, Ledger(path, alignment.KEY)) == 6
    whole = path.read_text(encoding="utf-8")
    assert trained == [0, 1] and whole.count("\n") == 1 + 6 * len(all_weights())

    assert alignment.study(plan, Ledger(path, alignment.KEY)) == 0
    assert path.read_text(encoding="utf-8") == whole and trained == [0, 1]

    # The base model alone needs no training.
    assert alignment.study(replace(plan, seeds=3, steps=()), Ledger(path, alignment.KEY)) == 1
    assert trained == [0, 1]

    # Killed while the last checkpoint was written, within a line.
    path.write_text(whole[: -len(whole) // 20], encoding="utf-8")
    assert alignment.study(plan, Ledger(path, alignment.KEY)) == 1
    with path.open(encoding="utf-8") as file:
        keys = [tuple(row[name] for name in alignment.KEY) for row in csv.DictReader(file)]
    assert len(keys) == len(set(keys)) == 6 * len(all_weights()) and trained == [0, 1, 1]


def test_the_command_measures_and_draws(monkeypatch, tmp_path):
    path = tmp_path / "alignment.csv"
    monkeypatch.setattr(sys, "argv", ["alignment", "--smoke", "--results", str(path)])
    alignment.main()
    rows = summary_rows(path)
    assert {(row["task"], row["checkpoint"]) for row in rows} == {("running_sum", "base"), ("running_sum", "4")}
    assert len(rows) == 2 * len(all_weights())
    for row in rows:
        assert -1 < row["cosine_raw"] < 1 and -1 < row["cosine_adam"] < 1
        assert (row["slope_adam"] is None) == (row["lambda_gradient"] is None) == (row["weight"] not in LEARNABLE)
        if row["weight"] == "dapo" or row["same_as"] == "dapo":
            assert row["ratio_raw"] == row["ratio_adam"] == 1 and row["ratio_adam_se"] == 0
    ratios = {row["weight"]: row["ratio_adam"] for row in rows if row["checkpoint"] == "4"}
    slopes = {row["weight"]: row["slope_adam"] for row in rows if row["checkpoint"] == "4"}
    assert len({ratio for name, ratio in ratios.items() if name in ("grpo", "sapo", "power_-1")}) == 1
    assert slopes["softmax_adamw"] == pytest.approx((ratios["softmax_+2"] - ratios["softmax_-2"]) / 4, abs=1e-5)
    assert slopes["power_tr"] == pytest.approx(ratios["power_tr_+0.5"] - ratios["power_tr_-0.5"], abs=1e-5)
    assert path.with_suffix(".png").stat().st_size > 10_000


LEARNABLE = {weight.name for weight in all_weights() if weight.learnable}


def test_smoke_figures_never_go_among_the_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alignment", "--smoke"])
    with pytest.raises(SystemExit):
        alignment.main()
    assert "--results" in capsys.readouterr().err


def test_the_pooled_error_is_the_larger_of_within_and_between():
    assert pooled_error([1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1]) == pytest.approx(0.05)
    assert pooled_error([1.0, 2.0, 3.0, 4.0], [0.1, 0.1, 0.1, 0.1]) == pytest.approx(math.sqrt(5 / 3) / 2)
    assert pooled_error([1.0], [0.3]) == pytest.approx(0.3)
