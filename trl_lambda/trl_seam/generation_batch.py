"""The responses of one generation batch, as every process knows them: own-token lengths and advantages by group.

At the loss a group is spread over micro-batches, optimizer steps and processes. Each row carries its place in the
generation batch; what is known about all rows is held once per process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..metrics.diagnostics import quartile_index
from ..weights.features import FEATURES

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

    lengths: Tensor
    advantages: Tensor | None  # `None` where a subclass has one per token
    features: Mapping[str, Tensor] = field(default_factory=dict)  # what else λ weighs, name -> (P, G)
    turns: Tensor | None = None  # number of turns of each conversation, (P, G), where there are tools

    @cached_property
    def quartiles(self) -> Tensor:
        """Quartile of each row's length among the rows with tokens, flat, (P·G,)."""
        return quartile_index(self.lengths, self.lengths > 0).flatten()


def own_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Mask of the tokens that the policy itself wrote and that count in the loss, (B, T)."""
    mask, tool_mask = inputs["completion_mask"], inputs.get("tool_mask")
    return mask if tool_mask is None else mask * tool_mask


def count_turns(own: Tensor) -> Tensor:
    """
    Number of turns of each conversation, long, (B,): maximal runs of own tokens in their mask, (B, T), 0 on padding.

    A turn that was cut off before its first token is none; two turns with nothing between them are one.
    """
    own = own.bool()
    begins = own.clone()
    begins[:, 1:] &= ~own[:, :-1]
    return begins.sum(dim=1)


class Scoring:
    """
    Takes in generation batches as they are scored: numbers their rows, and gathers what f is to know of all of them.

    Args:
        accelerator (`Accelerator`): gathers over the processes.
        group_sizes (`Mapping[str, int]`): G of `"train"` and of `"eval"`.
        features (`Sequence[str]`): what rows are scored for beside length.
        with_turns (`bool`): whether conversations may have several turns, the same on every process.
    """

    def __init__(
        self, accelerator: Accelerator, group_sizes: Mapping[str, int], features: Sequence[str], *, with_turns: bool
    ) -> None:
        self._accelerator = accelerator
        self._group_sizes = group_sizes
        self.features = features
        self._with_turns = with_turns
        self._rows = 0
        self.batches: dict[str, GenerationBatch] = {}  # the last one of "train" and of "eval"

    def number_rows(self, output: dict[str, Any]) -> None:
        """Give each row of a freshly scored local batch its place in the generation batch."""
        rows = self._rows = output["completion_mask"].size(0)
        start = self._accelerator.process_index * rows
        output[ROW_KEY] = torch.arange(start, start + rows, device=output["completion_mask"].device)

    @torch.no_grad()
    def score_features(self, output: dict[str, Any], forward: Callable[..., Any], batch_size: int) -> None:
        """
        Give each row its features, (B, K), from the sampling policy's log-probabilities of its own tokens.

        TRL has them where old log-probabilities are needed; else they cost a forward pass of their own, by TRL's
        method for it, in parts of `batch_size` rows.
        """
        logps = output.get("old_per_token_logps")
        if logps is None:
            logps = forward(
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                batch_size,
                **{key: output[key] for key in FORWARD_KEYS if key in output},
            )[0]
        mask = own_tokens(output)
        output[FEATURES_KEY] = torch.stack([FEATURES[name](logps.float(), mask) for name in self.features], dim=1)

    def take(self, mode: str, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """
        Keep lengths, advantages, features and turns of all processes' rows, gathered in one collective. Every process
        must call it, with its whole share of the generation batch, in any order; a row that is missing has no tokens.

        Raises:
            `RuntimeError`: a subclass has returned rows without their places.
        """
        if any(ROW_KEY not in batch for batch in micro_batches):
            raise RuntimeError(
                f"The scored batch has no {ROW_KEY!r}, by which rows find their group: a subclass of the trainer "
                "builds it anew in _generate_and_score_completions. Return the dictionary that super() returned, with "
                "its entries changed."
            )
        start = self._accelerator.process_index * self._rows
        place = torch.cat([batch[ROW_KEY] for batch in micro_batches]) - start
        columns = [torch.cat([own_tokens(batch).sum(dim=1) for batch in micro_batches])]
        per_row = all(batch["advantages"].dim() == 1 for batch in micro_batches)
        if per_row:
            columns.append(torch.cat([batch["advantages"] for batch in micro_batches]))
        if self.features:
            columns += torch.cat([batch[FEATURES_KEY] for batch in micro_batches]).unbind(dim=1)
        if self._with_turns:
            columns.append(torch.cat([count_turns(own_tokens(batch)) for batch in micro_batches]))
        # float32 holds a length exactly up to 2^24 tokens.
        local = torch.zeros(self._rows, len(columns), dtype=torch.float32, device=place.device)
        local[place] = torch.stack([column.float() for column in columns], dim=1)
        gathered: Any = self._accelerator.gather(local)
        lengths, *others = gathered.view(-1, self._group_sizes[mode], len(columns)).unbind(dim=-1)
        advantages = others.pop(0).contiguous() if per_row else None
        turns = others.pop().to(torch.int32) if self._with_turns else None
        features = dict(zip(self.features, others, strict=True))
        self.batches[mode] = GenerationBatch(lengths.to(torch.int32), advantages, features, turns)
