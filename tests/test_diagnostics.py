"""`diagnostics.py` against plain loops."""

import math

import pytest
import reference
import torch
from accelerate import Accelerator
from launch import launch
from support import Batch
from worker import run_job

from trl_lambda.metrics.diagnostics import (
    advantage_length_sums,
    clipped_by_weight,
    clipped_tokens,
    effective_sample_size,
    mass_by_bin,
    probability_bins,
    quartile_index,
    quartile_shares,
)
from trl_lambda.metrics.loss_tally import LossTally


def loop_quartiles(values: list[float]) -> list[int]:
    ordered = sorted(values)
    edges = [ordered[math.ceil(len(values) * q / 4) - 1] for q in (1, 2, 3)]
    return [sum(v > edge for edge in edges) for v in values]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 97])
def test_quartiles_of_the_masked_values_only(count):
    generator = torch.Generator().manual_seed(count)
    values = torch.randint(0, 12, (count,), generator=generator).float()  # with ties
    padded = torch.cat([values, torch.tensor([-99.0, 99.0])])
    mask = torch.cat([torch.ones(count), torch.zeros(2)])
    assert quartile_index(padded, mask)[:count].tolist() == loop_quartiles(values.tolist())


def test_distinct_values_fill_the_quartiles_evenly():
    bins = quartile_index(torch.randperm(40).float().view(5, 8), torch.ones(5, 8))
    assert bins.flatten().bincount().tolist() == [10, 10, 10, 10]


def test_effective_sample_size():
    weights = torch.tensor([[1.0, 1.0, 1.0, 0.0], [2.0, 0.0, 1e-9, 0.0], [0.0, 0.0, 0.0, 0.0]])
    ess = effective_sample_size(weights)
    assert ess[0].item() == pytest.approx(1.0)
    assert ess[1].item() == pytest.approx(0.5)  # one of the two rows with tokens carries everything
    assert ess[2].isnan()


def test_mass_by_bin():
    mass, bins = torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[0, 3], [3, 1]])
    assert mass_by_bin(mass, bins).tolist() == [1.0, 8.0, 0.0, 6.0]


def test_clipped_by_weight_only_counts_what_the_ratio_alone_would_not_clip():
    log_ratio = torch.tensor([[1.0, 1.0, 1.3, 0.7, 1.1]]).log()
    weights = torch.tensor([[1.4, 1.1, 1.4, 1.0, 0.7]])
    positive = clipped_by_weight(log_ratio, weights, torch.tensor([[1.0]]), 0.2, 0.2)
    assert positive.tolist() == [[True, False, False, False, False]]
    negative = clipped_by_weight(log_ratio, weights, torch.tensor([[-1.0]]), 0.2, 0.2)
    assert negative.tolist() == [[False, False, False, False, True]]


def test_clipped_by_weight_knows_two_sided_clipping():
    arguments = torch.zeros(1, 1), torch.tensor([[1.4]]), torch.tensor([[-1.0]]), 0.2, 0.2
    assert not clipped_by_weight(*arguments).item() and clipped_by_weight(*arguments, delta=1.25).item()


# ---- The signal λ follows ----

LENGTHS_AND_ADVANTAGES = [
    ([3, 1, 12, 6], [0.5, -1.5, 1.0, 0.0]),
    ([2, 0, 9, 5], [1.0, 7.0, -1.0, 0.0]),  # the row without tokens has no part, whatever its advantage
    ([7, 4, 1, 11], [7e-5, 7e-5, 7e-5, 7e-5]),  # equal rewards: rounding, not a signal
    ([4, 4, 4, 4], [1.0, -1.0, 0.5, -0.5]),
    ([0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0]),
]


def loop_signal(groups):
    """Correlation of advantage and length within groups, pooled, and mean length by sign of A."""
    products, lengths_of = [], {1: [], -1: []}
    for lengths, advantages in groups:
        rows = [(n, a) for n, a in zip(lengths, advantages, strict=True) if n > 0]
        if len({round(a, 6) for _, a in rows}) < 2:
            continue
        mean_n = sum(n for n, _ in rows) / len(rows)
        mean_a = sum(a for _, a in rows) / len(rows)
        products += [(a - mean_a, n - mean_n) for n, a in rows]
        for n, a in rows:
            if a:
                lengths_of[1 if a > 0 else -1].append(n)
    covariance = sum(a * n for a, n in products)
    correlation = covariance / math.sqrt(sum(a * a for a, _ in products) * sum(n * n for _, n in products))
    return correlation, [sum(lengths_of[sign]) / len(lengths_of[sign]) for sign in (1, -1)]


def test_correlation_and_length_by_sign_of_advantage():
    lengths, advantages = (torch.tensor(values) for values in zip(*LENGTHS_AND_ADVANTAGES, strict=True))
    (product, a_square, n_square), by_sign = advantage_length_sums(lengths, advantages)
    correlation, means = loop_signal(LENGTHS_AND_ADVANTAGES)
    assert (product / (a_square * n_square).sqrt()).item() == pytest.approx(correlation, rel=1e-5)
    assert (by_sign[:, 0] / by_sign[:, 1]).tolist() == pytest.approx(means)


def test_the_signal_is_pooled_over_generation_batches_and_undefined_without_one():
    tally, accelerator = LossTally(), Accelerator(cpu=True)
    for group in LENGTHS_AND_ADVANTAGES:
        tally.add_responses(*(torch.tensor([values]) for values in group))
    metrics = tally.flush(accelerator)
    correlation, means = loop_signal(LENGTHS_AND_ADVANTAGES)
    assert metrics["advantage/length_correlation"] == pytest.approx(correlation, rel=1e-5)
    signs = [metrics[f"advantage/{sign}_mean_length"] for sign in ("positive", "negative")]
    assert signs == pytest.approx(means)
    tally.add_responses(torch.tensor([[3, 4]]), torch.tensor([[1.0, 1.0]]))
    assert all(math.isnan(value) for value in tally.flush(accelerator).values())


# ---- Clipping ----


@pytest.mark.parametrize("delta", [None, 1.1, 1.2, 3.0])
def test_a_token_is_clipped_where_autograd_gives_the_ratio_no_gradient(delta):
    ratio = torch.linspace(0.5, 4.0, 71, dtype=torch.float64).repeat(3, 1).requires_grad_()
    advantages = torch.tensor([[1.5], [-0.5], [0.0]], dtype=torch.float64)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    torch.min(bounded * advantages, ratio.clamp(0.8, 1.28) * advantages).sum().backward()
    expected = (ratio.grad == 0) & (advantages != 0)
    assert expected[:2].any(dim=1).all() and not expected[:2].all(dim=1).any()
    assert clipped_tokens(ratio, advantages, 0.2, 0.28, delta).tolist() == expected.tolist()


def test_clipped_parts_are_of_the_own_tokens_with_that_sign():
    tally = LossTally()
    clipped = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    tally.add_clipped(clipped, torch.tensor([[0.5], [-0.5], [0.0]]), mask)
    metrics = tally.flush(Accelerator(cpu=True))
    assert metrics == {
        "clipped/advantage_positive": pytest.approx(2 / 3),
        "clipped/advantage_negative": pytest.approx(1 / 4),
    }


# ---- Shares ----


def test_shares_of_a_histogram_split_the_bin_on_an_edge():
    # Six values of mass 1, two of mass 5, in two bins: quarters of two values each.
    assert quartile_shares([6.0, 2.0], [6.0, 10.0]) == pytest.approx([2 / 16, 2 / 16, 2 / 16, 10 / 16])
    assert quartile_shares([0.0, 8.0, 0.0], [0.0, 4.0, 0.0]) == pytest.approx([0.25] * 4)
    assert all(math.isnan(share) for share in quartile_shares([0.0], [0.0]) + quartile_shares([4.0], [0.0]))


def test_probability_bins_are_ordered_and_fine():
    surprise = torch.cat([torch.tensor([0.0]), torch.logspace(-6, 1.5, 300)])
    bins = probability_bins(-surprise)
    assert (bins.diff() >= 0).all() and bins[0] == 0 and bins[-1] > 2000 and len(bins.unique()) == 300
    extremes = probability_bins(torch.tensor([0.01, -1e4, -torch.inf, torch.nan]))
    assert ((extremes >= 0) & (extremes < 2048)).all()
    assert probability_bins(torch.tensor([-1.0])) != probability_bins(torch.tensor([-1.01]))


# ---- The tally ----


def loop_quarters(tokens: list[tuple[float, float]]) -> list[float]:
    """Part of all mass in each quarter of (log-probability, mass) pairs; a token on an edge counts in proportion."""
    quarter, parts = len(tokens) / 4, []
    for place, (_, mass) in enumerate(sorted(tokens)):
        for q in range(4):
            inside = max(0.0, min(place + 1, (q + 1) * quarter) - max(place, q * quarter))
            parts.append((mass * inside, q))
    return reference.loss_shares(parts)


def test_tally_is_token_weighted_over_micro_batches_of_unequal_size():
    tally, everything, probable, of_sign = LossTally(), [], [], ([], [])
    spread = torch.logspace(-5, 0.5, 82)[torch.randperm(82, generator=torch.Generator().manual_seed(0))]
    for tokens in (1, 40):
        generator = torch.Generator().manual_seed(tokens)
        mask = torch.ones(2, tokens)
        mask[1, tokens // 2 :] = 0
        weights = torch.rand(2, tokens, generator=generator) + 1
        mass = torch.rand(2, tokens, generator=generator)
        length_bins = torch.tensor([3, 0])
        weights = weights.clamp(1.25, 1.5)
        clipped = torch.rand(2, tokens, generator=generator) < 0.3
        advantages = torch.tensor([[1.0], [-2.0]])
        logps = -spread[sum(map(len, of_sign)) :][: 2 * tokens].view(2, tokens)
        tally.add_token_weights(weights, mask, (1.25, 1.5))
        tally.add_clipped(clipped, advantages, mask)
        tally.add_shares(mass, length_bins, logps, mask)
        for row in range(2):
            for t in range(tokens):
                if mask[row, t]:
                    everything.append((mass[row, t].item(), length_bins[row].item(), weights[row, t].item()))
                    probable.append((logps[row, t].item(), mass[row, t].item()))
                    of_sign[row].append(clipped[row, t].item())
    metrics = tally.flush(Accelerator(cpu=True))
    shares = reference.loss_shares([(m, b) for m, b, _ in everything])
    assert [metrics[f"share/length_q{q}"] for q in (1, 2, 3, 4)] == pytest.approx(shares, rel=1e-5)
    shares = [metrics[f"share/probability_q{q}"] for q in (1, 2, 3, 4)]
    assert shares == pytest.approx(loop_quarters(probable), rel=1e-4)  # here no edge has a neighbour in its bin
    for row, sign in enumerate(("positive", "negative")):
        assert metrics[f"clipped/advantage_{sign}"] == pytest.approx(sum(of_sign[row]) / len(of_sign[row]))
    values = [w for _, _, w in everything]
    assert metrics["token_weight/mean"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert metrics["token_weight/min"] == pytest.approx(min(values))
    assert metrics["token_weight/max"] == pytest.approx(max(values))
    assert metrics["token_weight/at_min"] == pytest.approx(sum(w == 1.25 for w in values) / len(values))
    assert metrics["token_weight/at_max"] == pytest.approx(sum(w == 1.5 for w in values) / len(values))
    assert 0.1 < metrics["token_weight/at_min"] < 0.4 < metrics["token_weight/at_max"] < 0.7
    assert tally.flush(Accelerator(cpu=True)) == {}


def test_tally_survives_a_batch_without_tokens():
    tally = LossTally()
    tally.add_length_weights(torch.zeros(2, 3))
    tally.add_token_weights(torch.ones(2, 4), torch.zeros(2, 4))
    tally.add_shares(torch.ones(2, 4), torch.zeros(2, dtype=torch.long), torch.zeros(2, 4), torch.zeros(2, 4))
    metrics = tally.flush(Accelerator(cpu=True))
    assert all(math.isnan(v) or v == 0 for v in metrics.values()), metrics


# ---- In the trainer: however the rows are cut ----

PREFIXES = ("advantage/", "clipped/", "length_weight/", "share/", "token_weight/")
ON = {"lambda_init": 0.7, "token_regulation": "sigmoid", "logging_steps": 1}
CUTS = {
    "whole": {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1},
    "accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    "two processes": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1},
    "two processes, accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
}


def job(cut: str, **options) -> dict:
    return {"trainer": "lambda", "noise": 0.3, "options": {**ON, **CUTS[cut], **options}}


def ours(history: list[dict]) -> dict[str, float]:
    return {name: value for name, value in history[0].items() if name.startswith(PREFIXES)}


def test_metrics_do_not_depend_on_how_the_rows_are_cut(tmp_path):
    plain = {}, {"seed": 0}
    # Another weight and other completions: the smallest v is on the first process, the largest on the second.
    linear = {"token_regulation": "linear", "regulation_alpha": 0.6}, {"seed": 2}
    jobs = {
        (cut, number): job(cut, **options) | {"batch": batch}
        for number, (options, batch) in enumerate((plain, linear))
        for cut in CUTS
    }
    ranks = {key: value for key, value in jobs.items() if "processes" in key[0]}
    split = [ours(result[0]["history"]) for result in launch(list(ranks.values()), tmp_path, processes=2)]
    for number, metrics in ((0, 3 + 2 + 3 + 8 + 5 + 4), (1, 3 + 2 + 3 + 8 + 3 + 4)):
        whole, accumulated = (ours(run_job(jobs[cut, number])["history"]) for cut in ("whole", "accumulated"))
        assert len(whole) == metrics
        assert 0.05 < whole["clipped/advantage_positive"] < 0.95 and 0.05 < whole["clipped/advantage_negative"] < 0.95
        assert abs(whole["advantage/length_correlation"]) > 0.1
        for other in (accumulated, *split[2 * number : 2 * number + 2]):
            assert other == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in whole.items()}


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clipped_parts_are_those_that_trl_clips(level):
    """TRL counts over all tokens, or all sequences, we over those of one sign of A."""
    log = run_job(job("whole", importance_sampling_level=level))["history"][0]
    batch = Batch()
    rewards = torch.tensor(batch.rewards).view(3, 4)
    positive = (rewards > rewards.mean(dim=1, keepdim=True)).flatten().tolist()
    lengths = [len(completion) for completion in batch.completions]
    for sign, of_sign, trl in (("positive", True, "high"), ("negative", False, "low")):
        if level == "token":
            part = sum(n for n, p in zip(lengths, positive, strict=True) if p is of_sign) / sum(lengths)
            assert log[f"clipped/advantage_{sign}"] * part == pytest.approx(log[f"clip_ratio/{trl}_mean"], rel=1e-5)
        assert (log[f"clipped/advantage_{sign}"] > 0) == (log[f"clip_ratio/{trl}_mean"] > 0)


def test_inside_the_clip_the_weight_is_in_the_ratio():
    small = {"noise": 0.05}  # ratios within the clip until v = 1.4 is in them
    log = run_job(job("whole", regulation_inside_clip=True) | small)["history"][0]
    free = run_job(job("whole") | small)["history"][0]
    assert log["clipped/advantage_positive"] > 0 == free["clipped/advantage_positive"]
    assert log["clipped/advantage_negative"] == 0 < log["token_weight/clipped_by_regulation"]


def test_surrogates_without_a_clip_and_weights_without_bounds_log_neither():
    log = run_job(job("whole", loss_type="sapo", token_regulation="linear"))["history"][0]
    assert not any(name.startswith("clipped/") or "/at_m" in name for name in log) and "token_weight/mean" in log


def test_token_metrics_can_be_left_out():
    log = run_job(job("whole", token_metrics=False))["history"][0]
    logged = {name.split("/")[0] for name in log if name.startswith(PREFIXES)}
    assert logged == {"advantage", "length_weight"} and "lambda/value" in log


def test_evaluation_logs_them_too():
    history = run_job(job("whole", eval_strategy="steps", eval_steps=1) | {"eval": True})["history"]
    log = next(entry for entry in history if "eval_reward" in entry)
    assert {
        "eval_advantage/length_correlation",
        "eval_clipped/advantage_positive",
        "eval_share/length_q1",
    } <= log.keys()
