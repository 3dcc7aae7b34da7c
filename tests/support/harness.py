"""A tiny model, prepared completions and one way to run a trainer and look at what it did."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RMSNorm, Qwen2RotaryEmbedding
from trl import GRPOConfig

VOCABULARY = 32
EOS = 1
LENGTHS = [[3, 1, 12, 6], [2, 2, 9, 5], [7, 4, 1, 11]]  # (P, G) = (3, 4), very unequal


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="w2", padding_side="left"
    )


class DoubleNorm(Qwen2RMSNorm):
    """The same norm without its cast to float32."""

    def forward(self, hidden_states):
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


class DoubleRotary(Qwen2RotaryEmbedding):
    """The same angles without their cast to float32, whose cosine depends on the width of a vector register."""

    def forward(self, x, position_ids):
        half = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat((half, half), dim=-1)
        return angles.cos(), angles.sin()


class DoubleAttention(Qwen2Attention):
    """The same attention by plain matrix products: the fused one keeps a float32 sum for its backward pass."""

    def forward(self, *args, **kwargs):
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(*args, **kwargs)


# What a Qwen2 in float64 computes in float32 all the same -> the same in float64.
IN_DOUBLE = {Qwen2RMSNorm: DoubleNorm, Qwen2RotaryEmbedding: DoubleRotary, Qwen2Attention: DoubleAttention}


def build_model(seed: int = 0, std: float = 0.6, hidden: int = 16, double: bool = False) -> Qwen2ForCausalLM:
    """
    Random weights large enough that token probabilities spread over (0, 1).

    `double` computes the same weights in float64 throughout; a trainer that `build` puts around it does so too.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=std,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    if double:
        model.double()
        for module in model.modules():
            module.__class__ = IN_DOUBLE.get(type(module), type(module))
    return model


def prompt(p: int) -> str:
    return f"w{3 + p} w{7 + p}"


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
        drawn = sample_completions(tuple(lengths), self.num_generations, self.seed)
        self.completions = [
            list(tokens) if row in self.truncated else [*tokens[:-1], EOS] for row, tokens in enumerate(drawn)
        ]
        self.rewards = torch.rand(len(lengths), generator=torch.Generator().manual_seed(self.seed)).tolist()
        for p in self.tied:
            size = self.num_generations
            self.rewards[p * size : (p + 1) * size] = [0.7] * size

    @property
    def num_generations(self) -> int:
        return len(self.lengths[0])

    def dataset(self, repeats: int = 1) -> Dataset:
        return Dataset.from_dict({"prompt": [prompt(p) for p in range(len(self.lengths))] * repeats})

    def rollout(self, prompts, trainer):
        start = trainer.accelerator.process_index * len(prompts)
        rows = range(start, start + len(prompts))
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        completions = [self.completions[row % len(self.completions)] for row in rows]
        output = {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}
        output["row"] = list(rows)
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
        return {
            n: p.detach().clone()
            for n, p in self.trainer.accelerator.unwrap_model(self.trainer.model).named_parameters()
        }


class _Watch(TrainerCallback):
    def __init__(self, run: Run):
        self.run = run

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        unwrapped = self.run.trainer.accelerator.unwrap_model(model)
        named = {
            n: p.grad.detach().clone()
            for n, p in unwrapped.named_parameters()
            if p.grad is not None and type(p.grad) is torch.Tensor  # engines keep shards of their own kinds
        }
        self.run.grads.append(named)

    def on_step_end(self, args, state, control, **kwargs):
        self.run.lambdas.append(getattr(self.run.trainer, "lambda_value", None))


def config(config_class: type[GRPOConfig], batch: Batch, **options) -> GRPOConfig:
    """One process, CPU, fp32, SGD without clipping or warm-up: what is compared is the gradient itself."""
    rows = len(batch.completions)
    defaults = {
        "output_dir": tempfile.mkdtemp(prefix="trl_lambda_test_"),
        "num_generations": batch.num_generations,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 16,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "seed": 3,
    }
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
    trainer = Recording(
        model=model,
        reward_funcs=options.pop("reward_funcs", batch.reward),
        args=args,
        train_dataset=options.pop("train_dataset", batch.dataset(repeats=8)),
        processing_class=options.pop("processing_class", build_tokenizer()),
        rollout_func=batch.rollout,
        **options,
    )
    if is_double:
        score_in_double(trainer.model)
    if is_double and getattr(trainer, "_lambda", None) is not None:
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


def train(trainer_class, config_class, batch: Batch | None = None, *, model=None, trainer_options=None, **options):
    """Train on prepared completions and return the `Run`."""
    batch = Batch() if batch is None else batch
    trainer = build(trainer_class, config(config_class, batch, **options), batch, model, **(trainer_options or {}))
    run = watch(trainer)
    trainer.train()
    return run


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
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
        )[0]
    first = trainer.accelerator.process_index * logps.size(0)
    for row in range(logps.size(0)):
        generator = torch.Generator().manual_seed(first + row)
        logps[row] += noise * torch.randn(64, generator=generator)[: logps.size(1)]
    return logps


def assert_same_bits(a: Run, b: Run) -> None:
    """Losses and every gradient of every step agree to the last bit."""
    assert a.losses == b.losses
    assert len(a.grads) == len(b.grads) > 0
    for mine, theirs in zip(a.grads, b.grads, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


def largest_deviation(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """max |a - b| over all gradients, relative to the largest entry of b."""
    scale = max(g.abs().max().item() for g in b.values())
    return max((a[name] - b[name]).abs().max().item() for name in b) / scale
