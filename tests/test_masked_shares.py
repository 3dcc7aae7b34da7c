"""`share/*` counts what the loss counts: a row or token that one of TRL's masks takes out has no part in it."""

import math
from collections import defaultdict
from statistics import fmean

import pytest
import reference
import torch
from support import LENGTHS, off_policy_logps
from test_diagnostics import loop_quarters, loop_quartiles
from test_loss import LAMBDA, lambda_trainer, scored

MASKED_ROWS, THRESHOLD = (1, 6, 11), 0.02


def ratio(mode: str, shape: torch.Size) -> torch.Tensor:
    """The ratio of model to sampler as TRL leaves it in the inputs: exactly 0 where its mask takes something out."""
    generator = torch.Generator().manual_seed(1)
    if mode.startswith("sequence"):
        ratios = torch.rand(shape[0], 1, generator=generator) + 0.5
        if mode == "sequence_mask":
            ratios[list(MASKED_ROWS)] = 0
        return ratios
    ratios = torch.rand(shape, generator=generator) + 0.5
    return ratios.masked_fill(ratios > 1.3, 0) if mode == "token_mask" else ratios


def is_counted(row: int, t: int, *, ratios, loss_type: str, length: int) -> bool:
    """Whether the correction leaves the token in the loss; VESPO takes the product over its row."""
    if ratios.size(1) == 1:
        return ratios[row, 0].item() != 0
    if loss_type == "vespo":
        return all(ratios[row, s].item() != 0 for s in range(length))
    return ratios[row, t].item() != 0


def ties_shared(tokens: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Tokens of equal log-probability (the same prompt's first, drawn twice) lie in one bin and share their mass."""
    masses = defaultdict(list)
    for logp, mass in tokens:
        masses[round(logp, 5)].append(mass)
    return [(logp, fmean(masses[round(logp, 5)])) for logp, _ in tokens]


def shares(trainer, inputs) -> dict[str, list[float]]:
    trainer.compute_loss(trainer.model, inputs)
    trainer.reduce_metrics("train")
    trainer.log({})
    logged = trainer.state.log_history[-1]
    return {kind: [logged[f"share/{kind}_q{q}"] for q in (1, 2, 3, 4)] for kind in ("length", "probability")}


def expected_shares(trainer, inputs, counted) -> dict[str, list[float]]:
    """Shares of Σ f·|A| over the tokens for which `counted(row, t)` holds, in plain loops."""
    lengths = sum(LENGTHS, [])
    weights = sum(reference.length_weights(LENGTHS, LAMBDA, "lambda"), [])
    bins, logps = loop_quartiles(lengths), off_policy_logps(trainer, inputs, 0.0).tolist()
    by_length, by_probability = [], []
    for row, advantage in enumerate(inputs["advantages"].tolist()):
        for t in range(lengths[row]):
            if counted(row, t):
                mass = weights[row] * abs(advantage)
                by_length.append((mass, bins[row]))
                by_probability.append((logps[row][t], mass))
    return {"length": reference.loss_shares(by_length), "probability": loop_quarters(ties_shared(by_probability))}


@pytest.mark.filterwarnings("ignore:loss_type=.* with a learnable")
@pytest.mark.parametrize(
    ("mode", "loss_type"),
    [(mode, "dapo") for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")]
    + [("token_mask", "sapo"), ("token_mask", "vespo"), ("token_truncate", "vespo")],
)
def test_what_the_correction_masks_does_not_count(mode, loss_type):
    trainer = lambda_trainer(lambda_init=LAMBDA, lambda_learnable=False, loss_type=loss_type)
    inputs = scored(trainer)
    trainer.use_vllm = True
    trainer.vllm_importance_sampling_mode = mode
    ratios = inputs["importance_sampling_ratio"] = ratio(mode, inputs["completion_ids"].shape)
    lengths = sum(LENGTHS, [])
    theirs = expected_shares(
        trainer,
        inputs,
        lambda row, t: is_counted(row, t, ratios=ratios, loss_type=loss_type, length=lengths[row]),
    )
    mine = shares(trainer, inputs)
    assert mine["length"] == pytest.approx(theirs["length"], rel=1e-5)
    assert mine["probability"] == pytest.approx(theirs["probability"], rel=1e-5)


def test_the_ratio_is_looked_at_only_where_trl_applies_it():
    trainer = lambda_trainer(lambda_init=LAMBDA, lambda_learnable=False)
    inputs = scored(trainer)
    theirs = expected_shares(trainer, inputs, lambda row, t: True)
    inputs["importance_sampling_ratio"] = ratio(
        "sequence_mask", inputs["completion_ids"].shape
    )  # without vLLM: unread
    assert shares(trainer, inputs)["length"] == pytest.approx(theirs["length"], rel=1e-5)


def test_what_the_off_policy_mask_drops_does_not_count():
    trainer = lambda_trainer(lambda_init=LAMBDA, lambda_learnable=False, off_policy_mask_threshold=THRESHOLD)
    inputs = scored(trainer)
    lengths, advantages = sum(LENGTHS, []), inputs["advantages"].tolist()
    logps = off_policy_logps(trainer, inputs, 0.0)
    old = inputs["old_per_token_logps"]
    divergence = [math.fsum((old - logps)[row, :n].tolist()) / n for row, n in enumerate(lengths)]
    dropped = [a < 0 and kl > THRESHOLD for a, kl in zip(advantages, divergence, strict=True)]
    assert 0 < sum(dropped) < 6
    theirs = expected_shares(trainer, inputs, lambda row, t: not dropped[row])
    assert shares(trainer, inputs)["length"] == pytest.approx(theirs["length"], rel=1e-5)
