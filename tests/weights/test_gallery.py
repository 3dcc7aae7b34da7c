"""docs/gallery.md: what a reader pastes, run through a trainer and compared with plain loops in fp64."""

import ast
import importlib
import math
import re
import sys

import numpy
import pytest
import reference
import torch
import yaml
from documents import ROOT, fences
from harness import Batch, build_model, largest_deviation, prompt_ids, train
from trl.scripts.utils import TrlParser

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

PAGE = ROOT / "docs" / "gallery.md"
BLOCKS = fences(PAGE, "python")
LENGTHS = [[3, 1, 12, 6], [2, 4, 9, 5], [7, 8, 1, 11], [4, 4, 2, 6]]
ALL = sum(LENGTHS, [])
TIED = [3]  # the last group's rewards are equal
DATA = {"lengths": LENGTHS, "tied": TIED}
NOISE = 0.3


@pytest.fixture(scope="module")
def my_weights(tmp_path_factory):
    """The page's Python in the module that it names."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "my_weights.py").write_text("\n".join(BLOCKS), encoding="utf-8")
    sys.path.insert(0, str(folder))
    return importlib.import_module("my_weights")


# ---- The formulas, in loops over floats: f of a group's responses, v of one token ----


def focal(group, gamma):
    p = sum(r > 0.5 for r in group["rewards"]) / len(group["rewards"])
    return [max(1 - p, 1e-6) ** gamma] * len(group["rewards"])


def fade(group, alpha, delta):
    pairs = zip(focal(group, alpha - 1), group["advantages"], strict=True)
    return [hard / delta if a < 0 else hard for hard, a in pairs]


def mean(values):
    return sum(values) / len(values)


def scalerl(group):
    """The token mean of a prompt, the mean over those with a signal; the loss divides by all tokens."""
    live = len(LENGTHS) - len(TIED)
    return [group["live"] * sum(ALL) / (live * sum(group["lengths"])) for _ in group["lengths"]]


def stapo(token, low, quantile):
    limit = numpy.quantile(token["batch_entropies"], quantile)
    return 0.0 if token["advantage"] > 0 and token["pi"] < low and token["entropy"] < limit else 1.0


def surprise(token, rho, steps):
    distance = 1 - token["pi"] if token["advantage"] > 0 else token["pi"]
    return 1 + rho * max(0.0, 1 - token["step"] / steps) * distance


def fipo(token, half_life=32.0, low=1.0, high=1.2):
    later = [2 ** (-k / half_life) * change for k, change in enumerate(token["changes"])]
    return min(max(math.exp(math.fsum(later)), low), high)


# Name on the page -> loop, parameters other than the page's, where the tiny model's tokens need them
OF_RESPONSES = {
    "focal": (focal, {"gamma": 2.0}),
    "fade": (fade, {"alpha": 2.5, "delta": 1.5}),
    "entropy_share": (lambda group: [h / mean(group["entropy"]) for h in group["entropy"]], {}),
    "delta_l": (lambda g: [n ** g["lam"] / mean([m ** g["lam"] for m in ALL]) for n in g["lengths"]], {}),
    "constant_divisor": (lambda group, tokens: [mean(ALL) / tokens for _ in group["lengths"]], {"tokens": 64}),
}
OF_TOKENS = {
    "stapo": (stapo, {"low": 0.1, "quantile": 0.8}),
    "surprise": (surprise, {"rho": 0.5, "steps": 2}),
    "ar_wrong": (lambda t, alpha: alpha * t["pi"] + 1 - alpha if t["advantage"] < 0 else 1.0, {"alpha": 0.3}),
    "fipo": (fipo, {"half_life": 4.0, "low": 0.9, "high": 1.3}),
}


class Watched(LambdaGRPOTrainer):
    """Notes which rows each micro-batch has."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.rows_seen.append([number % 2**32 for number in inputs["generation_batch_number"].tolist()])
        return super().compute_loss(model, inputs, *args, **kwargs)


def expected(run_advantages, micro_batches, step, lam, f=None, v=None, loss_type="dapo", eps=0.2):
    """Loss, its gradients by name, dL/dλ and all weights; `f` and `v` are (loop, parameters)."""
    batch, model, size = Batch(**DATA), build_model(double=True), len(LENGTHS[0])
    ids = prompt_ids(batch)
    scores = [reference.score(model, *row) for row in zip(ids, batch.completions, strict=True)]
    noise = [torch.randn(64, generator=torch.Generator().manual_seed(row)) * NOISE for row in range(len(ids))]
    old = [[x + noise[row][t].item() for t, x in enumerate(logps)] for row, (logps, _) in enumerate(scores)]
    advantages, lam = run_advantages.flatten().tolist(), torch.tensor(lam, dtype=torch.float64, requires_grad=True)
    fs, vs = [], []
    for p, lengths in enumerate(LENGTHS):
        part = slice(p * size, (p + 1) * size)
        group = {"lengths": lengths, "lam": lam, "rewards": batch.rewards[part], "advantages": advantages[part]}
        group |= {"entropy": [mean(entropies) for _, entropies in scores[part]], "live": p not in TIED}
        fs += f[0](group, **f[1]) if f else [1.0] * size
    for row, (logps, entropies) in enumerate(scores):
        [together] = [rows for rows in micro_batches if row in rows]
        token = {"advantage": advantages[row], "step": step}
        token["batch_entropies"] = [h for other in together for h in scores[other][1]]
        changes, values = [x - y for x, y in zip(logps, old[row], strict=True)], []
        for t, (x, h) in enumerate(zip(logps, entropies, strict=True)):
            token |= {"pi": math.exp(x), "entropy": h, "changes": changes[t:]}
            values.append(v[0](token, **v[1]) if v else 1.0)
        vs.append(values)
    surrogate = {"loss_type": loss_type, "eps": eps}
    loss = reference.policy_loss(model, ids, batch.completions, old, advantages, fs, v=vs, **surrogate)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, [*named.values(), lam], allow_unused=True)
    weights = [x.item() if torch.is_tensor(x) else x for x in fs] if f else sum(vs, [])
    return loss.item(), dict(zip(named, grads, strict=False)), grads[-1], weights


def check(losses, grads, lambda_grad, plain):
    assert losses == pytest.approx(plain[0], rel=1e-9) and abs(losses) > 1e-4
    assert largest_deviation(grads, plain[1]) < 1e-9
    if plain[2] is not None:
        assert lambda_grad == pytest.approx(plain[2].item(), rel=1e-9) and abs(lambda_grad) > 1e-6


@pytest.mark.parametrize("name", ["scalerl", *OF_RESPONSES, *OF_TOKENS])
def test_every_entry_equals_plain_loops(name, my_weights):
    options = {"length_weight": "dapo"}
    if name == "scalerl":
        options = yaml.safe_load(fences(PAGE, "yaml")[1])
        loops = {"f": (scalerl, {}), "loss_type": "cispo", "eps": 5.0}
    elif name in OF_RESPONSES:
        loops = {"f": OF_RESPONSES[name]}
        options = {"length_weight": f"my_weights.{name}", "length_weight_kwargs": loops["f"][1] or None}
    else:
        loops = {"v": OF_TOKENS[name]}
        options |= {"token_weight": f"my_weights.{name}", "token_weight_kwargs": loops["v"][1]}
    if name == "delta_l":
        options |= {"lambda_init": -0.75, "lambda_learning_rate": 0.5}
    run = train(
        type(name, (Watched,), {"rows_seen": []}), LambdaGRPOConfig, Batch(**DATA),
        model=build_model(double=True), trainer_options={"noise": NOISE}, max_steps=2,
        per_device_train_batch_size=4, gradient_accumulation_steps=4, **options,
    )  # fmt: skip
    advantages, seen = run.trainer._scoring.batches["train"].advantages, run.trainer.rows_seen
    assert any(len({row // 4 for row in rows}) > 1 for rows in seen), "groups are split"
    lams = [-0.75, run.lambdas[0] or 0.0]
    for step in range(2):
        part = slice(4 * step, 4 * step + 4)
        plain = expected(advantages, seen[part], step, lams[step], **loops)
        check(sum(run.losses[part]), run.grads[step], run.lambda_grads and run.lambda_grads[step], plain)
        assert len(set(plain[3])) > 1 or name == "constant_divisor"
    assert name != "delta_l" or lams[0] != lams[1]
    if name == "fipo":  # on policy
        assert my_weights.fipo(torch.rand(2, 3), None, torch.ones(2, 3)).tolist() == [[1.0] * 3] * 2


def test_functions_are_ten_lines_and_import_torch_alone(my_weights):
    functions = [node for node in ast.parse("\n".join(BLOCKS)).body if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions] == [*OF_RESPONSES, *OF_TOKENS]
    assert all(node.end_lineno - node.lineno < 10 and ast.get_docstring(node) for node in functions)
    assert re.findall(r"^.*\bimport\b.*$", "\n".join(BLOCKS), re.MULTILINE) == ["import torch"]
    entries = re.findall(r"^\| .* \| \[[^]]+\]\(#([\w-]+)\) \| \w", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(entries) == len(functions) + 1 == 10


def test_the_lines_of_a_recipe_name_the_functions(my_weights, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(fences(PAGE, "yaml")[0] + f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\n")
    f, v = TrlParser(LambdaGRPOConfig).parse_args_and_config(["--config", str(recipe)])[0].make_weights()
    assert (f.name, v.name) == ("my_weights.focal(gamma=2.0)", "my_weights.stapo")


def test_papers_options_are_accepted_and_its_figures_are_the_arenas():
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[[^]]+\]\(https://huggingface.co/papers/[\d.]+\) \| `([^`]+)` \|", page, re.MULTILINE)
    assert len(rows) == 13
    for options in rows:
        LambdaGRPOConfig("out", use_cpu=True, bf16=False, **eval(f"dict({options})"))
    arena = (ROOT / "recipes" / "studies" / "arena" / "first_round.md").read_text(encoding="utf-8")
    figures = re.findall(r"[+-][\d.]+ \[[^]]+\]", page)
    assert len(figures) == 19 and not [figure for figure in figures if figure not in arena]
