"""The weighted loss and its gradients against a row-by-row reference, whole and cut into micro-batches."""

import itertools

import pytest
import reference
import torch
from harness import LENGTHS, Batch, build, build_model, build_tokenizer, config, off_policy_logps
from trl import GRPOConfig, GRPOTrainer

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

# A learnable λ on cispo and vespo warns; here it is meant.
pytestmark = pytest.mark.filterwarnings("ignore:loss_type=.* with a learnable")

SURROGATES = ["dapo", "cispo", "sapo", "vespo"]
LEVELS = ["token", "sequence"]
LAMBDA = 1.25  # exact in float32, the dtype of λ


def scored(trainer, noise: float = 0.3):
    """One scored generation batch with old log-probabilities off the current ones, so that ratios are not 1."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    rows = [{"prompt": text} for text in trainer.train_dataset["prompt"][: len(LENGTHS)] for _ in range(4)]
    inputs = trainer._generate_and_score_completions(rows)
    inputs["old_per_token_logps"] = off_policy_logps(trainer, inputs, noise)
    if hasattr(trainer, "_gather"):  # the advantages are float64 only since they were scored
        trainer._gather([inputs], in_order=True)
    return inputs


def lambda_trainer(batch=None, **options):
    batch = Batch() if batch is None else batch
    return build(LambdaGRPOTrainer, config(LambdaGRPOConfig, batch, **options), batch, build_model(double=True))


def gradients(trainer, losses):
    sum(losses).backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    parameter = trainer._lambda
    lambda_grad = None if parameter is None or parameter.tensor.grad is None else parameter.tensor.grad.item()
    if parameter is not None:
        parameter.tensor.grad = None
    return grads, lambda_grad


def expected(trainer, inputs, batch, lam, length_weight="lambda_grpo", scope="batch", own=None, **options):
    """The reference loss and its gradient in the model, from plain lists."""
    ids = build_tokenizer()(trainer.train_dataset["prompt"][: len(LENGTHS)])["input_ids"]
    prompts = [row for row in ids for _ in range(4)]
    lengths = LENGTHS if own is None else [[sum(own[4 * p + g]) for g in range(4)] for p in range(len(LENGTHS))]
    weights = reference.length_weights(lengths, lam, length_weight, scope, max_completion_length=16)
    loss = reference.policy_loss(
        trainer.model,
        prompts,
        batch.completions,
        [row[: len(c)].tolist() for row, c in zip(inputs["old_per_token_logps"], batch.completions, strict=True)],
        inputs["advantages"].tolist(),
        list(itertools.chain(*weights)),
        own=own,
        **options,
    )
    loss.backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    return loss.item(), grads


def assert_gradients_close(mine, theirs):
    scale = max(g.abs().max() for g in theirs.values()).item()
    for name in theirs:
        torch.testing.assert_close(
            mine[name], theirs[name], rtol=0, atol=1e-9 * scale, msg=lambda m, n=name: f"{n} {m}"
        )


def assert_equals_reference(options, **reference_options):
    batch = Batch()
    trainer = lambda_trainer(batch, **options)
    inputs = scored(trainer)
    loss = trainer.compute_loss(trainer.model, inputs)
    grads, _ = gradients(trainer, [loss])
    lam = options.get("lambda_init", 0.0)
    reference_loss, reference_grads = expected(trainer, inputs, batch, lam, **reference_options)
    assert loss.item() == pytest.approx(reference_loss, rel=1e-9)
    assert_gradients_close(grads, reference_grads)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", SURROGATES)
@pytest.mark.parametrize("regulation", [None, "tr_grpo", "ar"])
def test_every_surrogate_with_f_and_v(loss_type, level, regulation):
    options = {"loss_type": loss_type, "importance_sampling_level": level, "token_weight": regulation}
    options |= {"length_weight": "lambda_grpo", "lambda_init": LAMBDA, "lambda_learnable": False}
    assert_equals_reference(options, loss_type=loss_type, level=level, regulation=regulation)


@pytest.mark.parametrize("scope", ["batch", "prompt"])
@pytest.mark.parametrize("length_weight", ["lambda_grpo", "power", "grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("loss_type", ["dapo", "sapo"])
def test_every_member_in_both_scopes(length_weight, scope, loss_type):
    options = {"length_weight": length_weight, "length_weight_scope": scope, "loss_type": loss_type}
    if length_weight in ("lambda_grpo", "power"):
        options |= {"lambda_init": -0.75, "lambda_learnable": False}
    options["token_weight"] = "tr_grpo"
    own = {"length_weight": length_weight, "scope": scope, "loss_type": loss_type, "regulation": "tr_grpo"}
    assert_equals_reference(options, **own)


@pytest.mark.parametrize("delta", [None, 1.25])
@pytest.mark.parametrize("regulation", ["tr_grpo", "ar"])
def test_inside_the_clip(regulation, delta):
    options = {"token_weight": regulation, "token_weight_inside_clip": True, "delta": delta}
    assert_equals_reference(options, loss_type="dapo", regulation=regulation, inside=True, delta=delta)


def test_inside_the_clip_without_old_log_probabilities():
    """On policy: every token with v > 1.2 and A > 0 is clipped to zero gradient."""
    batch = Batch()
    trainer = lambda_trainer(batch, token_weight="tr_grpo", token_weight_inside_clip=True)
    inputs = scored(trainer, noise=0.0)
    with_old = trainer.compute_loss(trainer.model, inputs)
    grads, _ = gradients(trainer, [with_old])
    without = {key: value for key, value in inputs.items() if key != "old_per_token_logps"}
    loss = trainer.compute_loss(trainer.model, without)
    torch.testing.assert_close(loss, with_old)
    assert_gradients_close(gradients(trainer, [loss])[0], grads)
    trainer.reduce_metrics("train")
    trainer.log({})
    logged = trainer.state.log_history[-1]
    assert logged["clip_ratio/region_mean"] > 0


@pytest.mark.parametrize("v", ["1.2", "own"])
def test_tool_tokens_take_no_part(v):
    own = [[0] * 7 if row == 8 else [int(t % 3 != 1) for t in range(n)] for row, n in enumerate(sum(LENGTHS, []))]
    batch = Batch(env_mask=lambda row, length: own[row])
    regulation = {"token_weight": "tr_grpo"} if v == "own" else {}
    trainer = lambda_trainer(batch, lambda_init=LAMBDA, lambda_learnable=False, **regulation)
    inputs = scored(trainer)
    loss = trainer.compute_loss(trainer.model, inputs)
    grads, _ = gradients(trainer, [loss])
    reference_loss, reference_grads = expected(
        trainer, inputs, batch, LAMBDA, own=own, loss_type="dapo", regulation=regulation.get("token_weight")
    )
    assert loss.item() == pytest.approx(reference_loss, rel=1e-9)
    assert_gradients_close(grads, reference_grads)


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
    """
    TRL is the oracle: its own loss on advantages that carry the reference weights. KL and the entropy bonus are then
    unweighted, masks act as they do there.
    """
    options = FEATURES[feature] | {"loss_type": loss_type}
    batch = Batch()
    trainer = lambda_trainer(
        batch, lambda_init=LAMBDA, lambda_learnable=False, token_weight=regulation, **options | {"beta": 0.0}
    )
    inputs = scored(trainer)
    inputs["ref_per_token_logps"] = inputs["old_per_token_logps"].roll(1, dims=0)
    plain = build(GRPOTrainer, config(GRPOConfig, batch, **options | {"beta": 0.0}), batch, build_model(double=True))
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
        v = torch.tensor(v, dtype=torch.float64)
        advantages = advantages.unsqueeze(1) * v
    loss = trainer.compute_loss(trainer.model, inputs)
    oracle = plain.compute_loss(plain.model, dict(inputs) | {"advantages": advantages})
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-9, abs=1e-9)
    oracle.backward()
    theirs = {name: p.grad for name, p in plain.model.named_parameters()}
    assert_gradients_close(gradients(trainer, [loss])[0], theirs)


@pytest.mark.parametrize("regulation", [None, "tr_grpo"])
@pytest.mark.parametrize("loss_type", SURROGATES)
@pytest.mark.parametrize("length_weight", ["lambda_grpo", "power"])
def test_groups_over_micro_batches_equal_one_batch(length_weight, loss_type, regulation):
    """Shuffled rows in micro-batches of 12, 6, 3 and 1: same loss, same gradient, same dL/dλ."""
    results = []
    for parts in (1, 2, 4, 12):
        trainer = lambda_trainer(
            length_weight=length_weight,
            loss_type=loss_type,
            token_weight=regulation,
            lambda_init=LAMBDA,
            per_device_train_batch_size=12 // parts,
            gradient_accumulation_steps=parts,
        )
        inputs = scored(trainer)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(parts))
        losses = []
        for rows in order.chunk(parts):
            micro = {key: value if value.dim() == 0 else value[rows] for key, value in inputs.items()}
            losses.append(trainer.compute_loss(trainer.model, micro))
        grads, lambda_grad = gradients(trainer, losses)
        results.append((sum(losses).item(), grads, lambda_grad))
    whole = results[0]
    assert abs(whole[2]) > 1e-3
    for loss, grads, lambda_grad in results[1:]:
        assert loss == pytest.approx(whole[0], rel=1e-9, abs=1e-9)
        assert lambda_grad == pytest.approx(whole[2], rel=1e-9)
        assert_gradients_close(grads, whole[1])


@pytest.mark.parametrize("regulation", [None, "tr_grpo"])
def test_gradient_of_lambda_is_the_closed_form(regulation):
    """On policy the clipped surrogate of a token is v·A: dL/dλ = -dJ/dλ of the method, from rewards and lengths."""
    batch = Batch()
    trainer = lambda_trainer(batch, lambda_init=0.625, token_weight=regulation)
    inputs = scored(trainer, noise=0.0)
    logps = inputs["old_per_token_logps"]
    _, lambda_grad = gradients(trainer, [trainer.compute_loss(trainer.model, inputs)])
    surrogates = []
    for row, (advantage, length) in enumerate(zip(inputs["advantages"].tolist(), sum(LENGTHS, []), strict=True)):
        v = [1.0 if regulation is None else reference.probability_weight(x, regulation) for x in logps[row].tolist()]
        surrogates.append(advantage * sum(v[:length]))
    nested = [surrogates[4 * p : 4 * p + 4] for p in range(3)]
    assert lambda_grad == pytest.approx(-reference.softmax_objective_gradient(LENGTHS, nested, 0.625), rel=1e-9)


def test_the_micro_batch_is_left_as_it_was():
    trainer = lambda_trainer(lambda_init=LAMBDA, token_weight="tr_grpo")
    inputs = scored(trainer)
    before = dict(inputs)
    first = trainer.compute_loss(trainer.model, inputs)
    first.backward()
    assert inputs.keys() == before.keys() and all(inputs[key] is before[key] for key in inputs)
    second = trainer.compute_loss(trainer.model, inputs)
    second.backward()  # not a second time through the first graph
    assert first.item() == second.item()


class ScoresATeacher(LambdaGRPOTrainer):
    loss_reduction = "token_mean"

    def _compute_loss(self, model, inputs):
        off_policy_logps(self, inputs, 0.0)  # another model's log-probabilities, without gradient
        return super()._compute_loss(model, inputs)


class AsksTwice(LambdaGRPOTrainer):
    loss_reduction = "token_mean"

    def _compute_loss(self, model, inputs):
        super()._compute_loss(model, inputs)
        return super()._compute_loss(model, inputs)


def test_tokens_are_weighted_once():
    batch = Batch()
    losses = []
    for trainer_class in (LambdaGRPOTrainer, ScoresATeacher):
        trainer = build(trainer_class, config(LambdaGRPOConfig, batch, token_weight="tr_grpo"), batch)
        losses.append(trainer.compute_loss(trainer.model, scored(trainer)).item())
    assert losses[0] == losses[1]
    trainer = build(AsksTwice, config(LambdaGRPOConfig, batch, token_weight="tr_grpo"), batch)
    with pytest.raises(RuntimeError, match="log-probabilities twice"):
        trainer.compute_loss(trainer.model, scored(trainer))


class TokenAdvantages(LambdaGRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output["advantages"] = output["advantages"].unsqueeze(1).expand(output["completion_ids"].shape).contiguous()
        return output


@pytest.mark.parametrize("regulation", [None, "tr_grpo"])
def test_advantages_per_token_are_weighted_as_advantages_per_response(regulation):
    batch = Batch()
    losses = []
    for trainer_class in (LambdaGRPOTrainer, TokenAdvantages):
        args = config(LambdaGRPOConfig, batch, token_weight=regulation, lambda_init=LAMBDA)
        trainer = build(trainer_class, args, batch)
        losses.append(trainer.compute_loss(trainer.model, scored(trainer)).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_a_loss_that_does_not_read_the_weights_raises(monkeypatch):
    trainer = lambda_trainer(token_weight="tr_grpo")
    inputs = scored(trainer)

    def reads_elsewhere(self, model, inputs):
        self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
        )
        return inputs["prompt_ids"].sum()

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", reads_elsewhere)
    with pytest.raises(RuntimeError, match="without reading the weighted advantages"):
        trainer.compute_loss(trainer.model, inputs)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: inputs["advantages"].sum())
    with pytest.raises(RuntimeError, match="without reading the weighted"):
        trainer.compute_loss(trainer.model, inputs)
