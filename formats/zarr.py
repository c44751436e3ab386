"""Read the `zarr` format of megatron-core 0.2 to 0.15: each key is a directory of a `.zarray` and one file for each chunk.

Keys, shapes and stacking are those of `torch_dist`. Nothing says that the checkpoint is complete, and zarr's own readers take a
missing chunk for zeros; here every chunk must be there in its exact size. Layout: the zarr specification, version 2, and
megatron-core 0.15's `dist_checkpointing/strategies/zarr.py`.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Collection, Iterable, Iterator
from math import prod
from typing import Any, NamedTuple, cast

import numpy as np

from formats.chunks import ChunkedTensor, stride
from formats.dtypes import CONVERTED
from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.iterations import FORMAT
from formats.json_objects import read_json
from formats.spec import DTYPES, Array, Region, Shape, is_valid_shape
from formats.stored_arrays import StoredArray, read_region
from formats.torch_zip import OpenArchive
from formats.zarr_compressed import Compression, DecodedChunks

ARRAY = ".zarray"

_TYPES = {dtype.zarr: dtype.name for dtype in CONVERTED if dtype.zarr}

_EXPECTED = {
    "zarr_format": 2, "order": "C", "filters": None, "fill_value": None, "dimension_separator": ".",
}  # fmt: skip
_OBJECT = re.compile(r"shard_[\d._]+\.pt")
_LOCKS = ".sync/"
"""Ends the names of folders with the lock files of arrays that several processes wrote."""

_REWRITE = "read it with the program that wrote it, and save it without a compressor, or as `torch_dist`"


class ZarrArray(NamedTuple):
    """What a `.zarray` says: the shape, and that of every chunk, also of those that reach past the array's end."""

    shape: Shape
    chunk: Shape
    dtype: np.dtype[Any]
    compression: Compression | None

    @property
    def chunk_bytes(self) -> int:
        """The bytes of a chunk that is not compressed."""
        return prod(self.chunk) * self.dtype.itemsize

    @property
    def grid(self) -> Shape:
        """How many chunks there are along each axis."""
        return tuple([-(-size // step) for size, step in zip(self.shape, self.chunk, strict=True)])


class ZarrContainer:
    """An opened folder of arrays; see `Container`. Opening reads every `.zarray`."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        names = [name.rstrip("/") for name in folder.children() if name.endswith("/") and not name.endswith(_LOCKS)]
        self._arrays = {name: _read(folder, name) for name in names if folder.has(f"{name}/{ARRAY}")}
        self._others = [name for name in names if name not in self._arrays]
        self._tensors: dict[str, ChunkedTensor] = {}
        self._decoded = DecodedChunks(folder)

    @property
    def tensor_names(self) -> Iterable[str]:
        return self._arrays

    @property
    def object_names(self) -> set[str]:
        """The objects, named as those of `torch_dist` are: `KEY/shard_0_2`."""
        return {file.removesuffix(".pt") for file in self._object_files()}

    @property
    def index_files(self) -> Collection[str]:
        return {FORMAT, *(f"{name}/{ARRAY}" for name in self._arrays)}

    @property
    def files(self) -> set[str]:
        chunks = {f"{name}/{file}" for name in self._arrays for file in self._present(name)}
        return chunks | set(self._object_files())

    def shape(self, name: str) -> Shape:
        return self._arrays[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._arrays[name].dtype

    def tensor(self, name: str) -> ChunkedTensor:
        """See `Container.tensor`: here a chunk that is missing, or of another size, raises UserError."""
        if name not in self._tensors:
            stored = self._arrays[name]
            self._check_chunks(name, stored)
            self._tensors[name] = _chunked(stored, [f"{name}/{file}" for file in _chunk_files(stored)])
        return self._tensors[name]

    def archive(self, name: str) -> OpenArchive:
        return OpenArchive.in_place(self._folder, f"{name}.pt")

    def read(self, tensor: ChunkedTensor, region: Region, out: Array) -> None:
        if not out.size:
            return
        stored = self._arrays[tensor.files[0].rpartition("/")[0]]
        for number, _, in_chunk, in_region in tensor.overlapping(region):
            self._read_chunk(tensor.file(number), stored, in_chunk, out[(*in_region, ...)])

    def close(self) -> None:
        self._folder.close()

    def _read_chunk(self, file: str, stored: ZarrArray, region: Region, out: Array) -> None:
        if stored.compression is None:
            read_region(self._folder, StoredArray(file, 0, stored.chunk), region, out)
        else:
            out[...] = self._decoded.chunk(file, stored.compression, stored.chunk_bytes)[region]

    def _object_files(self) -> list[str]:
        listed = ((name, file) for name in self._others for file in self._folder.below(name).children())
        return [f"{name}/{file}" for name, file in listed if _OBJECT.fullmatch(file)]

    def _present(self, name: str) -> set[str]:
        """Return the files of an array's chunks that are there."""
        return {file for file in self._folder.below(name).children() if file != ARRAY and not file.endswith("/")}

    def _check_chunks(self, name: str, stored: ZarrArray) -> None:
        """Raise UserError unless all chunks are there, each in its size. What `.zarray` says may be absurd."""
        present = self._present(name)
        for file in _chunk_files(stored):
            if file not in present:
                raise UserError(
                    f"chunk `{name}/{file}` is missing: `{name}` of shape {list(stored.shape)} has {prod(stored.grid)} chunks",
                    hint="the checkpoint is incomplete: copy it again, or use an earlier iteration",
                )
            if not stored.compression and (size := self._folder.size(f"{name}/{file}")) != stored.chunk_bytes:
                raise UserError(
                    f"chunk `{name}/{file}` has {size} bytes; {list(stored.chunk)} of `{stored.dtype}` are {stored.chunk_bytes}",
                    hint="the file is truncated or of another checkpoint: copy it again",
                )


def _chunk_files(stored: ZarrArray) -> Iterable[str]:
    """Yield the names of an array's chunks, in C order: their numbers along each axis."""
    return (".".join(map(str, numbers)) or "0" for numbers in _indices(stored.grid)) if 0 not in stored.grid else ()


def _indices(grid: Shape) -> Iterator[Shape]:
    """Yield the indices of a grid in C order. `itertools.product` would first make a tuple of each axis, which may be absurd."""
    if not grid:
        yield ()
        return
    for first in range(grid[0]):
        for rest in _indices(grid[1:]):
            yield first, *rest


def _chunked(stored: ZarrArray, files: list[str]) -> ChunkedTensor:
    """Return an array as chunks of files of their own; those at the end are cut to the array's shape."""
    dims = len(stored.shape)
    numbers = np.zeros((len(files), stride(dims)), np.int64)
    if dims and files:
        starts = np.indices(stored.grid, np.int64).reshape(dims, -1).T * np.array(stored.chunk, np.int64)
        numbers[:, :dims] = starts
        numbers[:, dims : 2 * dims] = np.minimum(np.array(stored.chunk, np.int64), np.array(stored.shape, np.int64) - starts)
    numbers[:, 2 * dims] = np.arange(len(files))
    numbers[:, 2 * dims + 2] = stored.chunk_bytes
    return ChunkedTensor(stored.shape, stored.dtype, array("q", numbers.tobytes()), files)


def _read(folder: Folder, name: str) -> ZarrArray:
    """Read a `.zarray`. Raises UserError for what Megatron does not write."""
    source = f"{name}/{ARRAY}"
    fields = read_json(folder, source)
    shape, chunk = (_sizes(fields, word, source) for word in ("shape", "chunks"))
    for word, expected in _EXPECTED.items():
        if fields.get(word, expected) != expected:
            raise UserError(
                f"`{word}` in `{source}` is `{format_untrusted(fields[word])}`; Megatron writes `{json.dumps(expected)}`",
                hint=_REWRITE,
            )
    dtype: Any = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise UserError(f"`dtype` in `{source}` is `{format_untrusted(dtype)}`, which Megatron does not write", hint=_REWRITE)
    if len(chunk) != len(shape) or not all(chunk):
        raise UserError(f"`{source}` has shape {list(shape)} in chunks of {list(chunk)}", hint="the file is damaged")
    compressor: Any = fields.get("compressor")
    compression = None if compressor is None else Compression(compressor, dtype, chunk)
    return ZarrArray(shape, chunk, DTYPES[_TYPES[dtype]], compression)


def _sizes(fields: dict[str, Any], word: str, source: str) -> Shape:
    sizes: Any = fields.get(word)
    if not isinstance(sizes, list) or not is_valid_shape(cast("list[Any]", sizes)):
        raise UserError(f"`{word}` in `{source}` is `{format_untrusted(sizes)}`, not a list of sizes", hint="the file is damaged")
    return tuple(cast("list[int]", sizes))
