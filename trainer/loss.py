"""The token loss: a forward step for megatron-core's schedules, and a softmax without padded vocabulary.

Rows of several examples have `segment_ids`. No example attends to another: on the CPU by a mask; on a GPU, Transformer Engine
gets all rows of a microbatch end to end ("thd": tokens × heads × channels), and the bounds of segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config

from formats.errors import UserError
from trainer import device, segments

Batch = dict[str, torch.Tensor]
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Inputs(NamedTuple):
    """What a model chunk takes of one microbatch, on this rank's device."""

    tensors: Batch
    """`tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each `[micro batch, sequence]`. Of packed rows also
    `work` (float32: tokens in examples, and the sum of the squares of the lengths of examples), and `attention_mask` on the CPU
    or `cu_seqlens` on a GPU, where all rows are one."""

    max_seqlen: int = 0
    """A bound for the tokens of a segment, with `cu_seqlens`."""


def forward_step(batches: Iterator[Batch | Inputs] | None, model: Any) -> tuple[torch.Tensor, LossFunction]:
    """Run one microbatch through one model chunk: megatron-core's `forward_step_func`.

    A batch holds `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each `[micro batch, sequence]`.
    Chunks in the middle of the pipeline need none, unless rows are packed: then there are `segment_ids` too (int32), and each
    chunk needs them. Returns the chunk's output, and the function that computes the loss from it.

    >>> tokens, labels, mask = torch.tensor([[5, 7]]), torch.tensor([[7, 2]]), torch.tensor([[1.0, 0.0]])
    >>> batch = Inputs({"tokens": tokens, "labels": labels, "loss_mask": mask})
    >>> def model(tokens, position_ids, attention_mask, labels):
    ...     return 0.5 * labels  # token losses, [micro batch, sequence]
    >>> model.config = {}
    >>> token_losses, loss = forward_step(iter([batch]), model)
    >>> loss(token_losses)[0]  # the sum over trained tokens
    tensor(3.5000)
    """
    batch = next(batches) if batches is not None else {}
    inputs = batch if isinstance(batch, Inputs) else prepare(batch)
    tensors = inputs.tensors
    further = {"labels": tensors.get("labels"), **_ahead(tensors, model)}
    if "cu_seqlens" in tensors:
        further["packed_seq_params"] = packed_seq_params(inputs)
    output = model(tensors.get("tokens"), tensors.get("position_ids"), tensors.get("attention_mask"), **further)
    return output, partial(masked_sum, mask=tensors.get("loss_mask"), work=tensors.get("work"))


def prepare(batch: Batch) -> Inputs:
    """Return a batch as the model takes it, on this rank's device. Nothing here waits for a GPU."""
    if "segment_ids" not in batch:
        return Inputs(on_this_rank(batch))
    rows = segments.find_segments(batch["segment_ids"])
    ranks = parallel_state.get_context_parallel_world_size()  # which share the examples, and each report
    work = torch.tensor([rows.num_tokens / ranks, rows.sum_squared_lengths / ranks])
    if device.current().type == "cuda":
        inputs = end_to_end(batch, rows)
        return inputs._replace(tensors={**inputs.tensors, "work": _moved(work)})
    return Inputs({**batch, "attention_mask": segments.attention_mask(batch["segment_ids"]), "work": work})


def _ahead(tensors: Batch, model: Any) -> dict[str, Any]:
    """Return what layers of multi-token prediction need beside labels: which tokens count."""
    return {"loss_mask": tensors.get("loss_mask")} if getattr(get_model_config(model), "mtp_num_layers", None) else {}


def end_to_end(batch: Batch, rows: segments.Segments) -> Inputs:
    """Return all rows as one, `[1, micro batch × sequence]`, with the bounds of segments, on this rank's GPU.

    Under context parallelism each rank has two slices of each segment, as Transformer Engine's attention takes them, and bounds
    are those of whole segments.
    """
    names = ("tokens", "labels", "loss_mask", "position_ids")
    moved: dict[str, Any] = {name: batch[name].reshape(1, -1).to(device.current(), non_blocking=True) for name in names}
    bounds = _moved(torch.from_numpy(rows.cu_seqlens))
    if parallel_state.get_context_parallel_world_size() > 1:
        full_batch = {**moved, "cu_seqlens": bounds[None], "cu_seqlens_padded": None}
        local_batch = get_batch_on_this_cp_rank(
            full_batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
        )
        moved = {name: local_batch[name] for name in names}
    return Inputs({**moved, "cu_seqlens": bounds}, _upper_bound(rows))


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the CPU's on this rank's GPU, without waiting for the copy."""
    return tensor.pin_memory().to(device.current(), non_blocking=True)


def _upper_bound(rows: segments.Segments) -> int:
    """Return the length of the longest segment, rounded up to a multiple of 64 as Transformer Engine does: few kernels and rotary
    tables are made. Never all tokens of several segments: megatron-core would continue positions from one to the next."""
    longest, total = rows.max_seqlen, int(rows.cu_seqlens[-1])
    rounded = -(-longest // 64) * 64
    return rounded if rounded < total else longest


def packed_seq_params(inputs: Inputs) -> PackedSeqParams:
    """Describe segments by their bounds `cu_seqlens`, int32 `[segments + 1]`, for Transformer Engine. Padding is a segment too,
    so the padded bounds are the same object: that says that there is no padding between segments."""
    bounds, longest = inputs.tensors["cu_seqlens"], inputs.max_seqlen
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
    losses: torch.Tensor, *, mask: torch.Tensor, work: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss summed over tokens that count, their number, and the tensor to report: `[sum, tokens, *work]`.

    `losses` and `mask` are `[micro batch, sequence]`. `work` of packed rows (float32 `[2]`) is the tokens in examples, and the
    sum of the squares of the lengths of examples.
    """
    total = (losses.float() * mask).sum()
    tokens = mask.sum()
    further = () if work is None else work.unbind()
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
