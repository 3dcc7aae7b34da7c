"""λ's parameter group, its step, its state on disk, and what is logged."""

import json
import math

import pytest
import reference
import torch
from support import LENGTHS, Batch, build, build_model, build_tokenizer, config, prompt, train
from trl import GRPOConfig

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer, TRGRPOConfig, TRGRPOTrainer
from trl_lambda.preference.lambda_parameter import base_learning_rate, schedule_factor

# Six rows per micro-batch, two micro-batches per optimizer step.
CUT = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}


def run(batch=None, **options):
    return train(LambdaGRPOTrainer, LambdaGRPOConfig, batch, **options)


# ---- The parameter group ----


@pytest.mark.filterwarnings("ignore:Adafactor may normalise")
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop"])
def test_groups_partition_all_trainable_parameters(optim):
    batch = Batch()
    args = config(
        LambdaGRPOConfig, batch, optim=optim, learning_rate=1e-3, weight_decay=0.3, lambda_learning_rate=0.07
    )
    trainer = build(LambdaGRPOTrainer, args, batch)
    trainer.model.lm_head.weight.requires_grad_(False)
    optimizer = trainer.create_optimizer()
    trainable = [p for p in trainer.model.parameters() if p.requires_grad] + [trainer._lambda.tensor]
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, trainable))
    *model_groups, own = optimizer.param_groups
    assert own["params"] == [trainer._lambda.tensor] and own["name"] == "lambda"
    assert own["lr"] == 0.07 and own["weight_decay"] == 0.0
    assert all("name" not in group for group in model_groups)
    if optim.startswith("adamw") or optim == "rmsprop":
        assert own["eps"] == 1.0 and all(group["eps"] < 1e-6 for group in model_groups)
    assert trainer.create_optimizer() is optimizer and len(optimizer.param_groups) == 3


def test_an_optimizer_that_normalises_without_an_eps_warns():
    with pytest.warns(UserWarning, match="Adafactor may normalise its steps .* lambda_learning_rate=0.1"):
        result = run(optim="adafactor", learning_rate=1e-3)
    assert abs(result.lambdas[0]) == pytest.approx(0.1, rel=1e-2)  # what the warning says


def test_members_without_lambda_add_no_group():
    batch = Batch()
    for options in ({"aggregation": "grpo"}, {"lambda_learnable": False}, {"aggregation": None}):
        trainer = build(LambdaGRPOTrainer, config(LambdaGRPOConfig, batch, **options), batch)
        assert len(trainer.create_optimizer().param_groups) == 2
    assert trainer.lambda_value is None


def own_optimizer(model, scheduler=True, learning_rate=1e-3):
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) if scheduler else None
    return optimizer, factor


@pytest.mark.parametrize("scheduler", [True, False])
def test_an_optimizer_that_the_user_built_stays_his_and_lambda_gets_a_companion(scheduler):
    model = build_model()
    options = {"trainer_options": {"optimizers": own_optimizer(model, scheduler)}, "max_steps": 3}
    result = run(model=model, lr_scheduler_type="linear", lambda_adam_eps=1e6, **options)
    main, companion = result.trainer.optimizer, result.trainer._lambda.companion
    assert len(main.param_groups) == 1 and not result.trainer._lambda.in_optimizer(main)
    assert type(companion) is torch.optim.AdamW and result.trainer._lambda.in_optimizer(companion)
    # With eps far above the gradient an AdamW step is its bias-corrected momentum over eps, times the schedule.
    factors = [1, 1 / 2, 1 / 3] if scheduler else [1, 2 / 3, 1 / 3]
    momentum, value, expected = 0.0, 0.0, []
    for t, grad in enumerate(result.lambda_grads):
        momentum = 0.9 * momentum + 0.1 * grad
        value -= 0.1 * factors[t] * momentum / (1 - 0.9 ** (t + 1)) / 1e6
        expected.append(value)
    assert result.lambdas == pytest.approx(expected, rel=1e-4)


def test_main_group_and_companion_take_the_same_steps():
    options = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4, "lr_scheduler_type": "linear"}
    joined = run(**options)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    apart = run(model=model, trainer_options={"optimizers": (optimizer, None)}, **options)
    assert apart.lambdas == joined.lambdas and len(set(joined.lambdas)) == 4


def test_a_companion_follows_a_schedule_that_is_no_lambda_lr():
    """`ReduceLROnPlateau` keeps no initial rate: the factor is against the rate that the user's optimizer had."""
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    options = {"max_steps": 2, "learning_rate": 1e-6, "lambda_adam_eps": 1e6}
    result = run(model=model, trainer_options={"optimizers": (optimizer, plateau)}, **options)
    steps = torch.tensor([0.0, *result.lambdas]).diff().abs()
    assert (steps < 0.1 * max(map(abs, result.lambda_grads)) / 1e6 * 1.01).all() and (steps > 0).all()
    optimizer.param_groups[0]["lr"] = 1e-4
    assert schedule_factor(plateau, 1e-3) == pytest.approx(0.1)
    assert base_learning_rate(optimizer, 7.0) == 1e-4 and base_learning_rate(object(), 7.0) == 7.0
    stepped = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.5), step_size=1, gamma=0.5)
    stepped.optimizer.step()
    stepped.step()
    assert schedule_factor(stepped, base_learning_rate(stepped.optimizer, 7.0)) == 0.5


def test_a_companion_is_restored_too(tmp_path):
    options = {"lambda_learning_rate": 0.5, "max_steps": 4, "lr_scheduler_type": "linear"}

    def go(folder, **more):
        model = build_model()
        optimizers = {"optimizers": own_optimizer(model, scheduler=False)}
        return run(model=model, trainer_options=optimizers, output_dir=str(tmp_path / folder), **options, **more)

    whole = go("whole")
    go("cut", save_strategy="steps", save_steps=2)
    state = json.loads((tmp_path / "cut" / "checkpoint-2" / "lambda_optimizer.json").read_text())
    assert state["state"]["0"]["step"]["values"] == [2.0]
    batch, model = Batch(), build_model(seed=5)
    args = config(LambdaGRPOConfig, batch, output_dir=str(tmp_path / "cut"), **options)
    resumed = build(LambdaGRPOTrainer, args, batch, model, optimizers=own_optimizer(model, scheduler=False))
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert resumed.lambda_value == whole.lambdas[-1]
    (tmp_path / "cut" / "checkpoint-2" / "lambda_optimizer.json").unlink()
    model = build_model()
    again = build(LambdaGRPOTrainer, args, batch, model, optimizers=own_optimizer(model, scheduler=False))
    with pytest.raises(ValueError, match="lambda_optimizer.json is missing"):
        again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))


def test_lambda_follows_the_schedule_of_the_model():
    result = run(lr_scheduler_type="linear", max_steps=4, learning_rate=1e-3, optim="sgd")
    factors = [group["lr"] for group in result.trainer.optimizer.param_groups]
    assert factors == [0.0, 0.0, 0.0]
    steps = torch.tensor([0.0, *result.lambdas]).diff()
    expected = [-0.1 * (1 - t / 4) * g for t, g in enumerate(result.lambda_grads)]
    torch.testing.assert_close(steps, torch.tensor(expected), rtol=1e-4, atol=1e-8)


def test_gradient_is_cleared_between_steps():
    """SGD on an unchanging model: each step's dL/dλ alone, not the sum of those before."""
    result = run(max_steps=5, learning_rate=0.0, **CUT)
    assert all(0 < abs(g) for g in result.lambda_grads)
    for step, before in zip(result.lambda_grads, [0.0, *result.lambdas], strict=False):
        probe = run(max_steps=1, learning_rate=0.0, lambda_init=before, **CUT)
        assert step == pytest.approx(probe.lambda_grads[0], rel=1e-4)
    assert result.trainer._lambda.tensor.grad is None


def test_adam_eps_makes_the_step_proportional_to_the_gradient():
    calm = run(optim="adamw_torch", learning_rate=1e-3)
    sign_like = run(optim="adamw_torch", learning_rate=1e-3, lambda_adam_eps=1e-8)
    grad = calm.lambda_grads[0]
    assert calm.lambdas[0] == pytest.approx(-0.1 * grad / (abs(grad) + 1), rel=1e-4)
    assert abs(sign_like.lambdas[0]) == pytest.approx(0.1, rel=1e-3)


def test_own_clip_apart_from_the_models():
    free = run(lambda_max_grad_norm=0.0)
    clipped = run(lambda_max_grad_norm=1e-4)
    assert abs(free.lambda_grads[0]) > 1e-3
    assert clipped.lambdas[0] == pytest.approx(math.copysign(0.1 * 1e-4, -free.lambda_grads[0]), rel=1e-4)
    assert clipped.logs[0]["lambda/grad"] == pytest.approx(free.lambda_grads[0], rel=1e-5)  # logged unclipped
    model_clip = run(max_grad_norm=1e-6)
    assert model_clip.lambdas[0] == pytest.approx(free.lambdas[0], rel=1e-5)


@pytest.mark.parametrize(("sign", "stop"), [(1, -1e-4), (-1, 2e-4)])
def test_projected_to_its_bounds_after_each_step(sign, stop):
    batch = Batch()
    batch.rewards = [sign * r for r in batch.rewards]
    options = {"max_steps": 3, "lambda_learning_rate": 5.0}
    free = run(batch, **options)
    assert all(abs(value) > 0.1 and value * stop > 0 for value in free.lambdas)
    bound = run(batch, lambda_bounds=[-1e-4, 2e-4], **options)
    assert bound.lambdas == [pytest.approx(stop)] * 3


class NotFiniteOnce(LambdaGRPOTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step == 1:
            loss = loss + self._lambda.tensor.sum() * float("nan")
        return loss


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    result = train(NotFiniteOnce, LambdaGRPOConfig, max_steps=3, optim="adamw_torch", learning_rate=0.0)
    assert result.lambdas[0] == result.lambdas[1] != result.lambdas[2]
    assert math.isfinite(result.lambdas[2])
    assert [entry["lambda/skipped"] for entry in result.logs] == [0, 1, 1]
    assert [entry["lambda/grad"] is None for entry in result.logs] == [False, True, False]


def test_lambda_is_not_part_of_the_model():
    trainer = run().trainer
    assert all(p is not trainer._lambda.tensor for p in trainer.model.parameters())
    assert not any("lambda" in name for name in trainer.model.state_dict())


def test_two_iterations_use_lambda_as_it_is_at_each():
    result = run(num_iterations=2, max_steps=2, lambda_learning_rate=50.0)
    assert result.logs[0]["length_weight/ess"] == pytest.approx(1.0)
    weights = torch.tensor(reference.length_weights(LENGTHS, result.lambdas[0], "lambda"))
    ess = (weights.sum(1) ** 2 / (4 * (weights**2).sum(1))).mean().item()
    assert result.logs[1]["length_weight/ess"] == pytest.approx(ess, rel=1e-4) and ess < 0.999
    assert result.logs[1]["length_weight/max"] == pytest.approx(weights.max().item(), rel=1e-4)


# ---- Directions ----


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("aggregation", ["lambda", "power"])
def test_lambda_moves_to_where_length_is_worth_something(aggregation, sign):
    batch = Batch()
    batch.rewards = [sign * n / 12 for n in sum(LENGTHS, [])]
    result = run(batch, aggregation=aggregation, max_steps=5, lambda_learning_rate=1.0)
    assert result.lambdas[-1] * sign > 0.05


# ---- Metrics ----


def prompt_ids(row: int) -> list[int]:
    return build_tokenizer()(prompt(row // 4))["input_ids"]


def logps_of(model, prompt: list[int], completion: list[int]) -> list[float]:
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


def test_metrics():
    batch = Batch()
    result = run(batch, lambda_init=2.0, token_regulation="sigmoid", **CUT, logging_steps=2, max_steps=2)
    log = result.logs[0]
    assert {"lambda/value", "lambda/grad", "lambda/skipped"} <= log.keys()
    assert log["lambda/value"] == result.lambdas[-1]  # the last, not the mean of the interval
    v, lengths = [], sum(LENGTHS, [])
    f = sum(reference.length_weights(LENGTHS, 2.0, "lambda"), [])
    model = build_model()
    mass = []
    ordered = sorted(lengths)
    edges = [ordered[math.ceil(12 * q / 4) - 1] for q in (1, 2, 3)]
    rewards = torch.tensor(batch.rewards).view(3, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten().tolist()
    for row, completion in enumerate(batch.completions):
        logps = logps_of(model, prompt_ids(row), completion)
        weights = [reference.probability_weight(x, "sigmoid") for x in logps]
        v += weights
        quartile = sum(lengths[row] > edge for edge in edges)
        mass += [(abs(advantages[row]) * f[row] * w, quartile) for w in weights]
    assert log["token_weight/mean"] == pytest.approx(sum(v) / len(v), rel=1e-4)
    assert log["token_weight/min"] == pytest.approx(min(v)) and log["token_weight/max"] == pytest.approx(max(v))
    shares = [log[f"share/length_q{q}"] for q in (1, 2, 3, 4)]
    assert shares == pytest.approx(reference.loss_shares(mass), rel=2e-3)  # λ has moved a little in the second step


def test_share_by_probability_quartile():
    """Quarters of the tokens by probability, least probable first, from plain lists; a token on an edge is split."""
    batch = Batch()
    log = run(batch, lambda_init=2.0, token_regulation="sigmoid").logs[0]
    f = sum(reference.length_weights(LENGTHS, 2.0, "lambda"), [])
    model, rewards = build_model(), torch.tensor(batch.rewards).view(3, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten().tolist()
    tokens = []
    for row, completion in enumerate(batch.completions):
        logps = logps_of(model, prompt_ids(row), completion)
        tokens += [(abs(advantages[row]) * f[row] * reference.probability_weight(x, "sigmoid"), x) for x in logps]
    quarter, parts = len(tokens) / 4, []
    for place, (mass, _) in enumerate(sorted(tokens, key=lambda token: token[1])):
        inside = [max(0.0, min(place + 1, (q + 1) * quarter) - max(place, q * quarter)) for q in range(4)]
        parts += [(mass * part, q) for q, part in enumerate(inside)]
    expected = reference.loss_shares(parts)
    # Tokens whose -log π differs by less than 0.85 % count as one: those around an edge.
    # The package finds its edges in a histogram, whose bins span 3.4 % of -log π each.
    assert [log[f"share/probability_q{q}"] for q in (1, 2, 3, 4)] == pytest.approx(expected, rel=3.4e-2)
    assert max(expected) - min(expected) > 0.05


@pytest.mark.parametrize(("member", "loss_type"), [("grpo", "grpo"), ("grpo", "sapo"), ("dapo", "dapo")])
def test_shares_are_of_the_loss_whoever_reduces_it(member, loss_type):
    """The same loss by TRL's own reduction and by ours has the same shares."""
    ours = run(aggregation=member, loss_type="sapo" if loss_type == "sapo" else "dapo").logs[0]
    theirs = run(aggregation=None, loss_type=loss_type, token_regulation="linear", regulation_alpha=0.0).logs[0]
    for q in (1, 2, 3, 4):
        assert theirs[f"share/length_q{q}"] == pytest.approx(ours[f"share/length_q{q}"], rel=1e-5)


def test_tr_grpo_logs_its_weights_and_no_lambda():
    log = train(TRGRPOTrainer, TRGRPOConfig).logs[0]
    assert log["token_weight/max"] == pytest.approx(1.4)
    assert not any(key.startswith(("lambda/", "length_weight/")) for key in log)
    assert "share/length_q1" in log and "token_weight/clipped_by_regulation" not in log


def test_metrics_reach_the_trackers(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is in the dev extra"
    )
    run(report_to="tensorboard", output_dir=str(tmp_path), max_steps=2)
    events = event_accumulator.EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent)).Reload()
    tags = events.Tags()["scalars"]
    assert {"train/lambda/value", "train/length_weight/ess", "train/share/length_q4"} <= set(tags)
    assert len(events.Scalars("train/lambda/value")) == 2


# ---- On disk ----


def test_lambda_json_beside_every_saved_model(tmp_path):
    result = run(output_dir=str(tmp_path), max_steps=2, save_strategy="steps", save_steps=1)
    for step in (1, 2):
        saved = json.loads((tmp_path / f"checkpoint-{step}" / "lambda.json").read_text())
        assert saved["lambda"] == result.lambdas[step - 1]  # to the last bit
        assert saved["aggregation"] == "lambda" and saved["global_step"] == step
    result.trainer.save_model(str(tmp_path / "final"))
    assert json.loads((tmp_path / "final" / "lambda.json").read_text())["lambda"] == result.lambdas[-1]
    assert not list(tmp_path.rglob("*.tmp"))


def test_no_lambda_no_file(tmp_path):
    train(TRGRPOTrainer, TRGRPOConfig, output_dir=str(tmp_path)).trainer.save_model(str(tmp_path))
    assert not (tmp_path / "lambda.json").exists()


def test_lambda_and_its_optimizer_state_are_restored(tmp_path):
    """Momentum of λ's Adam group included: a resumed run ends where an uninterrupted one does."""
    options = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4, "lambda_learning_rate": 0.5}
    whole = run(output_dir=str(tmp_path / "whole"), **options)
    run(output_dir=str(tmp_path / "cut"), save_strategy="steps", save_steps=2, **options)
    batch = Batch()
    args = config(LambdaGRPOConfig, batch, output_dir=str(tmp_path / "cut"), **options)
    resumed = build(LambdaGRPOTrainer, args, batch, build_model(seed=5))
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert resumed.lambda_value == whole.lambdas[-1]
    for mine, theirs in zip(resumed.model.parameters(), whole.trainer.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def resume(tmp_path, change, **options):
    run(output_dir=str(tmp_path), max_steps=1, save_strategy="steps", save_steps=1)
    change(tmp_path / "checkpoint-1" / "lambda.json")
    batch = Batch()
    trainer = build(
        LambdaGRPOTrainer, config(LambdaGRPOConfig, batch, output_dir=str(tmp_path), max_steps=2, **options), batch
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda f: f.unlink(), {}, r"lambda.json is missing.*To start λ afresh .* pass model="),
        (lambda f: f.write_text("{"), {}, r"lambda.json is damaged.*To start λ afresh"),
        (lambda f: f.write_text('{"lambda": "x", "skipped": 0}'), {}, "lambda.json is damaged"),
        (lambda f: f.write_text('{"lambda": NaN, "skipped": 0}'), {}, "lambda.json is damaged"),
        (lambda f: f.write_text('{"lambda": 0.5, "skipped": 0}'), {}, "lambda.json is damaged"),
        (lambda f: None, {"aggregation": "power"}, "aggregation='power', but .* was trained with 'lambda'"),
        (lambda f: None, {"lambda_learnable": False}, r"lambda_init=0.0 is fixed .* Resume with lambda_init=-?0\.0"),
    ],
)
def test_a_checkpoint_without_the_right_lambda_raises(tmp_path, change, options, message):
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, change, **options)


def test_peft_adapter_with_lambda_beside_it(tmp_path, model_folder):
    from peft import LoraConfig

    options = {"output_dir": str(tmp_path), "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    result = run(
        model=model_folder,
        trainer_options={"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")},
        learning_rate=1e-2,
        beta=0.1,
        **options,
    )
    folder = tmp_path / "checkpoint-2"
    assert (folder / "adapter_model.safetensors").exists()
    assert json.loads((folder / "lambda.json").read_text())["lambda"] == result.lambdas[-1] != 0.0
    optimizer = result.trainer.optimizer
    adapters = [p for p in result.trainer.model.parameters() if p.requires_grad]
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, [*adapters, result.trainer._lambda.tensor]))


# ---- Construction ----


def test_args_none_builds_a_default_config(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL's default is bf16, which its check allows on a GPU only.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    batch = Batch()
    for trainer_class, config_class in [(LambdaGRPOTrainer, LambdaGRPOConfig), (TRGRPOTrainer, TRGRPOConfig)]:
        trainer = trainer_class(model_folder, lambda completions, **kwargs: [0.0], train_dataset=batch.dataset())
        assert type(trainer.args) is config_class
        assert trainer.args.output_dir.endswith(f"-{trainer_class._name}")
    assert trainer.args.token_regulation == "sigmoid" and trainer.args.aggregation is None


def test_reward_signature_of_trl_keeps_working():
    seen = {}

    def with_metrics(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **kwargs):
        seen["step"] = trainer_state.global_step
        log_metric("mine", 1.0)
        return [float(len(ids)) for ids in completion_ids]

    batch = Batch()
    result = run(batch, trainer_options={"reward_funcs": [with_metrics, batch.reward]})
    assert seen["step"] == 0 and result.logs[0]["mine"] == 1.0


def test_a_plain_config_is_not_one_of_ours():
    assert not issubclass(GRPOConfig, LambdaGRPOConfig) and issubclass(TRGRPOConfig, LambdaGRPOConfig)
