"""Turns counted from masks of own tokens, and what is summed by them, against plain loops."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_agents_exact import CONVERSATIONS

from trl_lambda.metrics.turns import (
    TURN_BINS,
    finish_turn_advantages,
    finish_turn_masses,
    turn_advantages,
    turn_bins,
    turn_masses,
)
from trl_lambda.trl_seam.generation_batch import count_turns


def plain_turns(mask: list[int]) -> int:
    return sum(1 for own, _ in itertools.groupby(mask) if own)


@pytest.mark.parametrize(
    ("mask", "turns"),
    [
        ([1, 1, 1], 1),
        ([1, 0, 1], 2),
        ([0, 1, 0], 1),
        ([1, 1, 0, 0, 1, 0, 1, 0], 3),  # padding behind
        ([0, 0, 0], 0),  # masked whole
        ([1], 1),
        ([0], 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_a_turn_is_a_maximal_run_of_own_tokens(mask, turns, dtype):
    own = torch.tensor([mask, [1] * len(mask)], dtype=dtype)
    before = own.clone()
    assert count_turns(own).tolist() == [turns, 1] and torch.equal(own, before)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=9, max_size=9), min_size=1, max_size=6))
def test_turns_equal_plain_loops(masks):
    assert count_turns(torch.tensor(masks)).tolist() == [plain_turns(mask) for mask in masks]


def test_turns_are_those_of_trls_tool_loop():
    """The masks that `test_agents_exact` sees TRL make: a policy's turn is one run, two calls in it or none."""
    width = max(len(mask) for *_, mask in CONVERSATIONS)
    own = torch.tensor([[int(x) for x in mask.ljust(width, "0")] for *_, mask in CONVERSATIONS])
    assert count_turns(own).tolist() == [len(turns) for turns, *_ in CONVERSATIONS] == [3, 1, 2, 3, 2, 1, 2, 3]


def test_an_empty_completion_has_no_turn():
    assert count_turns(torch.zeros(2, 0)).tolist() == [0, 0]


def test_sums_equal_plain_loops_over_micro_batches():
    rng = random.Random(0)
    turns = [rng.randint(0, 6) for _ in range(40)]
    masses = [rng.random() for _ in range(40)]
    advantages = [rng.gauss(0, 1) for _ in range(40)]
    names = ["turns_1", "turns_2", *["turns_3plus"] * 4]
    rows = {name: [i for i, n in enumerate(turns) if n and names[n - 1] == name] for name in TURN_BINS}
    counted = [i for i, n in enumerate(turns) if n]
    total_mass, total_advantage = torch.zeros(3), torch.zeros(3, 2)
    for part in torch.arange(40).split(7):
        chosen = torch.tensor(turns)[part]
        total_mass += turn_masses(torch.tensor(masses)[part], chosen)
        total_advantage += turn_advantages(torch.tensor(advantages)[part], chosen)
    shares = finish_turn_masses(total_mass.tolist())
    means = finish_turn_advantages(total_advantage.flatten().tolist())
    whole = math.fsum(masses[i] for i in counted)
    for name, members in rows.items():
        assert shares[f"share/{name}"] == pytest.approx(math.fsum(masses[i] for i in members) / whole, rel=1e-5)
        mean = math.fsum(advantages[i] for i in members) / len(members)
        assert means[f"advantage/{name}"] == pytest.approx(mean, rel=1e-5)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_groups_keep_their_shape_and_no_gradient_is_kept():
    advantages = torch.tensor([[1.0, -1.0], [2.0, -2.0]], requires_grad=True)
    turns = torch.tensor([[1, 2], [9, 0]])
    sums = turn_advantages(advantages, turns)
    assert sums.tolist() == [[1.0, 1.0], [-1.0, 1.0], [2.0, 1.0]] and not sums.requires_grad
    assert turn_bins(turns).tolist() == [[0, 1], [2, 0]]
    assert not turn_masses(advantages.flatten(), turns.flatten()).requires_grad


def test_what_nothing_was_seen_of_is_not_a_number():
    assert all(math.isnan(share) for share in finish_turn_masses([0.0, 0.0, 0.0]).values())
    means = finish_turn_advantages([0.5, 2.0, 0.0, 0.0, -1.0, 1.0])
    assert means["advantage/turns_1"] == 0.25 and means["advantage/turns_3plus"] == -1.0
    assert math.isnan(means["advantage/turns_2"])
