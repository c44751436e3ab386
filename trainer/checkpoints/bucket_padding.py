"""Cut the distributed optimizer's state into parameters at the right offsets, where megatron-core 0.15 to 0.19.2 shifts it.

megatron-core keeps the parameters of a rank in flat buffers, each cut into buckets. A bucket ends with padding, up to a multiple
of lcm(data-parallel ranks, 128), and of 2^16 with `ddp.pad_buckets_for_high_nccl_busbw`:

    the buffer       | a b c . . . | d e . . | f g . |      `param_index_map`: where each parameter starts and ends in it
    what is saved    | a b c | d e | f g |                  gathered bucket by bucket, without the padding

To save `fully_reshardable` it cuts parameters out of the second by their offsets in the first. Everything after the first padding
is then the state of other parameters, and the end of the last one is zero; nothing says so, and a resumed run goes on with it.
Right offsets leave out the padding of the buckets before.

Sources: `DistributedOptimizer.get_parameter_state_dp_zero`, `sharded_param_state_fully_reshardable` and
`_compute_per_buffer_param_layout` of megatron-core 0.19.2; Megatron-LM's pull request 5077, which mends it after 0.19.2.
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
"""The last version that shifts. Newer ones are asked too, and are believed where they do not answer."""

Offsets = dict[Any, tuple[int, int, int]]
"""Of each parameter of a buffer its first element, the one after its last, and the number of its bucket."""


@contextmanager
def left_out(optimizer: Any, weights: dict[str, Any], metadata: dict[str, Any]) -> Iterator[None]:
    """While this is entered, `optimizer.sharded_state_dict` cuts each parameter's state out of where it is.

    `weights` and `metadata` are what that function is given. Nothing changes where nothing is wrong: other optimizers, other
    forms of state, buckets without padding, a megatron-core that has been mended. Raises UserError, on all ranks alike, where a
    megatron-core that shifts cannot be corrected.
    """
    with ExitStack() as stack:
        if metadata["distrib_optim_sharding_type"] == "fully_reshardable":
            for one in optim.distributed(optimizer):
                if _shifts(one, weights, metadata):
                    stack.enter_context(_corrected(one))
                    _check_corrected(one, weights, metadata)
        yield


def without_padding(buffer: Any) -> Offsets:
    """Where each parameter of a buffer is, in elements, once the padding at the end of each bucket is gone."""
    padding = (bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets)
    before = list(accumulate(padding, initial=0))
    return {
        parameter: (start - before[bucket], end - before[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def _right(one: Any) -> list[int]:
    return [start for buffer in one.buffers for start, _, _ in without_padding(buffer).values()]


def _shifts(one: Any, weights: dict[str, Any], metadata: dict[str, Any]) -> bool:
    """Does the installed megatron-core cut this optimizer's state at wrong offsets? By what it does, else by its version."""
    right = _right(one)
    if right == [start for buffer in one.buffers for start, _, _ in buffer.param_index_map.values()]:
        return False
    found = cut_at(one, weights, metadata)
    return installed() <= LAST_WRONG if found is None else found != right


def cut_at(one: Any, weights: dict[str, Any], metadata: dict[str, Any]) -> list[int] | None:
    """The offsets at which megatron-core cuts a distributed optimizer's parameters out of what it gathered, in its order.

    It is given tensors without memory, whose parts know where they begin. None where it does something else with them.
    """

    def gathered(*_: Any, **__: Any) -> dict[int, Any]:
        sizes = enumerate(zip(one.gbuf_ranges, one.buffers, strict=True))
        return {
            number: {dtypes: {"param": torch.empty(buffer.numel_unpadded, device="meta")} for dtypes in ranges}
            for number, (ranges, buffer) in sizes
        }

    one.get_parameter_state_dp_zero = gathered
    try:
        state = one.sharded_param_state_fully_reshardable(weights, metadata=metadata)
        return [tensors["param"].data.storage_offset() for tensors in state.values()]
    except Exception:  # what another version asks of these tensors is not known
        return None
    finally:
        del one.get_parameter_state_dp_zero


def installed() -> tuple[int, ...]:
    """The numbers of megatron-core's version: (0, 19, 2)."""
    return tuple(int(number) for number in re.findall(r"\d+", importlib.metadata.version("megatron-core"))[:3])


@contextmanager
def _corrected(one: Any) -> Iterator[None]:
    """While this is entered, offsets in the buffers of a distributed optimizer are those without padding. Only what cuts may run:
    a step needs the others."""
    kept = [buffer.param_index_map for buffer in one.buffers]
    for buffer in one.buffers:
        buffer.param_index_map = without_padding(buffer)
    try:
        yield
    finally:
        for buffer, offsets in zip(one.buffers, kept, strict=True):
            buffer.param_index_map = offsets


def _check_corrected(one: Any, weights: dict[str, Any], metadata: dict[str, Any]) -> None:
    corrected = [start for buffer in one.buffers for start, _, _ in buffer.param_index_map.values()]
    if cut_at(one, weights, metadata) != corrected:
        version = ".".join(map(str, installed()))
        raise UserError(
            f"megatron-core {version} would save optimizer state shifted by the padding of buckets, and cannot be corrected",
            hint="save with `checkpoint.optim_sharding=dp_reshardable`, or with `comm_overlap.overlap_grad_reduce=false`",
        )
