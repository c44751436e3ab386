"""Correct the offsets at which megatron-core 0.15 to 0.19.2 cuts the distributed optimizer's state into parameters.

megatron-core keeps the parameters of a rank in flat buffers, each cut into buckets. A bucket ends with padding, up to a multiple
of lcm(data-parallel ranks, 128), and of 2^16 with `ddp.pad_buckets_for_high_nccl_busbw`:

    the buffer       | a b c . . . | d e . . | f g . |      `param_index_map`: where each parameter starts and ends in it
    what is saved    | a b c | d e | f g |                  gathered bucket by bucket, without the padding

To save `fully_reshardable` it cuts parameters out of the second by their offsets in the first. Everything after the first padding
is then the state of other parameters, and the end of the last one is zero; there is no error, and a resumed run trains with it.
Right offsets exclude the padding of earlier buckets.

Sources: `DistributedOptimizer.get_parameter_state_dp_zero`, `sharded_param_state_fully_reshardable` and
`_compute_per_buffer_param_layout` of megatron-core 0.19.2; Megatron-LM's pull request 5077, which fixes it after 0.19.2.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import torch

from formats.errors import UserError
from trainer import optim

LAST_WRONG = (0, 19, 2)
"""The last version that shifts. Newer versions are probed too, and trusted where the probe fails."""

Offsets = dict[Any, tuple[int, int, int]]
"""For each parameter of a buffer, its first element, the one after its last, and the number of its bucket."""


@contextmanager
def padding_excluded(optimizer: Any, weights: dict[str, Any], metadata: dict[str, Any]) -> Iterator[None]:
    """Make `optimizer.sharded_state_dict` cut each parameter's state at the right offset inside this context.

    `weights` and `metadata` are the arguments of that function. Nothing changes for other optimizers, other forms of state,
    buckets without padding, or a megatron-core that is fixed. Raises UserError, on all ranks alike, if megatron-core cannot be
    corrected.
    """
    with ExitStack() as stack:
        if metadata["distrib_optim_sharding_type"] == "fully_reshardable":
            for part in optim.distributed(optimizer):
                if _shifts(part, weights, metadata):
                    stack.enter_context(_corrected(part))
                    _check_corrected(part, weights, metadata)
        yield


def without_padding(buffer: Any) -> Offsets:
    """Return where each parameter of a buffer is, in elements, without the padding at the end of each bucket."""
    padding = (bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets)
    before = list(accumulate(padding, initial=0))
    return {
        parameter: (start - before[bucket], end - before[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def _shifts(optimizer: Any, weights: dict[str, Any], metadata: dict[str, Any]) -> bool:
    """Return whether the installed megatron-core cuts this optimizer's state at wrong offsets: by a probe, else by version."""
    right = [start for buffer in optimizer.buffers for start, _, _ in without_padding(buffer).values()]
    if right == [start for buffer in optimizer.buffers for start, _, _ in buffer.param_index_map.values()]:
        return False
    actual = cut_at(optimizer, weights, metadata)
    return installed() <= LAST_WRONG if actual is None else actual != right


def cut_at(optimizer: Any, weights: dict[str, Any], metadata: dict[str, Any]) -> list[int] | None:
    """Return the offsets at which megatron-core cuts a distributed optimizer's parameters out of what it gathered, in its order.

    It gets tensors on the meta device, whose views have their offsets. None if it does something else with them.
    """

    def gathered(*_: Any, **__: Any) -> dict[int, Any]:
        sizes = enumerate(zip(optimizer.gbuf_ranges, optimizer.buffers, strict=True))
        return {
            number: {dtypes: {"param": torch.empty(buffer.numel_unpadded, device="meta")} for dtypes in ranges}
            for number, (ranges, buffer) in sizes
        }

    optimizer.get_parameter_state_dp_zero = gathered
    try:
        state = optimizer.sharded_param_state_fully_reshardable(weights, metadata=metadata)
        return [tensors["param"].data.storage_offset() for tensors in state.values()]
    except Exception:  # another version may need more of these tensors
        return None
    finally:
        del optimizer.get_parameter_state_dp_zero


def installed() -> tuple[int, ...]:
    """Return the numbers of megatron-core's version: (0, 19, 2)."""
    return tuple(int(number) for number in re.findall(r"\d+", importlib.metadata.version("megatron-core"))[:3])


@contextmanager
def _corrected(optimizer: Any) -> Iterator[None]:
    """Exclude padding from the offsets in the buffers of a distributed optimizer inside this context. A step needs the padding:
    none may run there."""
    padded_offsets = [buffer.param_index_map for buffer in optimizer.buffers]
    for buffer in optimizer.buffers:
        buffer.param_index_map = without_padding(buffer)
    try:
        yield
    finally:
        for buffer, offsets in zip(optimizer.buffers, padded_offsets, strict=True):
            buffer.param_index_map = offsets


def _check_corrected(optimizer: Any, weights: dict[str, Any], metadata: dict[str, Any]) -> None:
    corrected = [start for buffer in optimizer.buffers for start, _, _ in buffer.param_index_map.values()]
    if cut_at(optimizer, weights, metadata) != corrected:
        version = ".".join(map(str, installed()))
        raise UserError(
            f"megatron-core {version} would save optimizer state shifted by the padding of buckets, and cannot be corrected",
            hint="save with `checkpoint.optim_sharding=dp_reshardable`, or with `comm_overlap.overlap_grad_reduce=false`",
        )
