"""Every metric of the weights against plain loops, however the batch is cut, and the warning about a dead run."""

import math
import warnings

import pytest
import reference
import torch
from accelerate import Accelerator
from harness import Batch, build, build_model, config, train
from launch import launch
from worker import run_job

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer
from trl_lambda.generation_batch import GenerationBatch
from trl_lambda.metrics.loss_metrics import BATCHES, LossMetrics, lambda_metrics, quartile_shares

double = torch.float64


def has_signal(group, present):
    """Whether advantages differ by more than rounding."""
    known = [a for a, p in zip(group, present, strict=True) if p]
    mean = sum(known) / max(len(known), 1)
    return any(abs(a - mean) > 1e-5 * max(map(abs, known)) for a in known)


class Loops:
    def __init__(self):
        self.pairs, self.tied, self.f, self.masses, self.tokens = [], [], [], [], []
        self.lengths, self.losses = {"positive": [], "negative": []}, 0

    def generation_batch(self, lengths, advantages, rewards):
        for group, of_group, known in zip(lengths, advantages, rewards, strict=True):
            self.tied.append(not reference.has_signal(known))
            rows = [(n, a) for n, a in zip(group, of_group, strict=True) if n]
            if has_signal(of_group, group):
                means = [mean(column) for column in zip(*rows, strict=True)]
                self.pairs += [(n - means[0], a - means[1]) for n, a in rows]
                for n, a in rows:
                    self.lengths["positive" if a > 0 else "negative"] += [n] * bool(a)

    def loss(self, lengths, advantages, f):
        self.losses += 1
        tokens = sum(map(sum, lengths))
        for group, of_group, weights in zip(lengths, advantages, f, strict=True):
            rows = [(n, a, w) for n, a, w in zip(group, of_group, weights, strict=True) if n]
            self.f.append([w for _, _, w in rows])
            right = sum(a > 0 for _, a, _ in rows) / max(len(rows), 1)
            kind = "hard" if right <= 1 / 3 else "middle" if right <= 2 / 3 else "easy"
            for n, a, w in (row for row in rows if row[1]):
                name = "positive" if a > 0 else "negative"
                if has_signal(of_group, group):  # rounding in a tied group has no sign
                    self.masses += [(f"{name}{part}", abs(a) * w * n / tokens) for part in ("", f"_{kind}")]

    def metrics(self):
        n, a = ([pair[i] for pair in self.pairs] for i in (0, 1))
        size = math.sqrt(sum(x * x for x in n) * sum(x * x for x in a))
        everything = [w for group in self.f for w in group if w]
        known = {"advantage/length_correlation": sum(x * y for x, y in self.pairs) / size}
        known |= {"groups/tied": mean(self.tied), "length_weight/min": min(everything)}
        known |= {"length_weight/max": max(everything)}
        known["length_weight/ess"] = mean([sum(g) ** 2 / (len(g) * sum(w * w for w in g)) for g in self.f if any(g)])
        for name in ("positive", "negative"):
            known[f"advantage/{name}_mean_length"] = mean(self.lengths[name])
            for part in ("", "_hard", "_middle", "_easy"):
                known[f"mass/{name}{part}"] = sum(m for s, m in self.masses if s == name + part) / self.losses
        v = [v for *_, v in self.tokens]
        known |= {"token_weight/mean": mean(v), "token_weight/min": min(v), "token_weight/max": max(v)}
        known |= {
            "token_weight/at_min": mean([x <= 1.25 for x in v]),
            "token_weight/at_max": mean([x >= 1.5 for x in v]),
        }
        shares = reference.loss_shares([(mass, quartile) for quartile, _, mass, _ in self.tokens])
        known |= {f"share/length_q{q}": share for q, share in enumerate(shares, start=1)}
        shares = quarters([(logp, mass) for _, logp, mass, _ in self.tokens])
        return known | {f"share/probability_q{q}": share for q, share in enumerate(shares, start=1)}


def mean(values) -> float:
    return sum(values) / len(values)


def quarters(tokens: list[tuple[float, float]]) -> list[float]:
    """Part of all mass in each quarter of (log-probability, mass) pairs; a token on an edge counts in proportion."""
    quarter, parts = len(tokens) / 4, []
    for place, (_, mass) in enumerate(sorted(tokens)):
        for q in range(4):
            inside = max(0.0, min(place + 1, (q + 1) * quarter) - max(place, q * quarter))
            parts.append((mass * inside, q))
    return reference.loss_shares(parts)


def quartiles(values: list[float]) -> list[int]:
    ordered = sorted(values)
    edges = [ordered[math.ceil(len(values) * q / 4) - 1] for q in (1, 2, 3)]
    return [sum(v > edge for edge in edges) for v in values]


TIED = 7e-5  # what TRL leaves of equal rewards that are no binary fractions
DATA = [  # lengths, advantages, rewards
    (
        [[3, 1, 12, 6], [2, 0, 9, 5], [7, 4, 1, 11], [4, 4, 8, 2]],
        [[0.5, -1.5, 1.0, 0.0], [1.0, 7.0, -1.0, 0.5], [TIED] * 4, [-1.0, -1.0, 3.0, -1.0]],
        [[1.0, 0.0, 2.0, 0.5], [1.0, 2.0, 0.0, 0.5], [0.7] * 4, [0.0, 0.0, 1.0, 0.0]],
    ),
    (
        [[4, 4, 4, 4], [0, 0, 0, 0], [10, 1, 2, 3], [1, 6, 5, 2]],
        [[1.0, -1.0, 0.5, -0.5], [0.0] * 4, [0.5, 0.5, 0.5, -1.5], [0.0] * 4],
        [[1.0, 0.0, 0.7, 0.3], [0.0] * 4, [1.0, 1.0, 1.0, 0.0], [1.0] * 4],
    ),
]


@pytest.mark.parametrize("rows", [16, 3])
def test_every_metric_equals_plain_loops_however_the_batch_is_cut(rows):
    """Over two generation batches with empty rows, tied groups, and tokens on either bound of v."""
    metrics, loops, generator = LossMetrics(), Loops(), torch.Generator().manual_seed(0)
    surprise = torch.logspace(-5, 0.5, 400)[torch.randperm(400, generator=generator)]
    for number, (lengths, advantages, rewards) in enumerate(DATA):
        table = torch.tensor(lengths, dtype=torch.int32)
        a, known = torch.tensor(advantages, dtype=double), {"rewards": torch.tensor(rewards, dtype=double)}
        batch = GenerationBatch(torch.arange(16), table, table.sum(), a, known)
        f = (torch.rand(4, 4, generator=generator, dtype=double) + 0.5) * (table > 0)
        logps, v = -surprise[192 * number :][:192].view(16, 12), torch.rand(16, 12, generator=generator) + 1
        v, mask = v.clamp(1.25, 1.5), torch.arange(12) < table.view(16, 1)
        metrics.add_generation_batch(batch)
        loops.generation_batch(lengths, advantages, rewards)
        order = torch.randperm(16, generator=generator)
        for places in order.split(rows):
            metrics.defer(lambda f=f, batch=batch: metrics.add_length_weights(f, batch, True))
            part = (batch, places, f, a.view(16, 1)[places], logps[places], mask[places].int(), v[places], (1.25, 1.5))
            metrics.defer(lambda part=part: metrics.add_tokens(*part), 12 * len(places))
            loops.loss(lengths, advantages, f.tolist())
        present = [n for group in lengths for n in group if n]
        bins = dict(zip(present, quartiles(present), strict=True))
        for row in range(16):
            p, g = divmod(row, 4)
            for t in range(lengths[p][g]):
                mass = abs(advantages[p][g]) * f[p, g].item() * v[row, t].item()
                mass *= has_signal(advantages[p], lengths[p])
                loops.tokens.append((bins[lengths[p][g]], logps[row, t].item(), mass, v[row, t].item()))
    expected, mine = loops.metrics(), metrics.flush(Accelerator(cpu=True))
    assert mine.keys() == expected.keys() and len(mine) == 28
    assert mine == pytest.approx(expected, rel=1e-4, abs=1e-6)  # sums in float32, bins of 0.85 %
    assert metrics.flush(Accelerator(cpu=True)) == {}


def test_over_nothing_a_metric_is_none_of_a_number():
    """Groups whose rewards are equal have no share, although TRL leaves advantages of 7e-5 there."""
    lengths = torch.tensor([[3, 2], [4, 1]], dtype=torch.int32)
    a = torch.full((2, 2), TIED, dtype=double)
    batch = GenerationBatch(torch.arange(4), lengths, lengths.sum(), a, {"rewards": torch.full((2, 2), 0.7)})
    for mask in (torch.ones(4, 5), torch.zeros(4, 5)):
        metrics = LossMetrics()
        metrics.add_generation_batch(batch)
        metrics.add_length_weights(mask.sum(dim=1).view(2, 2), batch, True)
        part = (a.view(4, 1), -torch.rand(4, 5), mask, torch.ones(4, 5), (1.0, 2.0))
        metrics.add_tokens(batch, torch.arange(4), torch.ones(2, 2), *part)
        logged = metrics.flush(Accelerator(cpu=True))
        for name, value in logged.items():
            is_nothing = name.startswith(("share/", "advantage/")) or not mask.any()
            is_nothing &= not name.startswith("mass/")  # of nothing there is 0
            assert math.isnan(value) == (is_nothing and name != "groups/tied"), name
        assert logged["groups/tied"] == 1.0


def test_shares_of_a_histogram_split_the_bin_on_an_edge():
    # Six values of mass 1, two of mass 5.
    assert quartile_shares([6.0, 2.0], [6.0, 10.0]) == pytest.approx([2 / 16, 2 / 16, 2 / 16, 10 / 16])
    assert all(math.isnan(share) for share in quartile_shares([0.0], [0.0]) + quartile_shares([4.0], [0.0]))


PREFIXES = ("advantage/", "groups/", "lambda/", "length_weight/", "mass/", "share/", "token_weight/")
THREE = ["length", "mean_logp", "min_logp"]
ON = {
    "learned": {"lambda_init": 0.7, "token_weight": "tr_grpo"},
    "signed, tied": {
        "length_weight": "power", "lambda_side": "signed", "lambda_features": THREE, "drop_tied_groups": True,
        "token_weight": "ar", "token_weight_kwargs": {"alpha": 0.6},
    },
}  # fmt: skip
CUTS = {
    "whole": {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1},
    "accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    "two processes": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1},
    "two processes, accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
}


def job(cut: str, name: str) -> dict:
    batch = {"seed": 2, "tied": [1] if "tied" in name else []}
    options = {"learning_rate": 0.0, "max_steps": 2, "logging_steps": 2}
    return {"trainer": "lambda", "noise": 0.3, "batch": batch, "options": {**options, **ON[name], **CUTS[cut]}}


def ours(result: dict) -> dict[str, float]:
    return {name: value for name, value in result["history"][0].items() if name.startswith(PREFIXES)}


def test_logs_do_not_depend_on_how_the_rows_are_cut(tmp_path):
    jobs = [job(cut, name) for name in ON for cut in CUTS if "processes" in cut]
    split = iter(launch(jobs, tmp_path, processes=2))
    for name, count in (("learned", 3 + 8 + 3 + 5 + 8 + 3), ("signed, tied", 3 + 1 + 8 + 3 + 3 + 8 + 6)):
        whole, accumulated = (ours(run_job(job(cut, name))) for cut in ("whole", "accumulated"))
        assert len(whole) == count and abs(whole["advantage/length_correlation"]) > 0.01
        assert whole.get("groups/tied", 1 / 3) == pytest.approx(1 / 3)
        for other in (accumulated, *map(ours, next(split)), *map(ours, next(split))):
            assert other == {key: pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in whole.items()}


def test_token_metrics_can_be_left_out_and_evaluation_logs_them_too():
    result = run_job(job("whole", "learned") | {"options": ON["learned"] | {"token_metrics": False}})
    names = {name.split("/")[0] for name in ours(result)}
    assert names == {"advantage", "lambda", "length_weight", "mass"}
    options = ON["learned"] | {"eval_strategy": "steps", "eval_steps": 1}
    history = run_job(job("whole", "learned") | {"options": options, "eval": True})["history"]
    log = next(entry for entry in history if "eval_reward" in entry)
    assert {"eval_advantage/length_correlation", "eval_share/length_q1", "eval_mass/positive"} <= log.keys()


def test_lambdas_gradient_is_the_mean_since_the_last_log():
    run = train(LambdaGRPOTrainer, LambdaGRPOConfig, max_steps=4, logging_steps=2, lambda_init=0.3)
    for entry, steps in zip(run.logs, (slice(0, 2), slice(2, 4)), strict=True):
        assert entry["lambda/grad"] == pytest.approx(sum(run.lambda_grads[steps]) / 2, rel=1e-6)
    assert run.logs[-1]["lambda/value"] == run.lambdas[-1] and run.logs[-1]["lambda/skipped"] == 0
    parameter = run.trainer._lambda
    parameter.grads += [1.0, math.inf, 2.0]
    assert lambda_metrics(parameter)["lambda/grad"] == 1.5 and math.isnan(lambda_metrics(parameter)["lambda/grad"])


def observe(observed, cut, tied, batches):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(batches):
            observed.warn_of_dead_run({"completions/clipped_ratio": [0.0, cut], "frac_reward_zero_std": [0.0, tied]})
    return [str(warning.message) for warning in caught]


def test_a_dead_run_is_told_once_after_twenty_batches():
    dead = LossMetrics()
    assert not observe(dead, 0.95, 1.0, BATCHES - 1)
    (told,) = observe(dead, 0.9, 1.0, 1)
    assert "in 20 generation batches in a row at least 90% of the answers were cut" in told
    assert "Raise max_completion_length" in told and not observe(dead, 1.0, 1.0, 100)


@pytest.mark.parametrize(("cut", "tied"), [(0.89, 1.0), (1.0, 0.99)])
def test_one_batch_that_differs_keeps_it_silent(cut, tied):
    dead = LossMetrics()
    assert not observe(dead, 1.0, 1.0, BATCHES - 1) and not observe(dead, cut, tied, 1)
    dead.warn_of_dead_run({})  # a subclass that logs neither
    assert not observe(dead, 1.0, 1.0, BATCHES - 1)


def test_a_dead_run_is_told_in_a_training():
    batch = Batch(lengths=[[3, 3], [4, 2]], truncated=set(range(4)), tied=[0, 1])
    args = config(LambdaGRPOConfig, batch, max_steps=BATCHES, max_completion_length=4)
    trainer = build(LambdaGRPOTrainer, args, batch, build_model(), train_dataset=batch.dataset(repeats=BATCHES))
    with pytest.warns(UserWarning, match="Nothing can be learned"):
        trainer.train()
