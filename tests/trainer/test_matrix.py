"""A part of the equivalence matrix (`make matrix` runs all of it), one and two processes."""

import pytest
from matrix import TOLERANCE, arms, run_matrix, table, worst


@pytest.fixture(scope="module")
def reduced():
    return run_matrix(reduced=True)


def test_every_cut_gives_the_same_step(reduced):
    deviations, _ = reduced
    largest, where = worst(deviations)
    assert largest < TOLERANCE, where
    assert any(cut.startswith("2 processes") for _, cut in deviations)
    assert {"loss", "gradient", "dL/dλ", "λ"} <= {q for quantities in deviations.values() for q in quantities}


def test_the_comparison_sees_a_loss_that_is_not_invariant(reduced):
    """TRL's bnpo, a mean of micro-batch means, is far outside the tolerance: the matrix can fail."""
    deviations, _ = reduced
    assert min(d["gradient"] for (name, _), d in deviations.items() if name.startswith("TRL bnpo")) > 1e-2


def test_the_full_matrix_has_every_f_with_every_v_and_surrogate():
    names = arms()
    assert len([n for n in names if not n.startswith("TRL")]) == 15 * (3 * 4 + 1)


def test_table(reduced):
    text = table(*reduced)
    assert text.startswith("| f |") and "| lambda_grpo |" in text and "| TRL bnpo |" in text
