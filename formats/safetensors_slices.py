"""Read safetensors files that each hold a slice of every tensor, as PyTorch's `HuggingFaceStorageWriter` writes them.

A header says in `DCP_SHARDING_INFO` where the slices of its file begin: `{name: {"saved_offsets": [row, column]}}`. No file says
how large a tensor is: its slices do, together. Layout: torch's `torch/distributed/checkpoint/hf_storage.py`.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from formats.chunks import ChunkedTensor, stride, tiles
from formats.dcp_index import METADATA
from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.huggingface import read_shard
from formats.json_objects import parse_json
from formats.spec import Array, Region, Shape, TensorSpec, dtype_name, is_size, is_valid_shape
from formats.stored_arrays import StoredArray, read_region

_INFO = "DCP_SHARDING_INFO"
_NAME = re.compile(r"shard-(\d+)-model-\d+-of-\d+\.safetensors")


class _Slice(NamedTuple):
    """A slice in a file: where it begins in the tensor, what it is, the file's number, and the data's start there in bytes."""

    at: Shape
    spec: TensorSpec
    file: int
    start: int


class SlicedSafetensors:
    """The opened files; see `TensorContainer`. Opening reads every header."""

    def __init__(self, folder: Folder, files: Sequence[str]) -> None:
        """Raises UserError for slices that overlap, leave gaps, or disagree in dtype."""
        self._folder, self._names = folder, list(files)
        slices: dict[str, list[_Slice]] = {}
        for number, file in enumerate(files):
            shard = read_shard(folder, file)
            offsets, starts = _offsets(shard.raw, file), shard.starts()
            for name, spec in shard.tensors.items():
                part = _Slice(_offset(name, spec, offsets, file), spec, number, starts[name])
                slices.setdefault(name, []).append(part)
        self._tensors = {name: self._joined(name, parts) for name, parts in slices.items()}

    @property
    def tensor_names(self) -> Iterable[str]:
        return self._tensors

    @property
    def index_files(self) -> Collection[str]:
        return {METADATA} if self._folder.has(METADATA) else ()

    @property
    def files(self) -> Collection[str]:
        return self._names

    def tensor(self, name: str) -> ChunkedTensor:
        return self._tensors[name]

    def read(self, tensor: ChunkedTensor, region: Region, out: Array) -> None:
        for number, shape, in_chunk, in_region in tensor.overlapping(region):
            stored = StoredArray(tensor.file(number), tensor.data_start(number), shape)
            read_region(self._folder, stored, in_chunk, out[(*in_region, ...)])

    def close(self) -> None:
        self._folder.close()

    def _joined(self, name: str, parts: Sequence[_Slice]) -> ChunkedTensor:
        first = parts[0].spec
        for part in parts:
            if (part.spec.dtype, len(part.spec.shape)) != (first.dtype, len(first.shape)):
                kinds = " and ".join(
                    f"{dtype_name(each.spec.dtype)} with {len(each.spec.shape)} dimensions in `{self._names[each.file]}`"
                    for each in (parts[0], part)
                )
                raise UserError(f"slices of `{name}` are {kinds}", hint="the files are of two models, or damaged")
        dims = len(first.shape)
        table = np.full((len(parts), stride(dims)), -1, np.int64)
        for row, part in zip(table, parts, strict=True):
            row[: 2 * dims] = (*part.at, *part.spec.shape)
            row[2 * dims :] = part.file, part.start, part.spec.nbytes, part.start
        shape = tuple((table[:, :dims] + table[:, dims : 2 * dims]).max(axis=0).tolist())
        made = ChunkedTensor(shape, first.dtype, array("q", table.tobytes()), self._names)
        if not is_valid_shape(shape) or not tiles(*made.bounds()):
            raise UserError(
                f"the slices of `{name}` in {len(parts)} files do not tile its shape {list(shape)}: they overlap or leave gaps",
                hint="a file is missing, or the files are of two models",
            )
        return made


def sliced_files(folder: Folder, names: Iterable[str]) -> list[str]:
    """Return the files of slices among names, sorted. Raises UserError if those of a process are missing."""
    numbers = {name: int(match[1]) for name in names if (match := _NAME.fullmatch(name))}
    present = set(numbers.values())
    if missing := [number for number in range(1, max(present, default=0)) if number not in present]:
        raise UserError(
            f"`{folder.label}` lacks `shard-{missing[0]:05d}-model-….safetensors`, of {max(present)} processes",
            hint="fetch the missing files: each holds a part of every tensor",
        )
    return sorted(numbers)


def has_slices(names: Iterable[str]) -> bool:
    """Return whether there are files of slices among these names."""
    return any(_NAME.fullmatch(name) for name in names)


def are_safetensors(folder: Folder, files: Sequence[str]) -> bool:
    """Return whether the first of these files, whatever its name, is a safetensors file and not an archive of torch's."""
    if not files or folder.size(files[0]) < 16:
        return False
    start = bytearray(9)
    folder.read_into(files[0], 0, memoryview(start))
    return bytes(start[8:]) == b"{" and struct.unpack("<Q", start[:8])[0] < folder.size(files[0])


def _offsets(raw: bytes, file: str) -> dict[str, Any]:
    """Return where the slices of a file begin, by its header."""
    described = cast("dict[str, str]", parse_json(raw[8:], source=file).get("__metadata__", {}))
    if _INFO not in described:
        raise UserError(f"`{file}` does not say in `{_INFO}` which slices it holds", hint="it is of another program, or damaged")
    return parse_json(described[_INFO].encode(), source=f"{_INFO} of {file}")


def _offset(name: str, spec: TensorSpec, offsets: dict[str, Any], file: str) -> Shape:
    entry: Any = offsets.get(name)
    saved: Any = cast("dict[str, Any]", entry).get("saved_offsets") if isinstance(entry, dict) else None
    sizes = cast("list[Any]", saved) if isinstance(saved, list) else []
    if not isinstance(saved, list) or len(sizes) != len(spec.shape) or not all(map(is_size, sizes)):
        raise UserError(
            f"`{file}` says that its slice of `{name}`, {list(spec.shape)}, begins at `{format_untrusted(saved)}`",
            hint="the header is damaged",
        )
    return tuple(sizes)
