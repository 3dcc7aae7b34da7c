"""A tiny model, prepared completions and one way to run a trainer and look at what it did."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RMSNorm, Qwen2RotaryEmbedding
from trl import GRPOConfig, GRPOTrainer

from trl_lambda import LambdaGRPOConfig, LambdaGRPOTrainer

VOCABULARY = 32
EOS = 1
LENGTHS = [[3, 1, 12, 6], [2, 2, 9, 5], [7, 4, 1, 11]]  # (P, G) = (3, 4), very unequal
LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="w2", padding_side="left"
    )


class DoubleNorm(Qwen2RMSNorm):
    def forward(self, hidden_states):
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


class DoubleRotary(Qwen2RotaryEmbedding):
    """A cosine in float32 depends on the width of a vector register."""

    def forward(self, x, position_ids):
        half = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat((half, half), dim=-1)
        return angles.cos(), angles.sin()


class DoubleAttention(Qwen2Attention):
    """The fused attention keeps a float32 sum for its backward pass."""

    def forward(self, *args, **kwargs):
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(*args, **kwargs)


# What a Qwen2 in float64 computes in float32 all the same -> the same in float64.
IN_DOUBLE = {Qwen2RMSNorm: DoubleNorm, Qwen2RotaryEmbedding: DoubleRotary, Qwen2Attention: DoubleAttention}


def build_model(seed: int = 0, std: float = 0.6, hidden: int = 16, double: bool = False) -> Qwen2ForCausalLM:
    """Random weights, so large that token probabilities spread over (0, 1); `double`: in float64 throughout."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    tokens = {"pad_token_id": 0, "eos_token_id": EOS, "bos_token_id": None}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **tokens, initializer_range=std, tie_word_embeddings=False))
    if double:
        model.double()
        for module in model.modules():
            module.__class__ = IN_DOUBLE.get(type(module), type(module))
    return model


def prompt(p: int) -> str:
    return f"w{3 + p} w{7 + p}"


def prompt_ids(batch: Batch) -> list[list[int]]:
    """The prompt of each row."""
    tokenizer, size = build_tokenizer(), batch.num_generations
    return [tokenizer(prompt(row // size))["input_ids"] for row in range(len(batch.completions))]


def tool_mask(lengths: list[list[int]]) -> list[list[int]]:
    """Own tokens of each row: every third token came from a tool, and row 8 has none of its own."""
    rows = enumerate(n for group in lengths for n in group)
    return [[0] * n if row == 8 else [int(t % 3 != 1) for t in range(n)] for row, n in rows]


@functools.cache
def sample_completions(lengths: tuple[int, ...], num_generations: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Tokens drawn from the tiny model itself, so that their probabilities are those of a policy's own samples."""
    model, tokenizer = build_model(double=True), build_tokenizer()  # the same tokens on every processor
    generator = torch.Generator().manual_seed(seed)
    completions = []
    for row, length in enumerate(lengths):
        ids = tokenizer(prompt(row // num_generations))["input_ids"]
        start = len(ids)
        for _ in range(length):
            with torch.no_grad():
                probs = model(torch.tensor([ids])).logits[0, -1].softmax(dim=-1).float()
            probs[:2] = 0  # neither padding nor an early end
            ids = [*ids, torch.multinomial(probs, 1, generator=generator).item()]
        completions.append(tuple(ids[start:]))
    return tuple(completions)


@dataclass
class Batch:
    """Prepared completions: `lengths` (P, G), the last token an EOS unless `truncated` says otherwise."""

    lengths: list[list[int]] = field(default_factory=lambda: [list(row) for row in LENGTHS])
    truncated: set[int] = field(default_factory=set)  # flat row numbers
    # Mask of own tokens: (row, length) -> mask, or all of them by row
    env_mask: Callable[[int, int], list[int]] | list[list[int]] | None = None
    seed: int = 0
    tied: list[int] = field(default_factory=list)  # groups whose responses all have the same reward

    def __post_init__(self):
        lengths = [n for group in self.lengths for n in group]
        drawn = enumerate(sample_completions(tuple(lengths), self.num_generations, self.seed))
        self.completions = [list(ids) if row in self.truncated else [*ids[:-1], EOS] for row, ids in drawn]
        self.rewards = torch.rand(len(lengths), generator=torch.Generator().manual_seed(self.seed)).tolist()
        for p in self.tied:
            self.rewards[p * self.num_generations : (p + 1) * self.num_generations] = [0.7] * self.num_generations

    @property
    def num_generations(self) -> int:
        return len(self.lengths[0])

    def dataset(self, repeats: int = 1) -> Dataset:
        return Dataset.from_dict({"prompt": [prompt(p) for p in range(len(self.lengths))] * repeats})

    def rollout(self, prompts, trainer):
        start = trainer.accelerator.process_index * len(prompts)
        rows = list(range(start, start + len(prompts)))
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        completions = [self.completions[row % len(self.completions)] for row in rows]
        output = {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, "row": rows}
        if callable(self.env_mask):
            output["env_mask"] = [self.env_mask(row, len(c)) for row, c in zip(rows, completions, strict=True)]
        elif self.env_mask is not None:
            output["env_mask"] = [self.env_mask[row % len(self.env_mask)] for row in rows]
        return output

    def reward(self, completions, row, **kwargs):
        return [self.rewards[r % len(self.rewards)] for r in row]


@dataclass
class Run:
    """What one training run did."""

    trainer: object
    losses: list[float]
    grads: list[dict[str, torch.Tensor]]
    lambda_grads: list[float | None]
    lambdas: list[float | None]

    @property
    def logs(self) -> list[dict]:
        return [entry for entry in self.trainer.state.log_history if "loss" in entry]

    def parameters(self) -> dict[str, torch.Tensor]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return {n: p.detach().clone() for n, p in model.named_parameters()}


class _Watch(TrainerCallback):
    def __init__(self, run: Run):
        self.run = run

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        unwrapped = self.run.trainer.accelerator.unwrap_model(model)
        # Engines keep shards of their own kinds.
        grads = {n: p.grad for n, p in unwrapped.named_parameters() if type(p.grad) is torch.Tensor}
        self.run.grads.append({n: grad.detach().clone() for n, grad in grads.items()})

    def on_step_end(self, args, state, control, **kwargs):
        self.run.lambdas.append(getattr(self.run.trainer, "lambda_value", None))


def config(config_class: type[GRPOConfig], batch: Batch, **options) -> GRPOConfig:
    """One process, CPU, fp32, SGD without clipping or warm-up: what is compared is the gradient itself."""
    defaults = {"output_dir": tempfile.mkdtemp(prefix="trl_lambda_test_"), "seed": 3, "shuffle_dataset": False}
    defaults |= {"num_generations": batch.num_generations, "per_device_train_batch_size": len(batch.completions)}
    defaults |= {"gradient_accumulation_steps": 1, "max_completion_length": 16, "max_steps": 1, "max_grad_norm": 1e9}
    defaults |= {"optim": "sgd", "learning_rate": 0.0, "lr_scheduler_type": "constant"}
    defaults |= {"bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    defaults |= {"report_to": "none", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    return config_class(**(defaults | options))


def build(trainer_class, args, batch: Batch, model=None, noise: float = 0.0, **options):
    """
    A trainer on prepared completions, whose losses are recorded in `trainer.seen_losses`. `noise` puts the old
    log-probabilities that far off the current ones, by row and token, so that ratios are not 1. Around a model in
    float64 (`build_model(double=True)`) advantages, lengths and λ are float64 as well.
    """
    model = build_model() if model is None else model
    is_double = getattr(model, "dtype", None) is torch.float64

    class Recording(trainer_class):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            if noise:
                output["old_per_token_logps"] = off_policy_logps(self, output, noise)
            if is_double:
                output["advantages"] = output["advantages"].double()
            return output

        def compute_loss(self, *a, **k):
            loss = super().compute_loss(*a, **k)
            self.seen_losses.append(loss.item())
            return loss

    Recording.__name__ = trainer_class.__name__
    Recording.seen_losses = []
    given = {"reward_funcs": batch.reward, "train_dataset": batch.dataset(repeats=8)} | options
    given = {"processing_class": build_tokenizer(), "rollout_func": batch.rollout} | given
    trainer = Recording(model=model, args=args, **given)
    if is_double:
        score_in_double(trainer.model)
        if getattr(trainer, "_lambda", None) is not None:
            trainer._lambda.tensor.data = trainer._lambda.tensor.data.double()
    return trainer


def score_in_double(model) -> None:
    """Score in float64 where TRL's fused LM head (1.15 and newer) casts to float32."""
    forward = model.forward

    def double_forward(*args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return forward(*args, **kwargs)
        logps = forward(*args, **kwargs).logits[:, :-1].log_softmax(dim=-1)
        targets = labels[:, 1:]
        chosen = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        entropies = -(logps.exp() * logps).sum(dim=-1)
        chosen, entropies = (values.masked_fill(targets == -100, 0) for values in (chosen, entropies))
        from trl.trainer.utils import FusedCausalLMOutput  # what this stands for: older versions have neither

        return FusedCausalLMOutput(log_probs=chosen, entropy=entropies)

    model.forward = double_forward


def make(
    batch=None,
    model=None,
    *,
    trainer_class=LambdaGRPOTrainer,
    config_class=LambdaGRPOConfig,
    arguments=None,
    **options,
):
    """A trainer on prepared completions; `arguments` are its own, `options` the configuration's."""
    batch = Batch() if batch is None else batch
    return build(trainer_class, config(config_class, batch, **options), batch, model, **(arguments or {}))


def train(trainer_class, config_class, batch: Batch | None = None, *, model=None, trainer_options=None, **options):
    """Train on prepared completions and return the `Run`."""
    classes = {"trainer_class": trainer_class, "config_class": config_class}
    run = watch(make(batch, model, arguments=trainer_options, **classes, **options))
    run.trainer.train()
    return run


def train_ours(batch: Batch | None = None, **options) -> Run:
    return train(LambdaGRPOTrainer, LambdaGRPOConfig, batch, **options)


def train_trl(batch: Batch | None = None, **options) -> Run:
    return train(GRPOTrainer, GRPOConfig, batch, **options)


def by_length(sign: int = 1, **fields) -> Batch:
    batch = Batch(**fields)
    batch.rewards = [sign * len(c) / 12 for c in batch.completions]
    return batch


def watch(trainer) -> Run:
    """A `Run` that fills while the trainer trains."""
    run = Run(trainer, trainer.seen_losses, [], [], [])
    trainer.callback_handler.callbacks.insert(0, _Watch(run))
    parameter = getattr(trainer, "_lambda", None)
    if parameter is not None and parameter.learning.is_learnable:
        clip = parameter.clip_gradient

        def watched_clip():
            clip()
            run.lambda_grads.append(parameter.grads[-1])

        parameter.clip_gradient = watched_clip
    return run


def off_policy_logps(trainer, inputs: dict, noise: float) -> torch.Tensor:
    """Current log-probabilities plus noise that depends on the row of the whole batch and the token alone."""
    ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
    with torch.no_grad():
        size = inputs["completion_ids"].size(1)
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, size)[0]
    first = trainer.accelerator.process_index * logps.size(0)
    for row in range(logps.size(0)):
        generator = torch.Generator().manual_seed(first + row)
        logps[row] += noise * torch.randn(64, generator=generator)[: logps.size(1)]
    return logps


def assert_equal_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def assert_same_bits(a: Run, b: Run) -> None:
    """Losses and every gradient of every step agree to the last bit."""
    assert a.losses == b.losses and len(a.grads) == len(b.grads) > 0
    for mine, theirs in zip(a.grads, b.grads, strict=True):
        assert_equal_tensors(mine, theirs)


def assert_same_parameters(a: Run, b: Run) -> None:
    assert_equal_tensors(a.parameters(), b.parameters())


def largest_deviation(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """max |a - b| over all gradients, relative to the largest entry of b."""
    scale = max(g.abs().max().item() for g in b.values())
    return max((a[name] - b[name]).abs().max().item() for name in b) / scale


def assert_equal_in_double(a: Run, b: Run) -> None:
    """Losses and gradients of every step, of two runs in float64."""
    assert a.losses == pytest.approx(b.losses, rel=1e-9, abs=1e-12)
    assert len(a.grads) == len(b.grads) > 0
    for step, (mine, theirs) in enumerate(zip(a.grads, b.grads, strict=True)):
        assert largest_deviation(mine, theirs) < 1e-9, step
