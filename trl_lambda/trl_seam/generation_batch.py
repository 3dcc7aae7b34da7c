"""The responses of one generation batch, as every process knows them: own-token lengths and advantages by group.

At the loss a group is spread over micro-batches, optimizer steps and processes. Each row carries its place in the
generation batch; what is known about all rows is held once per process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

# Entry added to the scored batch: each row's place in the generation batch, (B,). Dimension 0 is this process's rows,
# so that TRL's shuffle and split keep it right.
ROW_KEY = "generation_batch_row"
# Entries of the scored batch that TRL passes to a forward pass beside the tokens.
FORWARD_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
FEATURES_KEY = "generation_batch_features"  # (B, K), where λ weighs more than length


@dataclass(frozen=True)
class GenerationBatch:
    """Lengths |o| in own tokens and advantages A, both (P, G), the same on every process."""

    lengths: torch.Tensor
    advantages: torch.Tensor | None  # `None` where a subclass has one per token
    features: Mapping[str, torch.Tensor] = field(default_factory=dict)  # what else λ weighs, name -> (P, G)
    turns: torch.Tensor | None = None  # number of turns of each conversation, (P, G), where there are tools


def own_tokens(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Mask of the tokens that the policy itself wrote and that count in the loss, (B, T)."""
    mask, tool_mask = inputs["completion_mask"], inputs.get("tool_mask")
    return mask if tool_mask is None else mask * tool_mask


def count_turns(own: torch.Tensor) -> torch.Tensor:
    """
    Number of turns of each conversation: maximal runs of own tokens.

    A turn that was cut off before its first token is none; two turns with nothing between them are one.

    Args:
        own (`torch.Tensor`): mask of the policy's own tokens, 0 on padding too, (B, T).

    Returns:
        `torch.Tensor`: long, (B,); 0 for a row without own tokens.
    """
    own = own.bool()
    begins = own.clone()
    begins[:, 1:] &= ~own[:, :-1]
    return begins.sum(dim=1)


def number_rows(output: dict[str, Any], accelerator: Accelerator) -> None:
    """Give each row of a freshly scored local batch its place in the generation batch."""
    rows = output["completion_mask"].size(0)
    start = accelerator.process_index * rows
    output[ROW_KEY] = torch.arange(start, start + rows, device=output["completion_mask"].device)


def gather_generation_batch(
    micro_batches: Sequence[Mapping[str, Any]],
    rows: int,
    group_size: int,
    accelerator: Accelerator,
    features: Sequence[str] = (),
    *,
    with_turns: bool = False,
) -> GenerationBatch:
    """
    Collect lengths, advantages and features of all processes' rows in one collective. Every process must call it.

    Args:
        micro_batches (`Sequence[dict]`): this process's whole share of the generation batch, in any order.
        rows (`int`): how many rows were scored on this process; a row that is missing since has no tokens.
        group_size (`int`): G.
        accelerator (`Accelerator`): gathers over the processes.
        features (`Sequence[str]`): names of the columns of the micro-batches' features.
        with_turns (`bool`): whether conversations may have several turns, the same on every process.

    Returns:
        `GenerationBatch`: lengths (P, G) int32, advantages and features (P, G) float32.

    Raises:
        `RuntimeError`: a subclass has returned rows without their places.
    """
    if any(ROW_KEY not in batch for batch in micro_batches):
        raise RuntimeError(
            f"The scored batch has no {ROW_KEY!r}, by which rows find their group: a subclass of the trainer builds "
            "it anew in _generate_and_score_completions. Return the dictionary that super() returned, with its "
            "entries changed."
        )
    place = torch.cat([batch[ROW_KEY] for batch in micro_batches]) - accelerator.process_index * rows
    lengths = torch.cat([own_tokens(batch).sum(dim=1) for batch in micro_batches])
    per_row = all(batch["advantages"].dim() == 1 for batch in micro_batches)
    columns = [lengths, *([torch.cat([batch["advantages"] for batch in micro_batches])] if per_row else [])]
    if features:
        columns += torch.cat([batch[FEATURES_KEY] for batch in micro_batches]).unbind(dim=1)
    if with_turns:
        columns.append(torch.cat([count_turns(own_tokens(batch)) for batch in micro_batches]))
    # float32 holds a length exactly up to 2^24 tokens.
    local = torch.zeros(rows, len(columns), dtype=torch.float32, device=lengths.device)
    local[place] = torch.stack([column.float() for column in columns], dim=1)
    gathered: Any = accelerator.gather(local)
    everywhere = gathered.view(-1, group_size, len(columns))
    advantages = everywhere[..., 1].contiguous() if per_row else None
    first = 1 + per_row
    named = zip(features, everywhere[..., first : first + len(features)].unbind(dim=-1), strict=True)
    turns = everywhere[..., -1].to(torch.int32) if with_turns else None
    return GenerationBatch(everywhere[..., 0].to(torch.int32), advantages, dict(named), turns)
