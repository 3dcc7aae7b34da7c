"""Batches of a model's own completions of training problems, and their log-probabilities with gradient."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.playground.rewards import exact_answer
from recipes.playground.tasks import make_splits
from recipes.studies.alignment.policy_gradient import Batch
from recipes.studies.shared.run import GENERATIONS, MAX_COMPLETION_LENGTH, PROMPTS

SAMPLING_SEED = 7000  # plus the run's seed: not what training draws with
BATCHES_AT_ONCE = 8  # sampled in one call
ROWS_AT_ONCE = 16  # differentiated together


def sample_batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, *, seed: int, count: int
) -> list[Batch]:
    """
    Sample batches of `PROMPTS` × `GENERATIONS` completions at temperature 1, no training problem twice.

    Equal seeds give equal problems, also to different models. The global random state is left alone.

    Args:
        model (`PreTrainedModel`): the policy; it is left in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): pads on the left.
        task (`str`): a name in `TASKS`.
        seed (`int`): of problems and sampling.
        count (`int`): K, batches.

    Returns:
        `list[Batch]`: with `inputs` as `token_logps` wants them.

    Raises:
        ValueError: if the training split has too few problems, or the tokenizer no end token.
    """
    problems = make_splits(task)["train"]
    if count * PROMPTS > len(problems):
        raise ValueError(f"{count} batches need {count * PROMPTS} problems; {task} has {len(problems)}.")
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ValueError(f"the tokenizer has no end token of its own: eos_token_id is {end}.")
    model.eval()
    generate: Any = model.generate
    batches: list[Batch] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SAMPLING_SEED + seed)
        drawn = [problems[i] for i in torch.randperm(len(problems))[: count * PROMPTS].tolist()]
        for start in range(0, len(drawn), BATCHES_AT_ONCE * PROMPTS):
            repeated = [p for p in drawn[start : start + BATCHES_AT_ONCE * PROMPTS] for _ in range(GENERATIONS)]
            prompts = tokenizer(
                [p.prompt for p in repeated], padding=True, return_tensors="pt", return_token_type_ids=False
            )
            output = generate(
                **prompts,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=MAX_COMPLETION_LENGTH[task],
            )
            completions = output[:, prompts["input_ids"].size(1) :]  # (rows, T)
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            rewards = torch.tensor(exact_answer(texts, [p.solution for p in repeated]))
            own = own_tokens(completions, end)
            inputs = {"prompt_ids": prompts["input_ids"], "prompt_mask": prompts["attention_mask"]}
            inputs["completion_ids"] = completions
            for rows in torch.arange(len(repeated)).split(PROMPTS * GENERATIONS):
                parts = {name: tensor[rows] for name, tensor in inputs.items()}
                batches.append(Batch(parts, own[rows], rewards[rows].view(-1, GENERATIONS)))
    return batches


def own_tokens(completions: torch.Tensor, end: int) -> torch.Tensor:
    """Tokens up to the first end token, with it; (B, T) in, bool (B, T) out."""
    ends = completions == end
    return ends.cumsum(dim=1) - ends.long() == 0


def token_logps(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """
    log π of the completions' tokens as TRL computes it, at temperature 1.

    Rows of like length go through the model together: one long completion would have all others padded to its length,
    in every backward pass.

    Args:
        model (`PreTrainedModel`): the policy.
        batch (`Batch`): `inputs` are `prompt_ids` and `prompt_mask`, (B, S), padded on the left, and `completion_ids`,
            (B, T).

    Returns:
        `torch.Tensor`: (B, T), with graph; 0 or meaningless where the mask is off.
    """
    order = batch.mask.sum(dim=1).argsort()
    parts = []
    for rows in order.split(ROWS_AT_ONCE):
        prompt_mask, own = batch.inputs["prompt_mask"][rows], batch.mask[rows]
        first, width = int(prompt_mask.any(dim=0).int().argmax()), int(own.sum(dim=1).max())
        tokens = batch.inputs["completion_ids"][rows, :width]
        logits = model(
            input_ids=torch.cat([batch.inputs["prompt_ids"][rows, first:], tokens], dim=1),
            attention_mask=torch.cat([prompt_mask[:, first:], own[:, :width].long()], dim=1),
            logits_to_keep=width + 1,
            use_cache=False,
        ).logits[:, :-1]
        logps = logits.log_softmax(dim=-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
        parts.append(torch.nn.functional.pad(logps, (0, own.size(1) - width)))
    return torch.cat(parts)[order.argsort()]
