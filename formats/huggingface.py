"""Read and write Hugging Face directories: safetensors files, their index, and side files.

A safetensors file is an 8-byte little-endian header length, a JSON header, then data without gaps. The raw header determines
the layout of the file, so writing takes raw headers: those of the source reproduce its files byte for byte.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from math import prod
from operator import itemgetter
from typing import Any, NamedTuple, cast

import numpy as np

from formats.content import refuse_other
from formats.dtypes import COMPARED, CONVERTED
from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.json_objects import parse_json
from formats.outputs import Outputs
from formats.shard_files import INDEX, SINGLE, shard_names, weight_map
from formats.spec import (
    DTYPES,
    OTHER_DTYPES,
    Array,
    Document,
    Region,
    Span,
    TensorSpec,
    ViewSpec,
    is_size,
    is_valid_shape,
    names_of,
)
from formats.stored_arrays import StoredArray, file_offset, read_region, write_region

_MAX_HEADER = 100_000_000  # safetensors' own limit

_DTYPES = {dtype.safetensors: DTYPES[dtype.name] for dtype in CONVERTED}
_OTHER_DTYPES = {dtype.safetensors: OTHER_DTYPES[dtype.name] for dtype in COMPARED}


class Shard(NamedTuple):
    """One safetensors file: its raw header, its tensors in file order, and its size in bytes."""

    raw: bytes
    tensors: Mapping[str, TensorSpec]
    size: int

    def starts(self) -> dict[str, int]:
        """Return the byte offset of each tensor's data. Computed on demand: models have hundreds of thousands of tensors."""
        sizes = (spec.nbytes for spec in self.tensors.values())
        return dict(
            zip(self.tensors, accumulate(sizes, initial=len(self.raw)), strict=False)
        )  # the last sum is the end of the file


def specs_of(shards: Mapping[str, Shard]) -> dict[str, TensorSpec]:
    """Return the tensors of all files by name."""
    return {name: spec for shard in shards.values() for name, spec in shard.tensors.items()}


def parse_shard(raw: bytes, *, source: str, any_dtype: bool = False) -> Shard:
    """Parse the raw header of a shard.

    `any_dtype`: accept dtypes that cannot be converted; tensors whose dtype numpy lacks are read as bytes. Raises UserError for
    invalid dtypes, shapes or offsets, for overlaps and gaps.
    """
    if len(raw) < 8 or struct.unpack("<Q", raw[:8])[0] != len(raw) - 8:
        raise UserError(f"`{source}` does not have the length that its first 8 bytes give", hint="the header is damaged")
    entries = parse_json(raw[8:], source=source)
    described = entries.pop("__metadata__", {})
    if not isinstance(described, dict) or not all(isinstance(text, str) for text in cast("dict[str, Any]", described).values()):
        raise UserError(f"`{source}`: `__metadata__` should hold only text", hint="the header is damaged")
    tensors: dict[str, TensorSpec] = {}
    end, known = 0, dict[str, TensorSpec]()
    for start, stop, name in sorted((_span(name, entry, source) for name, entry in entries.items()), key=_BY_SPAN):
        spec = _spec(name, entries.pop(name), source, known, stop - start if any_dtype else None)
        if start != end or stop - start != spec.nbytes:
            raise UserError(
                f"`{source}`: the data of `{name}` should be {spec.nbytes} bytes from {end}, its header says {start} to {stop}",
                hint="tensors must fill the file without gaps or overlaps; the file is damaged",
            )
        tensors[name] = spec
        end = stop
    return Shard(raw, tensors, len(raw) + end)


def read_shard(folder: Folder, name: str, *, any_dtype: bool = False) -> Shard:
    """Read the header of a file, and check it against the file's size."""
    size = folder.size(name)
    prefix = bytearray(8 if size >= 8 else 0)
    folder.read_into(name, 0, memoryview(prefix))
    length = struct.unpack("<Q", prefix)[0] if prefix else 0
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        refuse_other(folder, name)
        raise UserError(
            f"`{name}` claims a header of {length} bytes and is {size} bytes long",
            hint="it is not a safetensors file, or it is truncated",
        )
    raw = bytearray(8 + length)
    folder.read_into(name, 0, memoryview(raw))
    shard = parse_shard(bytes(raw), source=name, any_dtype=any_dtype)
    if shard.size != size:
        raise UserError(
            f"`{name}` is {size} bytes long, its header describes {shard.size}",
            hint="the file is truncated or still being written; fetch it again",
        )
    return shard


def make_header(specs: Iterable[TensorSpec]) -> bytes:
    """Return the raw header for tensors in that order, as the safetensors library writes it: padded with spaces to 8 bytes."""
    text = bytearray(b'{"__metadata__":{"format":"pt"}')
    end = 0
    for spec in specs:
        start, end = end, end + spec.nbytes
        entry = {"dtype": names_of(spec.dtype).safetensors, "shape": spec.shape, "data_offsets": (start, end)}
        text += f",{_compact(spec.name)}:{_compact(entry)}".encode()
    text += b"}"
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def shard_of(specs: Iterable[TensorSpec]) -> Shard:
    """Return the layout of a file that holds these tensors in that order."""
    tensors = {spec.name: spec if type(spec) is TensorSpec else TensorSpec(spec.name, spec.shape, spec.dtype) for spec in specs}
    raw = make_header(tensors.values())
    return Shard(raw, tensors, len(raw) + sum(spec.nbytes for spec in tensors.values()))


_compact = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode

_BY_SPAN = itemgetter(slice(2))


def _span(name: str, entry: Any, source: str) -> tuple[int, int, str]:
    """Return start and stop of an entry's data, and its name."""
    offsets = cast("dict[str, Any]", entry).get("data_offsets") if isinstance(entry, dict) else None
    if isinstance(offsets, list) and len(cast("list[Any]", offsets)) == 2:
        start, stop = cast("list[Any]", offsets)
        if type(start) is int and is_size(stop) and 0 <= start <= stop:
            return start, stop, name
    raise UserError(f"`{source}`: `{name}` has data offsets `{format_untrusted(offsets)}`", hint="the header is damaged")


def _spec(name: str, entry: dict[str, Any], source: str, known: dict[str, TensorSpec], size: int | None) -> TensorSpec:
    """Return the tensor that an entry describes; `size` is its number of bytes if it may have any dtype.

    Layers repeat dtypes and shapes: each combination is checked once and kept in `known`.
    """
    shape, dtype = entry.get("shape"), entry.get("dtype")
    kind = f"{dtype!r} {shape!r}"  # of 1, 1.0 and true, only one is a size
    like = known.get(kind)
    if like is None:
        like = _checked(name, shape, dtype, source, size)
        if type(like) is TensorSpec:
            known[kind] = like
        return like
    return TensorSpec(name, like.shape, like.dtype)


def _checked(name: str, shape: Any, dtype: Any, source: str, size: int | None) -> TensorSpec:
    if not isinstance(dtype, str) or (size is None and dtype not in _DTYPES):
        raise UserError(
            f"`{source}`: `{name}` has dtype `{format_untrusted(dtype)}`",
            hint=f"those that can be converted are {', '.join(_DTYPES)}",
        )
    sizes = tuple(cast("list[Any]", shape if isinstance(shape, list) else [None]))
    if not is_valid_shape(sizes):
        raise UserError(f"`{source}`: `{name}` has shape `{format_untrusted(shape)}`", hint="the header is damaged")
    numpy_dtype = _DTYPES.get(dtype) or _OTHER_DTYPES.get(dtype)
    return (
        TensorSpec(name, sizes, numpy_dtype)
        if numpy_dtype
        else ViewSpec(name, (size or 0,), np.dtype(np.uint8), sizes, format_untrusted(dtype))
    )


_FILES_AT_ONCE = 64
_NO_FILE = "no file"


def _starts(shards: Mapping[str, Shard]) -> Callable[[str], Mapping[str, int]]:
    """Return a cached function from a file's name to the byte offsets of its tensors."""

    @lru_cache(_FILES_AT_ONCE)
    def starts(file: str) -> dict[str, int]:
        return shards[file].starts()

    return starts


class HuggingFaceReader:
    """An opened folder: headers are read and checked against the index, data is read on demand."""

    others: Sequence[str] = ()
    """Tensors that are no weights, and are not read: an optimizer's."""

    def __init__(self, folder: Folder, *, files: Sequence[str] | None = None, any_dtype: bool = False) -> None:
        """`files`: default those of the model. `any_dtype`: accept dtypes that cannot be converted, to report or compare them."""
        self.folder = folder
        self.beside = folder
        """The folder with `config.json` and side files."""

        listed = weight_map(folder) if files is None else {}
        names = shard_names(folder, listed) if files is None else files
        self.indexed = not set(names).isdisjoint(listed.values())
        """Does the folder's index describe these files? One that an older model left behind describes others."""

        self.shards: dict[str, Shard] = {}
        self._files: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        misplaced: dict[str, str] = {}
        for file in names:
            self._add(file, read_shard(folder, file, any_dtype=any_dtype))
            if self.indexed:
                misplaced |= self._taken_out(listed, file)
        self._starts = _starts(self.shards)
        if self.indexed:
            self._check_index({**listed, **misplaced})

    def _add(self, file: str, shard: Shard) -> None:
        if not self._files.keys().isdisjoint(shard.tensors):
            name = next(name for name in shard.tensors if name in self._files)
            raise UserError(f"`{name}` is in two files: `{self._files[name]}` and `{file}`")
        self.shards[file] = shard
        self._files.update(dict.fromkeys(shard.tensors, file))
        self.specs.update(shard.tensors)

    def _taken_out(self, listed: dict[str, str], file: str) -> dict[str, str]:
        """Take a file's tensors out of the index, which frees their names one file after the other; return those that it puts
        elsewhere, with where."""
        files_listed = {name: listed.pop(name, _NO_FILE) for name in self.shards[file].tensors}
        return {name: listed_file for name, listed_file in files_listed.items() if listed_file != file}

    def _check_index(self, wrong: Mapping[str, str]) -> None:
        """Raise UserError for the first of the tensors that the index puts where they are not."""
        if wrong:
            name = min(wrong)
            raise UserError(
                f"`{INDEX}` puts `{name}` in {wrong[name]}, it is in {self._files.get(name, _NO_FILE)}",
                hint="the index belongs to other files; fetch the directory again",
            )

    @property
    def files(self) -> Collection[str]:
        """The files that its tensors are read from, relative to `folder`."""
        return self.shards.keys()

    def read(self, name: str, region: Region, out: Array) -> None:
        file = self._files[name]
        read_region(self.folder, StoredArray(file, self._starts(file)[name], self.specs[name].shape), region, out)

    def close(self) -> None:
        self.folder.close()


class HuggingFaceWriter:
    """The layout of safetensors files whose raw headers are given, so that every offset is known before the first byte."""

    def __init__(self, shards: Mapping[str, Shard]) -> None:
        self._shards, self._starts = shards, _starts(shards)
        self._files = {name: file for file, shard in shards.items() for name in shard.tensors}

    @property
    def files(self) -> dict[str, int]:
        return {file: shard.size for file, shard in self._shards.items()}

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return specs_of(self._shards)

    def file_offset(self, name: str, region: Region) -> int:
        dtype = self._shards[self._files[name]].tensors[name].dtype
        return file_offset(self._stored(name), region, dtype.itemsize)

    def write(self, outputs: Outputs, name: str, region: Region, data: Array) -> None:
        write_region(outputs, self._stored(name), region, data)

    def _stored(self, name: str) -> StoredArray:
        file = self._files[name]
        return StoredArray(file, self._starts(file)[name], self._shards[file].tensors[name].shape)

    @property
    def documents(self) -> dict[str, Document]:
        return {}

    @property
    def markers(self) -> dict[str, bytes]:
        return {}

    def spans(self, file: str) -> Iterator[Span]:
        shard = self._shards[file]
        yield Span(0, shard.raw)
        yield Span(len(shard.raw), None, shard.size - len(shard.raw))

    def touched(self, name: str, region: Region | None = None) -> set[str]:  # noqa: ARG002 - a tensor is in one file
        return {self._files[name]}


def plan_shards(specs: Sequence[TensorSpec], *, limit: int) -> dict[str, Shard]:
    """Distribute tensors, in order, over files of at most `limit` bytes of data, named as transformers names them.

    A larger tensor gets a file of its own.
    """
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    names = [SINGLE] if len(groups) == 1 else [_shard_name(i + 1, len(groups)) for i in range(len(groups))]
    return {name: shard_of(group) for name, group in zip(names, groups, strict=True)}


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def make_index(shards: Mapping[str, Shard]) -> bytes:
    """Return the index document of these files, as transformers writes it."""
    files = sorted((name, file) for file, shard in shards.items() for name in shard.tensors)
    specs = [spec for shard in shards.values() for spec in shard.tensors.values()]
    totals = {
        "total_parameters": sum(prod(spec.shape) for spec in specs),
        "total_size": sum(spec.nbytes for spec in specs),
    }
    return (json.dumps({"metadata": totals, "weight_map": dict(files)}, indent=2, sort_keys=True) + "\n").encode()


def retyped(shard: Shard, specs: Mapping[str, TensorSpec]) -> Shard:
    """Return the shard with the dtypes and shapes of `specs`, and tensors in the same order; the same shard if none differs."""
    if all((specs[name].dtype, specs[name].shape) == (spec.dtype, spec.shape) for name, spec in shard.tensors.items()):
        return shard
    return shard_of(specs[name] for name in shard.tensors)


_OTHER_WEIGHTS = re.compile(
    r"(^original/)|\.(bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data(_\d+)?|safetensors|tflite|npz|ot|nemo|distcp)$|(^|/)\.metadata$"
    r"|\.index(\.[\w-]+)?\.json$"
)
_ADAPTER = "adapter_"
_ADAPTER_CONFIG = f"{_ADAPTER}config.json"


def side_files(folder: Folder, shards: Iterable[str], *, indexed: bool) -> tuple[list[str], list[str]]:
    """Return the names of files besides the model's `shards`: side files to copy, and files that are left out.

    Left out are weights in other formats, an index of other files (if not `indexed`) and adapters. Raises UserError for a side
    file that is a broken link.
    """
    model, names = set(shards), folder.files()
    ours = {INDEX} if indexed else set[str]()
    adapters = tuple(name.removesuffix("config.json") for name in names if name.rpartition("/")[2] == _ADAPTER_CONFIG)
    left_out = [name for name in names if name not in model | ours and (name.startswith(adapters) or _is_left_out(name))]
    copied = [name for name in names if name not in model and name not in left_out]
    for name in copied:
        if not folder.has(name):
            raise UserError(
                f"`{name}` in `{folder.label}` is a broken link",
                hint="fetch the file again, or remove the link if the model does not need it",
            )
    return copied, left_out


def _is_left_out(name: str) -> bool:
    """Is it weights in another format, version control, a download cache or a link to a folder?"""
    return bool(_OTHER_WEIGHTS.search(name)) or name.endswith("/")
