"""Read optimizer state that is stored bucket by bucket: `dp_reshardable` (megatron-core 0.15 and later) and, the same,
`fully_sharded_bucket_space` (up to 0.14).

A bucket of a group of data-parallel ranks is a 1-D tensor for each state. Its chunks are the parameters and the gaps between
them, cut where one rank's part ends. Source: megatron-core's `optimizer/distrib_optimizer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from formats.container import Container
from formats.dcp import DcpContainer
from formats.errors import UserError, format_untrusted
from formats.object_names import ObjectName
from formats.optimizer import in_buffers
from formats.optimizer.flat_shards import Flat, FlatTensor
from formats.optimizer.layout import Parameter, Slot
from formats.optimizer.rank_buffers import Buffer
from formats.optimizer.state import OptimizerState
from formats.spec import is_size
from formats.torch_dist import TorchDistReader

_TENSOR = re.compile(
    r"((?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_\(torch\.\w+, torch\.\w+\))"
    r"\.bucket_idx_(\d+)\.(\w+)"
)
_BUCKET = ".bucket_idx_"
_SIZES = "per_bucket_numel_unpadded"


@dataclass(frozen=True, slots=True)
class _Buffer:
    """See `Buffer`: `sizes` are those of its buckets, `seams` where chunks of each begin and end, None where that is unknown."""

    label: str
    sizes: Sequence[int]
    seams: Sequence[frozenset[int]] | None

    @property
    def size(self) -> int:
        return sum(self.sizes)

    def bucketings(self, _parameters: Sequence[Parameter], /) -> Iterator[Sequence[int]]:
        yield self.sizes

    def check(self, slots: Mapping[str, Slot], parameters: Sequence[Parameter], /) -> None:
        for name, size in parameters:
            bucket, start, _ = slots[name]
            if self.seams and not {start, start + size} <= self.seams[bucket]:
                raise UserError(
                    f"`{name}` would be at elements {start} to {start + size} of `{self.label}{_BUCKET}{bucket}`, "
                    "whose chunks do not begin and end there"
                )

    def run(self, slot: Slot) -> tuple[str, int]:
        return f"{self.label}{_BUCKET}{slot.bucket}", slot.start


def read(reader: TorchDistReader) -> OptimizerState | None:
    """Return the state that is stored in buckets, None where none is."""
    stored = _tensors(reader.container)
    if not stored:
        return None
    names = set(reader.container.tensor_names)

    def source(label: str, state: str) -> Flat | None:
        name = f"{label}.{state}"
        return FlatTensor(reader.container, reader.container.tensor(name)) if name in names else None

    optimizers = {number: _buffers(reader.container, of_groups) for number, of_groups in stored.items()}
    return in_buffers.read(reader, optimizers, source)


class _Stored(NamedTuple):
    """The buckets of a buffer, with the name of a tensor of each."""

    label: str
    buckets: dict[int, str]


def _tensors(container: Container) -> dict[str, dict[int, dict[int, _Stored]]]:
    """Return the buffers there are: by the number of their optimizer, the group of ranks and their own."""
    stored: dict[str, dict[int, dict[int, _Stored]]] = {}
    for name in container.tensor_names:
        if match := _TENSOR.fullmatch(name):
            label, chained, group, number, bucket, _ = match.groups(default="")
            of_group = stored.setdefault(chained, {}).setdefault(int(group), {})
            buffer = of_group.setdefault(int(number), _Stored(label, {}))
            if buffer.label != label:
                raise UserError(f"`{buffer.label}` and `{label}` are one buffer in two dtypes", hint="the checkpoint is damaged")
            buffer.buckets[int(bucket)] = name
    return stored


def _buffers(container: Container, of_groups: Mapping[int, Mapping[int, _Stored]]) -> dict[int, list[Buffer]]:
    """Return the buffers of each group of ranks. Raises UserError where one or a bucket of it is missing."""
    return {
        group: [_buffer(container, of_group, number) for number in _counted(sorted(of_group), f"group {group} has no buffer")]
        for group, of_group in of_groups.items()
    }


def _counted(numbers: Sequence[int], what: str) -> Sequence[int]:
    """Return numbers that count from 0. Raises UserError for others."""
    missing = next((number for number, known in enumerate(numbers) if number != known), None)
    if missing is not None:
        raise UserError(f"{what} {missing} of the optimizer state", hint="the checkpoint is incomplete: copy it again")
    return numbers


def _buffer(container: Container, of_group: Mapping[int, _Stored], number: int) -> _Buffer:
    label, buckets = of_group[number]
    names = [buckets[bucket] for bucket in _counted(sorted(buckets), f"`{label}` has no bucket")]
    stored = [container.tensor(name) for name in names]
    if any(len(tensor.shape) != 1 for tensor in stored):
        raise UserError(f"`{label}` is stored in buckets of more than one dimension", hint="the checkpoint is damaged")
    lengths = [tensor.shape[0] for tensor in stored]
    sizes = _sizes(container, label, number)
    sizes = lengths if sizes is None else sizes
    if len(sizes) != len(lengths) or any(size > length for size, length in zip(sizes, lengths, strict=True)):
        raise UserError(
            f"`{label}` has buckets of {format_untrusted(lengths)} elements, and `{_SIZES}` says {format_untrusted(sizes)}",
            hint="the checkpoint is damaged or was mixed from two",
        )
    seams = [
        frozenset([*tensor.bounds()[1][:, 0].tolist(), size, *tensor.shape]) for tensor, size in zip(stored, sizes, strict=True)
    ]
    return _Buffer(label, sizes, seams if isinstance(container, DcpContainer) else None)


def _sizes(container: Container, label: str, number: int) -> list[int] | None:
    """Return the sizes of a buffer's buckets without padding, as the checkpoint notes them; None where it does not."""
    name = str(ObjectName(f"{label.partition('.gbuf_idx_')[0]}.{_SIZES}"))
    if name not in container.object_names:
        return None
    noted: Any = container.archive(name).pickle()
    try:
        (sizes,) = noted[0][number].values()
    except (LookupError, TypeError, ValueError, AttributeError):
        sizes = None
    if not isinstance(sizes, list) or not all(is_size(size) for size in cast("list[Any]", sizes)):
        raise UserError(f"`{name}` does not say the sizes of the buckets of `{label}`", hint="the checkpoint is damaged")
    return cast("list[int]", sizes)
