"""`diagnostics.py` against plain loops."""

import math

import pytest
import reference
import torch
from accelerate import Accelerator

from trl_lambda.diagnostics import (
    LossTally,
    clipped_by_weight,
    effective_sample_size,
    mass_by_bin,
    quartile_index,
)


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


def test_tally_is_token_weighted_over_micro_batches_of_unequal_size():
    tally, everything = LossTally(), []
    for tokens in (1, 40):
        generator = torch.Generator().manual_seed(tokens)
        mask = torch.ones(2, tokens)
        mask[1, tokens // 2 :] = 0
        weights = torch.rand(2, tokens, generator=generator) + 1
        mass = torch.rand(2, tokens, generator=generator)
        length_bins = torch.tensor([3, 0])
        tally.add_token_weights(weights, mask)
        tally.add_shares(mass, length_bins, -torch.rand(2, tokens, generator=generator), mask)
        for row in range(2):
            for t in range(tokens):
                if mask[row, t]:
                    everything.append((mass[row, t].item(), length_bins[row].item(), weights[row, t].item()))
    metrics = tally.flush(Accelerator(cpu=True))
    shares = reference.loss_shares([(m, b) for m, b, _ in everything])
    assert [metrics[f"share/length_q{q}"] for q in (1, 2, 3, 4)] == pytest.approx(shares, rel=1e-5)
    assert sum(metrics[f"share/probability_q{q}"] for q in (1, 2, 3, 4)) == pytest.approx(1.0)
    values = [w for _, _, w in everything]
    assert metrics["token_weight/mean"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert metrics["token_weight/min"] == pytest.approx(min(values))
    assert metrics["token_weight/max"] == pytest.approx(max(values))
    assert tally.flush(Accelerator(cpu=True)) == {}


def test_tally_survives_a_batch_without_tokens():
    tally = LossTally()
    tally.add_length_weights(torch.zeros(2, 3))
    tally.add_token_weights(torch.ones(2, 4), torch.zeros(2, 4))
    tally.add_shares(torch.ones(2, 4), torch.zeros(2, dtype=torch.long), torch.zeros(2, 4), torch.zeros(2, 4))
    metrics = tally.flush(Accelerator(cpu=True))
    assert all(math.isnan(v) or v == 0 for v in metrics.values()), metrics
