"""Read optimizer state that one rank of each data-parallel group gathered and stored: `dp_zero_gather_scatter`.

A group's object holds for each buffer a 1-D tensor of each state, all buckets one after the other without padding at their ends.
How long they were is not stored, and makes a difference only where sizes of parameters are no multiples of 64. The tensors are
read in place. Source: megatron-core's `get_parameter_state_dp_zero` in `optimizer/distrib_optimizer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from formats.arrays import as_bytes
from formats.errors import UserError
from formats.optimizer import in_buffers
from formats.optimizer.flat_shards import Flat
from formats.optimizer.layout import Parameter, Slot, bucket_sizes
from formats.optimizer.parameters import EMBEDDING, OUTPUT
from formats.optimizer.rank_buffers import Buffer
from formats.optimizer.state import STATES, OptimizerState
from formats.spec import DTYPES, Array, dtype_name, is_size
from formats.torch_dist import TorchDistReader
from formats.torch_zip import OpenArchive

_OBJECT = re.compile(r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.param_state/shard_0_1")
_UNPADDED = "numel_unpadded"
_DEFAULT_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000
"""megatron-core's bucket size, in elements: the larger of the first and of the second times the data-parallel ranks."""


@dataclass(frozen=True, slots=True)
class FlatArchive:
    """The elements of a tensor in an archive, read in place."""

    archive: OpenArchive
    offset: int

    def read(self, start: int, out: Array) -> None:
        target = as_bytes(out)
        target[:] = self.archive.fetch(self.offset + start * out.dtype.itemsize, len(target))


@dataclass(frozen=True, slots=True)
class GatheredBuffer:
    """See `Buffer`: `limits` are the bucket sizes that the run may have had."""

    label: str
    size: int
    limits: Sequence[int | None]

    def bucketings(self, parameters: Sequence[Parameter], /) -> Iterator[Sequence[int]]:
        for limit in self.limits:
            for shared in ((), (EMBEDDING, OUTPUT)):
                sizes = bucket_sizes(parameters, limit=limit, shared=shared)
                if sum(sizes) == self.size:
                    yield sizes

    def check(self, slots: Mapping[str, Slot], parameters: Sequence[Parameter], /) -> None:
        """Nothing in the file contradicts."""

    def run(self, slot: Slot) -> tuple[str, int]:
        return self.label, slot.flat


def bucket_limits(args: Mapping[str, Any]) -> list[int | None]:
    """Return the bucket sizes that a run with these settings of Megatron-LM may have had, in elements; None is one bucket."""
    ranks = args.get("data_parallel_size"), args.get("context_parallel_size", 1)
    known = [args.get("ddp_bucket_size")]
    if all(is_size(size) for size in ranks):
        known.append(max(_DEFAULT_BUCKET, _BUCKET_PER_RANK * cast("int", ranks[0]) * cast("int", ranks[1])))
    return list(dict.fromkeys([None, *(size for size in known if is_size(size) and size), _DEFAULT_BUCKET]))


def read(reader: TorchDistReader) -> OptimizerState | None:
    """Return the state that one rank of each group gathered, None where none is."""
    objects = {name: match for name in reader.container.object_names if (match := _OBJECT.fullmatch(name))}
    if not objects:
        return None
    optimizers, sources = dict[str, dict[int, list[Buffer]]](), dict[tuple[str, str], Flat]()
    limits = bucket_limits(reader.args())
    for name, match in objects.items():
        archive = reader.container.archive(name)
        buffers = list[Buffer]()
        for number, content in enumerate(_contents(archive, name)):
            label = f"{name} buffer {number}"
            size = content[_UNPADDED]
            for state in STATES:
                if state in content:
                    sources[label, state] = _flat(archive, content[state], size, f"`{state}` of `{label}`")
            buffers.append(GatheredBuffer(label, size, limits))
        optimizers.setdefault(match[1] or "", {})[int(match[2])] = buffers
    return in_buffers.read(reader, optimizers, lambda label, state: sources.get((label, state)))


def _contents(archive: OpenArchive, name: str) -> Iterator[Mapping[str, Any]]:
    """Yield what is stored of each buffer, that of the first model chunk first."""
    match archive.pickle():
        case {"buckets_coalesced": True, **buffers} | [{"buckets_coalesced": True, **buffers}]:
            pass
        case _:
            raise UserError(
                f"`{name}` holds optimizer state in buckets that are not joined, as megatron-core wrote it before 0.6",
                hint="load it in Megatron with `--ckpt-convert-update-legacy-dist-opt-format` and save it again",
            )
    for number in range(len(buffers)):
        match list(cast("dict[Any, Any]", of_dtype).values()) if isinstance(of_dtype := buffers.get(number), dict) else ():
            case [{"numel_unpadded": int(size)} as content] if is_size(size):
                yield content
            case _:
                raise UserError(
                    f"buffer {number} of `{name}` is not of parameters of one dtype, with their number of elements",
                    hint="the checkpoint is damaged, or holds weights in FP8, whose state is not read",
                )


def _flat(archive: OpenArchive, record: Any, size: int, what: str) -> FlatArchive:
    tensor, offset = archive.tensor(record)
    if tensor.shape != (size,) or tensor.strides != (1,) or tensor.dtype != DTYPES["fp32"]:
        raise UserError(
            f"{what} is {list(tensor.shape)} of {dtype_name(tensor.dtype)}, which should be {size} elements of fp32",
            hint="the checkpoint is damaged",
        )
    return FlatArchive(archive, offset)
