"""The token loss: a forward step for megatron-core's schedules, and a softmax without padded vocabulary.

Rows of several examples have `segment_ids`. No example attends to another: on the CPU by a mask; on a GPU, Transformer Engine
gets all rows of a microbatch end to end ("thd": tokens × heads × channels), and the bounds of segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config

from formats.errors import UserError
from trainer import device, segments

Batch = dict[str, torch.Tensor]
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def forward_step(batches: Iterator[Batch] | None, model: Any) -> tuple[torch.Tensor, LossFunction]:
    """Run one microbatch through one model chunk: megatron-core's `forward_step_func`.

    A batch holds `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each `[micro batch, sequence]`.
    Chunks in the middle of the pipeline need none, unless rows are packed: then there are `segment_ids` too (int32), and each
    chunk needs them. Returns the chunk's output, and the function that computes the loss from it.
    """
    batch = next(batches) if batches is not None else {}
    if "segment_ids" in batch:
        return _packed_step(batch, model)
    batch = on_this_rank(batch)
    mask = batch.get("attention_mask")
    labels = {"labels": batch.get("labels"), **_ahead(batch, model)}
    output = model(batch.get("tokens"), batch.get("position_ids"), mask, **labels)
    return output, partial(masked_sum, mask=batch.get("loss_mask"))


def _packed_step(batch: Batch, model: Any) -> tuple[torch.Tensor, LossFunction]:
    """Run one microbatch whose rows hold several examples."""
    rows = segments.find_segments(batch["segment_ids"])
    if device.current().type == "cuda":
        batch, packed = end_to_end(batch, rows)
        labels = {"labels": batch["labels"], **_ahead(batch, model)}
        output = model(batch["tokens"], batch["position_ids"], None, **labels, packed_seq_params=packed)
    else:
        mask = segments.attention_mask(batch["segment_ids"])
        output = model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])
    ranks = parallel_state.get_context_parallel_world_size()  # which share the examples, and each report
    work = (rows.num_tokens / ranks, rows.sum_squared_lengths / ranks)
    return output, partial(masked_sum, mask=batch["loss_mask"], work=work)


def _ahead(batch: Batch, model: Any) -> dict[str, Any]:
    """Return what layers of multi-token prediction need beside labels: which tokens count."""
    return {"loss_mask": batch.get("loss_mask")} if getattr(get_model_config(model), "mtp_num_layers", None) else {}


def end_to_end(batch: Batch, rows: segments.Segments) -> tuple[Batch, PackedSeqParams]:
    """Return all rows as one, `[1, micro batch × sequence]` on this rank's GPU, and Transformer Engine's description of segments.

    Under context parallelism each rank has two slices of each segment, as Transformer Engine's attention takes them, and bounds
    are those of whole segments. Nothing here waits for the GPU.
    """
    names = ("tokens", "labels", "loss_mask", "position_ids")
    moved: dict[str, Any] = {name: batch[name].reshape(1, -1).to(device.current(), non_blocking=True) for name in names}
    bounds = torch.from_numpy(rows.cu_seqlens).pin_memory().to(device.current(), non_blocking=True)
    if parallel_state.get_context_parallel_world_size() > 1:
        full_batch = {**moved, "cu_seqlens": bounds[None], "cu_seqlens_padded": None}
        local_batch = get_batch_on_this_cp_rank(
            full_batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
        )
        moved = {name: local_batch[name] for name in names}
    return moved, _packed_seq_params(bounds, longest=_upper_bound(rows))


def _upper_bound(rows: segments.Segments) -> int:
    """Return the length of the longest segment, rounded up to a multiple of 64 as Transformer Engine does: few kernels and rotary
    tables are made. Never all tokens of several segments: megatron-core would continue positions from one to the next."""
    longest, total = rows.max_seqlen, int(rows.cu_seqlens[-1])
    rounded = -(-longest // 64) * 64
    return rounded if rounded < total else longest


def _packed_seq_params(bounds: torch.Tensor, *, longest: int) -> PackedSeqParams:
    """Describe segments by their `bounds`, int32 `[segments + 1]`. Padding is a segment too, so the padded bounds are the same
    object: that tells Transformer Engine that there is no padding between segments."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def on_this_rank(batch: Batch) -> Batch:
    """Return the batch on this rank's device, and under context parallelism its part of the sequence."""
    moved = {name: value.to(device.current(), non_blocking=True) for name, value in batch.items()}
    if parallel_state.get_context_parallel_world_size() == 1:
        return moved
    full_batch = {**moved, "cu_seqlens": None}
    local_batch = get_batch_on_this_cp_rank(full_batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
    return {name: value for name, value in local_batch.items() if value is not None}


def masked_sum(
    losses: torch.Tensor, *, mask: torch.Tensor, work: Sequence[float] = ()
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss summed over tokens that count, their number, and the tensor to report: `[sum, tokens, *work]`.

    `losses` and `mask` are `[micro batch, sequence]`. `work` of packed rows is the tokens in examples, and the sum of the squares
    of the lengths of examples.
    """
    total = (losses.float() * mask).sum()
    tokens = mask.sum()
    # Filled on the device: a number copied there would wait for it.
    further = [total.new_full((), number) for number in work]
    return total, tokens.to(torch.int), torch.stack((total.detach(), tokens, *further))


def with_token_counts(forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward_step` for a loss per token of the global batch.

    Its loss function must return how many tokens it summed over: without that number megatron-core does not divide the gradients
    of data-parallel ranks. Raises UserError, in the step, if it does not.
    """

    def step(*inputs: Any) -> tuple[Any, Any]:
        output, loss_function = forward_step(*inputs)
        return output, None if loss_function is None else partial(_with_token_count, loss_function)

    return step


def _with_token_count(loss_function: Callable[..., Any], output: torch.Tensor) -> Any:
    values = loss_function(output)
    if len(values) != 3:
        raise UserError(
            f"the loss function of the forward step returns `{len(values)}` values, and with "
            "`model.calculate_per_token_loss=True` it must return `3`",
            hint="return the loss summed over the tokens that count, their number, and what to report: `trainer.loss.masked_sum`",
        )
    return values


def mean(losses: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the loss per token over microbatches and data-parallel ranks, from reports of `masked_sum`. None without `losses`:
    only the last stage has them."""
    return mean_and_work(losses)[0] if losses else None


def mean_and_work(losses: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return `[loss per token, *work]` over microbatches and data-parallel ranks, from reports `[sum, tokens, *work]`."""
    total = torch.stack(list(losses)).sum(dim=0)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return torch.cat(((total[0] / total[1].clamp(min=1))[None], total[2:]))


class WithoutPadding(torch.autograd.Function):
    """Set logits from column `valid` on, those of padded vocabulary, to the lowest number, in place.

    megatron-core's vocabulary-parallel cross entropies count padded rows as tokens. A softmax gives these columns
    probability 0 and gradient 0, so the gradient passes unchanged.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, valid: int) -> torch.Tensor:
        """Fill `logits`, `[..., vocabulary rows of this rank]`."""
        ctx.mark_dirty(logits)
        # Finite: a rank that holds nothing but padding would otherwise compute infinity minus infinity.
        logits[..., valid:] = torch.finfo(logits.dtype).min
        return logits

    @staticmethod
    def backward(_ctx: Any, *gradients: Any) -> Any:
        """Return the gradient as it is: that of the padding is 0."""
        return gradients[0], None
