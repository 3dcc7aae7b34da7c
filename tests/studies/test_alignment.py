"""The alignment of weighted gradients: its estimator by hand, its weights against TRL's losses, its file."""

import csv
import math
import random
import sys
from statistics import fmean, stdev

import pytest
import torch
from harness import Batch as Prepared
from harness import build, build_model, build_tokenizer, config, prompt, train, watch
from transformers import AutoTokenizer, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from recipes.playground.make_base_model import BASE_MODELS
from recipes.studies.alignment import policy_gradient as pg
from recipes.studies.alignment import study as alignment
from recipes.studies.alignment.batches import own_tokens, token_logps
from recipes.studies.alignment.measure import RULE_COLUMNS
from recipes.studies.alignment.settled import settled_lambda
from recipes.studies.alignment.summary import pooled_error, summary_rows
from recipes.studies.alignment.weights import (
    CONTROLS,
    STEPPING,
    all_weights,
    lambda_gradient,
    make_weight,
    same_direction,
)
from recipes.studies.shared.arms import ARMS, BASELINES, LEARNED, Arm
from recipes.studies.shared.ledger import Ledger
from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

# A bandit of two steps: context → first action; action 0 ends, any other → second action, then the end.
CONTEXTS, FIRST, SECOND = 2, 3, 3
PROMPTS, GROUP = 5, 4


class Bandit:
    """Softmax policies θ (context, first action) and φ (first action, second action), rewards in a table."""

    def __init__(self):
        draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
        self.theta = torch.randn(CONTEXTS, FIRST, **draw).requires_grad_()
        self.phi = torch.randn(FIRST, SECOND, **draw).requires_grad_()
        self.table = torch.rand(CONTEXTS, FIRST, SECOND, **draw)
        self.parameters = [self.theta, self.phi]

    @torch.no_grad()
    def sample(self, seed: int) -> pg.Batch:
        generator = torch.Generator().manual_seed(seed)
        context = torch.randint(CONTEXTS, (PROMPTS,), generator=generator).repeat_interleave(GROUP)
        first = torch.multinomial(self.theta.softmax(1)[context], 1, generator=generator).squeeze(1)
        second = torch.multinomial(self.phi.softmax(1)[first], 1, generator=generator).squeeze(1)
        mask = torch.stack([torch.ones_like(first), first != 0], dim=1).bool()
        rewards = self.table[context, first, second.masked_fill(first == 0, 0)]
        return pg.Batch({"context": context, "first": first, "second": second}, mask, rewards.view(PROMPTS, GROUP))

    def logps(self, batch: pg.Batch) -> torch.Tensor:
        context, first, second = batch.inputs.values()
        return torch.stack([self.theta.log_softmax(1)[context, first], self.phi.log_softmax(1)[first, second]], dim=1)

    def score_sum(self, batch: pg.Batch, coefficients: list[list[float]]) -> torch.Tensor:
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


def two_weights(batch: pg.Batch, logps: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.ones_like(logps), logps.exp() / batch.mask.sum(1, keepdim=True)])


def test_gradients_of_a_batch_are_the_sums_over_its_tokens():
    bandit = Bandit()
    batch = bandit.sample(1)
    logps = bandit.logps(batch)
    weights = two_weights(batch, logps.detach())[1]
    standardised, left_out = [], []
    for group in batch.rewards.tolist():
        standardised += [(reward - fmean(group)) / (stdev(group) + 1e-4) for reward in group]
        left_out += [reward - fmean(group[:i] + group[i + 1 :]) for i, reward in enumerate(group)]
    tokens = int(batch.mask.sum())
    coefficients = [[a * w / tokens for w in row] for a, row in zip(standardised, weights.tolist(), strict=True)]
    gradient = pg.weighted_gradient(batch, logps, weights, bandit.parameters)
    torch.testing.assert_close(gradient, bandit.score_sum(batch, coefficients), rtol=1e-10, atol=1e-12)
    by_rows = bandit.score_sum(batch, [[a / (PROMPTS * GROUP)] * 2 for a in left_out])
    torch.testing.assert_close(pg.truth_term(batch, logps, bandit.parameters), by_rows, rtol=1e-10, atol=1e-12)


def test_inner_products_are_those_of_the_gradients_in_both_metrics():
    bandit = Bandit()
    batches, ticks, gradients, truths = [bandit.sample(seed) for seed in range(4)], [], [], []
    products = pg.inner_products(batches, bandit.logps, two_weights, bandit.parameters, lambda: ticks.append(1))
    for batch in batches:
        logps = bandit.logps(batch)
        pair = two_weights(batch, logps.detach())
        gradients.append(torch.stack([pg.weighted_gradient(batch, logps, w, bandit.parameters) for w in pair]))
        truths.append(pg.truth_term(batch, logps, bandit.parameters))
    gradients, truths = torch.stack(gradients, dim=1), torch.stack(truths)
    moment = gradients[0].square().mean(dim=0)
    for metric, scale in {"raw": torch.ones_like(moment), "adam": 1 / (moment.sqrt() + 1e-8)}.items():
        expected = products_of(gradients * scale.sqrt(), truths * scale.sqrt())
        torch.testing.assert_close(vars(products[metric]), vars(expected), rtol=1e-10, atol=1e-12)
    assert len(ticks) == 8


def products_of(gradients: torch.Tensor, truths: torch.Tensor) -> pg.Products:
    return pg.Products(torch.einsum("wkd,jd->wkj", gradients, truths), gradients.norm(dim=2), truths @ truths.T)


def test_cosines_leave_their_own_batch_out():
    x, y = torch.eye(2).double()
    truths = torch.stack([x, x, y])
    gradients = torch.stack([torch.stack([x, y, x]), torch.stack([2 * y, 3 * x, torch.zeros(2)])]).double()
    half = math.sqrt(0.5)
    # T_0 = T_1 = x + y, T_2 = 2x; a gradient of zero has cosine 0.
    expected = torch.tensor([[half, half, 1.0], [half, half, 0.0]]).double()
    torch.testing.assert_close(pg.cosines(products_of(gradients, truths)), expected)
    ratios = pg.cosine_ratios(products_of(gradients, truths))
    assert ratios.tolist() == pytest.approx([1, 2 * half / (2 * half + 1)])


def test_the_jackknife_leaves_each_batch_out_of_everything():
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    shared, own = torch.randn(7, 50, **draw), torch.randn(3, 7, 50, **draw)
    (gradients, truths), deleted = (shared + own + 0.5, shared + 0.5), []
    for k in range(7):
        kept = [j for j in range(7) if j != k]
        references = {i: sum(truths[j] for j in kept if j != i) for i in kept}
        cosines = [[torch.cosine_similarity(g[i], references[i], dim=0).item() for i in kept] for g in gradients]
        deleted.append([fmean(of_weight) / fmean(cosines[0]) for of_weight in cosines])
    deleted = torch.tensor(deleted, dtype=torch.float64)
    torch.testing.assert_close(pg.without_each(products_of(gradients, truths), pg.cosine_ratios), deleted)
    expected = (6 / 7 * (deleted - deleted.mean(dim=0)).square().sum(dim=0)).sqrt()
    torch.testing.assert_close(pg.jackknife_error(deleted), expected)
    assert pooled_error([1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1]) == pytest.approx(0.05)
    assert pooled_error([1.0, 2.0, 3.0, 4.0], [0.1, 0.1, 0.1, 0.1]) == pytest.approx(math.sqrt(5 / 3) / 2)


def prepared_batch(prepared: Prepared) -> pg.Batch:
    """The completions that `support` trains on, as the estimator takes them."""
    group = prepared.num_generations
    texts = [prompt(row // group) for row in range(len(prepared.completions))]
    prompts = build_tokenizer()(texts, return_tensors="pt", padding=True)
    width = max(map(len, prepared.completions))
    completions = torch.tensor([c + [0] * (width - len(c)) for c in prepared.completions])
    inputs = {"prompt_ids": prompts["input_ids"], "prompt_mask": prompts["attention_mask"]}
    rewards = torch.tensor(prepared.rewards).view(-1, group)
    return pg.Batch(inputs | {"completion_ids": completions}, own_tokens(completions, 1), rewards)


def trained(arm: Arm):
    pair = (GRPOTrainer, GRPOConfig) if arm.trl else (LambdaGRPOTrainer, LambdaGRPOConfig)
    return train(*pair, Prepared(), **arm.options)


def direction_of_run(run) -> torch.Tensor:
    return torch.cat([-run.grads[0][parameter].flatten() for parameter, _ in build_model().named_parameters()])


def direction_of(weight, lam=None, prepared=None):
    """The prepared batch, log π of its tokens, and the weighted gradient as one vector."""
    model, batch = build_model(), prepared_batch(prepared or Prepared())
    logps = token_logps(model, batch)
    values = weight(batch.lengths, logps.detach(), pg.group_advantages(batch.rewards), lam)
    return batch, logps.detach(), pg.weighted_gradient(batch, logps, values.to(logps), list(model.parameters()))


def assert_parallel(mine: torch.Tensor, run) -> None:
    """float32 gradients of one step; 1e-5 in the cosine is an angle of 0.0045."""
    assert torch.cosine_similarity(mine, direction_of_run(run), dim=0).item() == pytest.approx(1, abs=1e-5)


# Without those that differ from an earlier one in how λ is stepped only.
PARITY = {}
for name, arm in {**ARMS, **CONTROLS}.items():
    options = sorted(f"{key}={value}" for key, value in arm.options.items() if key not in STEPPING)
    if not arm.removed and (arm.trl, options) not in [seen for _, seen in PARITY.values()]:
        PARITY[name] = (arm, (arm.trl, options))


@pytest.mark.parametrize("name", PARITY)
def test_the_direction_of_every_arm_is_that_of_its_trainer(name):
    run = trained(PARITY[name][0])
    weights = {weight.name: weight for weight in all_weights()}
    batch, logps, direction = direction_of(weights[same_direction(weights.values())[name]])
    assert_parallel(direction, run)
    if weights[name].learnable:
        assert lambda_gradient(weights[name], batch, logps) == pytest.approx(run.lambda_grads[0], rel=1e-4)


@pytest.mark.parametrize("arm", ["signed", "positive3"])
def test_a_settled_weight_is_the_trainers_at_the_lambda_that_it_is_drawn_to(arm):
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
    of_trainer = -run.trainer._lambda.learning.gradient(torch.zeros(count, dtype=torch.float64))
    # Log-probabilities come from passes of other shapes, in float32.
    assert lam.tolist() == pytest.approx(of_trainer.tolist(), rel=1e-4)
    assert_parallel(direction_of(weight, lam / 2, prepared)[2], run)
    with pytest.raises(ValueError, match=f"{arm}_settled is measured at a λ"):
        weight(batch.lengths, logps, pg.group_advantages(batch.rewards))


def test_which_arms_coincide():
    same = same_direction(all_weights())
    assert {name for name, arm in ARMS.items() if not arm.removed} == set(ARMS) & set(same)
    assert {name for name in BASELINES if same[name] != "dapo"} == {"grpo", "sapo"}
    plain = (*set(LEARNED) & set(same), "constant", "signed", "positive", "positive3")
    assert {same[name] for name in plain} == {"dapo"} and same["positive3_tr"] == same["power_tr"] == "tr"
    assert all(same[name] == name for name in ("grpo", "tr_b", "tr_reversed", "balanced", "signed_settled"))
    weights = {weight.name: weight for weight in all_weights()}
    given = (torch.ones(1, 3).int(), torch.tensor([[0.1], [0.3], [0.9]]).log(), torch.zeros(1, 3))
    assert (weights["tr"](*given) * weights["tr_reversed"](*given)).flatten().tolist() == pytest.approx([1, 1, 1])


def test_an_option_that_is_not_covered_is_refused():
    inside = {"token_weight_inside_clip": True, "token_weight": "tr_grpo"}
    sequence = {"importance_sampling_level": "sequence", "token_weight": "tr_grpo"}
    for options in ({"beta": 0.1}, sequence, inside, {"loss_type": "cispo"}, {"length_target": 20.0}):
        with pytest.raises(ValueError, match="'odd'"):
            make_weight("odd", Arm("", options))


@pytest.fixture(scope="module")
def base():
    folder = BASE_MODELS["running_sum"].folder
    return Qwen2ForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def stub_measure(model, batches, on_batch=lambda: None):
    figures = ("cosine_raw", "ratio_raw", "ratio_raw_se", "cosine_adam", "ratio_adam", "ratio_adam_se")
    draw = random.Random(0)
    empty = {"same_as": "", **dict.fromkeys(RULE_COLUMNS, "")}
    return {w.name: empty | {f: draw.random() for f in figures} for w in all_weights()}


def test_a_killed_study_goes_on_where_it_stopped(monkeypatch, tmp_path, base):
    state, trained = base[0].state_dict(), []
    monkeypatch.setattr(alignment, "measure", stub_measure)
    monkeypatch.setattr(alignment, "train", lambda task, seed, *a: trained.append(seed) or {1: state, 2: state})
    plan = alignment.Plan(["running_sum"], seeds=2, batches=1, steps=(1, 2), learning_rate=0.12345678)
    path, rows = tmp_path / "alignment.csv", len(all_weights())
    assert alignment.study(plan, Ledger(path, alignment.KEY)) == 6
    whole = path.read_text(encoding="utf-8")
    assert trained == [0, 1] and whole.count("\n") == 1 + 6 * rows
    # Killed while the last checkpoint was written, within a line.
    path.write_text(whole[: -len(whole) // 20], encoding="utf-8")
    assert alignment.study(plan, Ledger(path, alignment.KEY)) == 1
    with path.open(encoding="utf-8") as file:
        keys = [tuple(row[name] for name in alignment.KEY) for row in csv.DictReader(file)]
    assert len(keys) == len(set(keys)) == 6 * rows and trained == [0, 1, 1]


def test_the_command_measures_and_draws(monkeypatch, tmp_path):
    path, learnable = tmp_path / "alignment.csv", {weight.name for weight in all_weights() if weight.learnable}
    monkeypatch.setattr(sys, "argv", ["alignment", "--smoke", "--results", str(path)])
    alignment.main()
    rows = summary_rows(path)
    assert {(row["task"], row["checkpoint"]) for row in rows} == {("running_sum", "base"), ("running_sum", "4")}
    assert len(rows) == 2 * len(all_weights())
    for row in rows:
        assert -1 < row["cosine_raw"] < 1 and -1 < row["cosine_adam"] < 1
        assert (row["slope_adam"] is None) == (row["lambda_gradient"] is None) == (row["weight"] not in learnable)
        if "dapo" in (row["weight"], row["same_as"]):
            assert row["ratio_raw"] == row["ratio_adam"] == 1 and row["ratio_adam_se"] == 0
    last = {row["weight"]: row for row in rows if row["checkpoint"] == "4"}
    ratios = {name: row["ratio_adam"] for name, row in last.items()}
    slope = (ratios["softmax_+2"] - ratios["softmax_-2"]) / 4
    assert ratios["grpo"] == ratios["sapo"] and last["softmax_fast"]["slope_adam"] == pytest.approx(slope, abs=1e-5)
    assert path.with_suffix(".png").stat().st_size > 10_000
