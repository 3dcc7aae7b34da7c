"""A part of the equivalence matrix (`make matrix` runs all of it), one and two processes."""

from matrix import TOLERANCE, arms, run_matrix, table, worst


def test_every_cut_gives_the_same_step():
    deviations, trainings = run_matrix(reduced=True)
    largest, where = worst(deviations)
    assert largest < TOLERANCE, where
    assert any(cut.startswith("2 processes") for _, cut in deviations)
    assert {"loss", "gradient", "dL/dλ", "λ"} <= {q for quantities in deviations.values() for q in quantities}
    # The matrix can fail: TRL's bnpo is a mean of micro-batch means.
    assert min(d["gradient"] for (name, _), d in deviations.items() if name.startswith("TRL bnpo")) > 1e-2
    text = table(deviations, trainings)
    assert text.startswith("| f |") and "| lambda_grpo |" in text and "| TRL bnpo |" in text


def test_the_full_matrix_has_every_f_with_every_v_and_surrogate():
    assert len([n for n in arms() if not n.startswith("TRL")]) == 15 * (3 * 4 + 1)
