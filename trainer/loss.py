"""The token loss: from a batch to what megatron-core's schedules want, and padded vocabulary kept out of the softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

from trainer import device

Batch = dict[str, torch.Tensor]
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def forward_step(batches: Iterator[Batch] | None, model: Any) -> tuple[torch.Tensor, LossFunction]:
    """One microbatch through one model chunk: megatron-core's `forward_step_func`.

    A batch holds `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each [micro batch, sequence].
    Chunks in the middle of the pipeline need none. Answers the chunk's output and what makes the loss of it.
    """
    batch = on_this_rank(next(batches)) if batches is not None else {}
    mask = batch.get("attention_mask")
    output = model(batch.get("tokens"), batch.get("position_ids"), mask, labels=batch.get("labels"))
    return output, partial(masked_sum, mask=batch.get("loss_mask"))


def on_this_rank(batch: Batch) -> Batch:
    """The batch on this rank's device, cut to its share of the sequence under context parallelism."""
    moved = {name: value.to(device.current(), non_blocking=True) for name, value in batch.items()}
    if parallel_state.get_context_parallel_world_size() == 1:
        return moved
    whole = {**moved, "cu_seqlens": None}
    cut = get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
    return {name: value for name, value in cut.items() if value is not None}


def masked_sum(losses: torch.Tensor, *, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss summed over tokens that count, how many those are, and both as one tensor to report."""
    total = (losses.float() * mask).sum()
    tokens = mask.sum()
    return total, tokens.to(torch.int), torch.stack((total.detach(), tokens))


def mean(losses: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Loss per token over microbatches and data-parallel ranks, from what `masked_sum` reported; None but on the last stage."""
    if not losses:
        return None
    total = torch.stack(list(losses)).sum(dim=0)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return total[0] / total[1].clamp(min=1)


class WithoutPadding(torch.autograd.Function):
    """Logits whose columns from `valid` on can never be chosen, written in place.

    megatron-core's vocabulary-parallel cross entropies count padded rows as tokens. A softmax gives these columns
    probability 0 and gradient 0, so the gradient passes unchanged.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, valid: int) -> torch.Tensor:
        """`logits` is [..., vocabulary rows of this rank]."""
        ctx.mark_dirty(logits)
        # Finite: a rank that holds nothing but padding would otherwise compute infinity minus infinity.
        logits[..., valid:] = torch.finfo(logits.dtype).min
        return logits

    @staticmethod
    def backward(_ctx: Any, *gradients: Any) -> Any:
        """Softmax gave the padding no gradient."""
        return gradients[0], None
