"""The weighted loss and its gradients against a row-by-row reference, and TRL's own with weighted advantages."""

import itertools

import pytest
import reference
import torch
from harness import LENGTHS, Batch, build_model, largest_deviation, make, off_policy_logps, prompt_ids
from trl import GRPOConfig, GRPOTrainer

from trl_lambda import LambdaGRPOTrainer

# A learnable λ on cispo and vespo warns; here it is meant.
pytestmark = pytest.mark.filterwarnings("ignore:loss_type=.* with a learnable")

SURROGATES = ["dapo", "cispo", "sapo", "vespo"]
LAMBDA = 1.25  # exact in float32, the dtype of λ


def scored(trainer, noise: float = 0.3):
    """One scored generation batch with old log-probabilities off the current ones, so that ratios are not 1."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [{"prompt": text} for text in trainer.train_dataset["prompt"][: len(LENGTHS)] for _ in range(4)]
    inputs = trainer._generate_and_score_completions(rows)
    inputs["old_per_token_logps"] = off_policy_logps(trainer, inputs, noise)
    if hasattr(trainer, "_gather"):  # the advantages are float64 only since they were scored
        trainer._gather([inputs], in_order=True)
    return inputs


def in_double(**options):
    return make(model=build_model(double=True), **options)


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def assert_equals_reference(options, f, batch=None, **reference_options):
    """Loss and gradient of a batch; f from its lengths and advantages, without the rounding of equal rewards."""
    batch = batch or Batch()
    trainer = in_double(batch=batch, **options)
    inputs = scored(trainer)
    loss = trainer.compute_loss(trainer.model, inputs)
    a = inputs["advantages"].view(3, 4).tolist()
    weights = f(batch.lengths, [[0.0] * 4 if p in batch.tied else group for p, group in enumerate(a)])
    old = [row[: len(c)].tolist() for row, c in zip(inputs["old_per_token_logps"], batch.completions, strict=True)]
    rows = prompt_ids(batch), batch.completions, old, sum(a, []), sum(weights, [])
    plain = reference.policy_loss(trainer.model, *rows, **reference_options)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-9)
    assert largest_deviation(gradients(trainer, loss), gradients(trainer, plain)) < 1e-9


def plain_f(name, lam=None, scope="batch"):
    return lambda n, a: reference.length_weights(n, lam, name, scope, max_completion_length=16, advantages=a)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", SURROGATES)
@pytest.mark.parametrize("regulation", [None, "tr_grpo", "ar"])
def test_every_surrogate_with_f_and_v(loss_type, level, regulation):
    options = {"loss_type": loss_type, "importance_sampling_level": level, "token_weight": regulation}
    options |= {"length_weight": "lambda_grpo", "lambda_init": LAMBDA, "lambda_learnable": False}
    f = plain_f("lambda_grpo", LAMBDA)
    assert_equals_reference(options, f, loss_type=loss_type, level=level, regulation=regulation)


def side_f(name, side):
    return lambda n, a: reference.side_weights(n, a, [-0.75], name, side)


def favoured(n, a):
    return reference.favour_positive(plain_f("grpo")(n, a), n, a, 2.5)


def without_tied(name, scope):
    """The second group has no signal."""
    return lambda n, a: reference.without_tied(plain_f(name, scope=scope)(n[::2], a[::2]), n, [True, False, True])


FIXED, SCOPES = {"lambda_init": -0.75, "lambda_learnable": False}, ("batch", "prompt")
F = [({"length_weight": "grpo", "positive_weight": 2.5}, favoured)]
F.append(({"length_weight": None, "loss_type": "grpo", "positive_weight": 2.5}, favoured))
for name, scope in itertools.product(("grpo", "dapo", "dr_grpo", "balanced", "lambda_grpo", "power"), SCOPES):
    chosen = {"length_weight": name, "length_weight_scope": scope}
    F.append((chosen | (FIXED if name in ("lambda_grpo", "power") else {}), plain_f(name, -0.75, scope)))
    if name in ("grpo", "dapo"):
        F.append((chosen | {"drop_tied_groups": True}, without_tied(name, scope)))
for name, side in itertools.product(("lambda_grpo", "power"), ("signed", "positive", "negative")):
    F.append(({"length_weight": name, "lambda_side": side} | FIXED, side_f(name, side)))


@pytest.mark.parametrize("loss_type", ["dapo", "sapo"])
@pytest.mark.parametrize(("own", "f"), F, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_every_f(own, f, loss_type):
    """Equal rewards of 0.7 leave advantages of 6e-4 in the second group."""
    options = {"loss_type": loss_type, "token_weight": "tr_grpo"} | own
    surrogate = loss_type if options["loss_type"] == loss_type else "dapo"
    assert_equals_reference(options, f, Batch(tied=[1]), loss_type=surrogate, regulation="tr_grpo")


@pytest.mark.parametrize("delta", [None, 1.25])
@pytest.mark.parametrize("regulation", ["tr_grpo", "ar"])
def test_inside_the_clip(regulation, delta):
    options = {"token_weight": regulation, "token_weight_inside_clip": True, "delta": delta}
    f = plain_f("lambda_grpo", 0.0)
    assert_equals_reference(options, f, loss_type="dapo", regulation=regulation, inside=True, delta=delta)


def test_inside_the_clip_without_old_log_probabilities():
    """On policy: every token with v > 1.2 and A > 0 is clipped to zero gradient."""
    trainer = in_double(token_weight="tr_grpo", token_weight_inside_clip=True)
    inputs = scored(trainer, noise=0.0)
    with_old = trainer.compute_loss(trainer.model, inputs)
    without = {key: value for key, value in inputs.items() if key != "old_per_token_logps"}
    loss = trainer.compute_loss(trainer.model, without)
    torch.testing.assert_close(loss, with_old)
    assert largest_deviation(gradients(trainer, loss), gradients(trainer, with_old)) < 1e-9
    trainer.reduce_metrics("train")
    trainer.log({})
    assert trainer.state.log_history[-1]["clip_ratio/region_mean"] > 0


FEATURES = {
    "kl": {"beta": 0.1},
    "entropy bonus": {"entropy_coef": 0.05},
    "entropy quantile": {"top_entropy_quantile": 0.5},
    "off-policy mask": {"off_policy_mask_threshold": 0.02},
    "delta": {"delta": 1.1},
    "sequence": {"importance_sampling_level": "sequence"},
    "vLLM ratio": {},
}


@pytest.mark.parametrize("regulation", [None, "ar"])
@pytest.mark.parametrize(
    ("feature", "loss_type"),
    [(f, s) for f in FEATURES for s in SURROGATES if f != "delta" or s == "dapo"],  # delta belongs to the PPO clip
)
def test_weights_scale_the_policy_term_alone(feature, loss_type, regulation):
    """TRL's own loss, on advantages that carry the reference weights, leaves KL and the entropy bonus unweighted."""
    options = FEATURES[feature] | {"loss_type": loss_type}
    same = options | {"beta": 0.0}
    trainer = in_double(lambda_init=LAMBDA, lambda_learnable=False, token_weight=regulation, **same)
    inputs = scored(trainer)
    inputs["ref_per_token_logps"] = inputs["old_per_token_logps"].roll(1, dims=0)
    plain = in_double(trainer_class=GRPOTrainer, config_class=GRPOConfig, **same)
    plain.model.train()
    plain.current_gradient_accumulation_steps = 1
    if feature == "vLLM ratio":  # as TRL leaves it in the inputs after scoring with vLLM
        generator = torch.Generator().manual_seed(1)
        shape = inputs["completion_ids"].shape
        inputs["importance_sampling_ratio"] = torch.rand(shape, generator=generator) + 0.5
    for each in (trainer, plain):
        each.use_vllm = feature == "vLLM ratio"
        each.beta = options.get("beta", 0.0)  # the reference log-probabilities are given: no reference model
    weights = torch.tensor(sum(reference.length_weights(LENGTHS, LAMBDA, "lambda_grpo"), []), dtype=torch.float64)
    if loss_type == "sapo":
        lengths = torch.tensor(sum(LENGTHS, [])).double()
        weights = weights * lengths / lengths.mean()
    advantages = inputs["advantages"] * weights
    if regulation is not None:  # the policy's own log-probabilities, from TRL
        logps = off_policy_logps(trainer, inputs, 0.0)
        v = [[reference.probability_weight(x, regulation) for x in row] for row in logps.tolist()]
        advantages = advantages.unsqueeze(1) * torch.tensor(v, dtype=torch.float64)
    loss = trainer.compute_loss(trainer.model, inputs)
    oracle = plain.compute_loss(plain.model, dict(inputs) | {"advantages": advantages})
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-9, abs=1e-9)
    assert largest_deviation(gradients(trainer, loss), gradients(plain, oracle)) < 1e-9


def test_the_micro_batch_is_left_as_it_was():
    trainer = in_double(lambda_init=LAMBDA, token_weight="tr_grpo")
    inputs = scored(trainer)
    before = dict(inputs)
    first = trainer.compute_loss(trainer.model, inputs)
    first.backward()
    assert inputs.keys() == before.keys() and all(inputs[key] is before[key] for key in inputs)
    second = trainer.compute_loss(trainer.model, inputs)
    second.backward()  # not a second time through the first graph
    assert first.item() == second.item()


def test_another_models_log_probabilities_are_not_weighted():
    class ScoresATeacher(LambdaGRPOTrainer):
        loss_reduction = "token_mean"

        def _compute_loss(self, model, inputs):
            off_policy_logps(self, inputs, 0.0)  # without gradient
            return super()._compute_loss(model, inputs)

    plain, both = (make(trainer_class=c, token_weight="tr_grpo") for c in (LambdaGRPOTrainer, ScoresATeacher))
    assert both.compute_loss(both.model, scored(both)) == plain.compute_loss(plain.model, scored(plain))


def test_a_loss_that_does_not_read_the_weights_raises(monkeypatch):
    trainer = in_double(token_weight="tr_grpo")
    inputs = scored(trainer)

    def reads_elsewhere(self, model, inputs):
        ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1))
        return inputs["prompt_ids"].sum()

    for loss in (reads_elsewhere, lambda self, model, inputs: inputs["advantages"].sum()):
        monkeypatch.setattr(GRPOTrainer, "_compute_loss", loss)
        with pytest.raises(RuntimeError, match="without reading the weighted (advantages|inputs)"):
            trainer.compute_loss(trainer.model, inputs)
