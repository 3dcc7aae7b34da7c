"""Scoring: number the rows of a generation batch, and gather what f needs to know of all of them, once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from trl.models.utils import disable_gradient_checkpointing

from ..generation_batch import GenerationBatch
from ..weights.rows import SCORED_STATISTICS

# Entries added to the scored batch. Dimension 0 is this process's rows, so TRL's shuffle and split keep them right.
NUMBER_KEY = "generation_batch_number"  # of the row, long, (B,)
REWARDS_KEY = "generation_batch_rewards"  # (B,), NaN for a response without one
LOGPS_KEY = "generation_batch_logps"  # of the sampling policy, (B, T), where TRL has none
ENTROPIES_KEY = "generation_batch_entropies"  # (B, T)
# Entries of the scored batch that TRL passes to a forward pass beside the tokens.
FORWARD_KEYS = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles"),
    *("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
)
# A row's number is this times the count of scoring calls, plus its place among that call's rows.
_CALL = 2**32


def own_tokens(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Mask of the tokens that the policy itself wrote and that count in the loss, (B, T)."""
    mask, tool_mask = inputs["completion_mask"], inputs.get("tool_mask")
    return mask if tool_mask is None else mask * tool_mask


class Scoring:
    """
    The generation batches as they are scored.

    Args:
        accelerator (`Accelerator`): gathers over the processes.
        statistics (`Sequence[str]`): what the weights ask for beside length and advantage.
    """

    def __init__(self, accelerator: Accelerator, statistics: Sequence[str]) -> None:
        self._accelerator = accelerator
        self._statistics = tuple(dict.fromkeys(statistics))
        self.calls = 0  # how often rows were scored
        self._rewards: torch.Tensor | None = None
        self.batches: dict[str, GenerationBatch] = {}  # the newest one of "train" and of "eval"

    def record_rewards(self, rewards: torch.Tensor, reward_weights: torch.Tensor) -> None:
        """Keep the rewards of all processes' rows, (N,), from those of each reward function, (N, R)."""
        self._rewards = (
            (rewards * reward_weights.to(rewards.device))
            .nansum(dim=1)
            .masked_fill(rewards.isnan().all(dim=1), torch.nan)
        )

    def number_rows(self, output: dict[str, Any], row_count: int) -> None:
        """
        Give each row of a freshly scored local batch its number, and its reward if a weight asks for it.

        Raises:
            `RuntimeError`: a base class returned other than the `row_count` rows that it was given.
        """
        mask = output["completion_mask"]
        if mask.size(0) != row_count:
            raise RuntimeError(
                f"{mask.size(0)} rows were scored for {row_count} inputs: a base class adds or drops rows, and groups "
                "can no longer be told apart. Filter in a subclass of the trl_lambda trainer instead."
            )
        start = self._accelerator.process_index * row_count
        output[NUMBER_KEY] = torch.arange(start, start + row_count, device=mask.device) + self.calls * _CALL
        if "rewards" in self._statistics:
            if self._rewards is None:
                raise RuntimeError(
                    "rewards are not known: another class replaces TRL's scoring. Use drop_tied_groups=False, and no "
                    "length_weight that names rewards."
                )
            output[REWARDS_KEY] = self._rewards[start : start + row_count].to(mask.device)
        self.calls += 1

    @torch.no_grad()
    def score_log_probabilities(
        self, output: dict[str, Any], forward: Callable[..., Any], model: Any, batch_size: int, checkpointing: Any
    ) -> None:
        """
        Add the sampling policy's log-probabilities and entropies to a scored batch, where a weight asks for them.

        TRL has log-probabilities where the loss needs old ones. Else, and for entropies, this is one more forward pass
        by TRL's own method, in parts of `batch_size` rows. `checkpointing` are the run's
        `gradient_checkpointing_kwargs`.
        """
        with_entropies = "mean_entropy" in self._statistics
        has_logps = output.get("old_per_token_logps") is not None
        if not set(self._statistics) & set(SCORED_STATISTICS) or (has_logps and not with_entropies):
            return
        # Reentrant checkpointing warns about a pass without gradient, as TRL says beside its own such passes.
        with disable_gradient_checkpointing(model, checkpointing):
            logps, entropies, *_ = forward(
                model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                # By name: TRL 1.14 takes it in no other way. TRL 1.10 fails on images of fewer rows than one part.
                batch_size=min(batch_size, output["completion_ids"].size(0)),
                compute_entropy=with_entropies,
                **{key: output[key] for key in FORWARD_KEYS if key in output},
            )
        if not has_logps:
            output[LOGPS_KEY] = logps
        if with_entropies:
            output[ENTROPIES_KEY] = entropies

    def gather_rows(
        self, mode: str, micro_batches: Sequence[Mapping[str, Any]], group_size: int, *, in_order: bool
    ) -> None:
        """
        Gather lengths, advantages and statistics of all processes' rows into `batches`, in one collective.

        Args:
            mode (`str`): `"train"` or `"eval"`.
            micro_batches (`Sequence[Mapping]`): this process's whole share of the generation batch.
            group_size (`int`): G, as TRL reads it.
            in_order (`bool`): whether rows are just as scored. Else a subclass has had its hands on them, and they are
                ordered and checked by their numbers, which are gathered too.

        Raises:
            `RuntimeError`: rows have no number, one number occurs twice, or groups differ in size.
        """
        if any(NUMBER_KEY not in batch for batch in micro_batches):
            raise RuntimeError(
                f"The scored batch has no {NUMBER_KEY!r}, by which rows find their group: a subclass of the trainer "
                "builds it anew. Return the dictionary that super() returned, with its entries changed."
            )
        per_row = all(batch["advantages"].dim() == 1 for batch in micro_batches)
        numbers = torch.cat([batch[NUMBER_KEY] for batch in micro_batches])
        columns = [self._columns(batch, per_row) for batch in micro_batches]
        gathered: Any = self._accelerator.gather(torch.cat(columns))
        if in_order:
            start = (self.calls - 1) * _CALL
            numbers = torch.arange(start, start + gathered.size(0), device=gathered.device)
        else:
            numbers, order = torch.sort(self._accelerator.gather(numbers))  # type: ignore[arg-type]
            gathered, group_size = gathered[order], _size_of_groups(numbers, group_size)
        lengths, *others = gathered.view(-1, group_size, gathered.size(1)).unbind(dim=-1)
        advantages = others.pop(0).contiguous() if per_row else None
        self.batches[mode] = GenerationBatch(
            numbers,
            lengths.to(torch.int32),
            micro_batches[0]["num_items_in_batch"].double() if lengths.device.type != "mps" else lengths.sum(),
            advantages,
            dict(zip(self._statistics, others, strict=True)),
        )

    def _columns(self, batch: Mapping[str, Any], per_row: bool) -> torch.Tensor:
        """What is gathered of each row, (B, columns), float32 or the advantages' wider dtype: exact to 2^24 tokens."""
        dtype = torch.promote_types(torch.float32, batch["advantages"].dtype)
        own, entropies = own_tokens(batch), batch.get(ENTROPIES_KEY)
        has_logps = batch.get("old_per_token_logps") is not None
        logps: Any = batch.get("old_per_token_logps" if has_logps else LOGPS_KEY)
        columns = [
            own.sum(dim=1),
            *([batch["advantages"]] if per_row else []),
            *(
                batch[REWARDS_KEY] if name == "rewards" else SCORED_STATISTICS[name](logps.to(dtype), entropies, own)
                for name in self._statistics
            ),
        ]
        return torch.stack([column.to(dtype) for column in columns], dim=1)

    def places_of(self, inputs: Mapping[str, Any], mode: str) -> tuple[GenerationBatch, torch.Tensor]:
        """
        The generation batch of a micro-batch, and its rows' places there, (B,).

        Raises:
            `RuntimeError`: the rows were never gathered, or have changed since (looked at on the CPU only).
        """
        batch, numbers = self.batches.get(mode), inputs.get(NUMBER_KEY)
        if batch is None or numbers is None:
            raise RuntimeError(
                "The loss got rows that trl_lambda has not seen: a subclass replaces _prepare_inputs or "
                "_generate_and_score_completions without calling super()'s. Call it, and change what it returns."
            )
        places = torch.searchsorted(batch.numbers, numbers).clamp(max=batch.numbers.numel() - 1)
        if numbers.device.type == "cpu":
            lengths = own_tokens(inputs).sum(dim=1)
            if not torch.equal(batch.numbers[places], numbers) or not torch.equal(
                batch.lengths.flatten()[places].to(lengths.dtype), lengths
            ):
                raise RuntimeError(
                    "The rows at the loss differ from those of their generation batch: a subclass masks or replaces "
                    "rows after super()._prepare_inputs. Do so in _generate_and_score_completions."
                )
        return batch, places


def _size_of_groups(numbers: torch.Tensor, group_size: int) -> int:
    """How many rows each group has, from all rows' numbers, ascending."""
    groups = numbers // _CALL * _CALL + numbers % _CALL // group_size
    sizes = torch.unique_consecutive(groups, return_counts=True)[1]
    if bool((numbers[1:] == numbers[:-1]).any()) or not bool((sizes == sizes[0]).all()):
        raise RuntimeError(
            f"The scored rows are no whole groups: a row occurs twice, or groups have {sorted(set(sizes.tolist()))} "
            "rows. A subclass repeats or drops rows after scoring: keep whole groups, or the same number of each."
        )
    return int(sizes[0])
