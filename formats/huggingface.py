"""Hugging Face directories: safetensors files, their index, and the side files that travel with them.

A safetensors file is an 8-byte little-endian header length, a JSON header, then data without gaps. A raw header fixes a
file's whole layout, so writing takes raw headers: those of the source give the source's files back, byte for byte.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from operator import itemgetter
from typing import Any, cast

import numpy as np

from formats.boxes import Stored, place_of, read_box, write_box
from formats.content import refuse_other
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
    dtype_name,
    is_size,
    is_valid_shape,
)

_MAX_HEADER = 100_000_000  # safetensors' own limit

_NAMES = {
    "bf16": "BF16", "fp16": "F16", "fp32": "F32", "fp64": "F64", "fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_OTHER_NAMES = {
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "complex64": "C64", "fp8_e8m0": "F8_E8M0",
    "fp8_e4m3fnuz": "F8_E4M3FNUZ", "fp8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_DTYPE_OF = {safetensors_name: DTYPES[name] for name, safetensors_name in _NAMES.items()}
_OTHER_DTYPE_OF = {safetensors_name: OTHER_DTYPES[name] for name, safetensors_name in _OTHER_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its header as it lies on disk, its tensors in file order, and its size in bytes."""

    raw: bytes
    tensors: Mapping[str, TensorSpec]
    size: int

    def starts(self) -> dict[str, int]:
        """Where each tensor's data starts. Made when it is asked for: models have hundreds of thousands of tensors."""
        sizes = (spec.nbytes for spec in self.tensors.values())
        return dict(zip(self.tensors, accumulate(sizes, initial=len(self.raw)), strict=False))  # the last is where the file ends


def specs_of(shards: Mapping[str, Shard]) -> dict[str, TensorSpec]:
    """The tensors of all files."""
    return {name: spec for shard in shards.values() for name, spec in shard.tensors.items()}


def parse_shard(raw: bytes, *, source: str, any_dtype: bool = False) -> Shard:
    """A shard from the raw bytes before its data. With `any_dtype` also of dtypes that cannot be converted; tensors of one that
    numpy does not have are read as bytes.

    Raises UserError where dtypes, shapes or offsets are nonsense, overlap or leave gaps.
    """
    if len(raw) < 8 or struct.unpack("<Q", raw[:8])[0] != len(raw) - 8:
        raise UserError(f"`{source}` does not have the length its first 8 bytes say", hint="the header is damaged")
    entries = parse_json(raw[8:], source=source)
    described = entries.pop("__metadata__", {})
    if not isinstance(described, dict) or not all(isinstance(text, str) for text in cast("dict[str, Any]", described).values()):
        raise UserError(f"`{source}`: `__metadata__` should hold text alone", hint="the header is damaged")
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
    """The header of a file, checked against the file's size."""
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
    """A raw header for tensors in that order, as the safetensors library writes it: padded with spaces to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": _NAMES[dtype_name(spec.dtype)],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


_BY_SPAN = itemgetter(slice(2))


def _span(name: str, entry: Any, source: str) -> tuple[int, int, str]:
    """Where the data of an entry starts and stops, and its name."""
    offsets = cast("dict[str, Any]", entry).get("data_offsets") if isinstance(entry, dict) else None
    match offsets:
        case [start, stop] if type(start) is int and is_size(stop) and 0 <= start <= stop:
            return start, stop, name
        case _:
            raise UserError(f"`{source}`: `{name}` has data offsets `{format_untrusted(offsets)}`", hint="the header is damaged")


def _spec(name: str, entry: dict[str, Any], source: str, known: dict[str, TensorSpec], size: int | None) -> TensorSpec:
    """A tensor as an entry describes it, of `size` bytes where it may have any dtype. Layers repeat their tensors: each kind of
    them is checked once and `known` from then on."""
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
    if not isinstance(dtype, str) or (size is None and dtype not in _DTYPE_OF):
        raise UserError(
            f"`{source}`: `{name}` has dtype `{format_untrusted(dtype)}`",
            hint=f"those that can be converted are {', '.join(_DTYPE_OF)}",
        )
    sizes = tuple(cast("list[Any]", shape if isinstance(shape, list) else [None]))
    if not is_valid_shape(sizes):
        raise UserError(f"`{source}`: `{name}` has shape `{format_untrusted(shape)}`", hint="the header is damaged")
    held = _DTYPE_OF.get(dtype) or _OTHER_DTYPE_OF.get(dtype)
    return (
        TensorSpec(name, sizes, held)
        if held
        else ViewSpec(name, (size or 0,), np.dtype(np.uint8), sizes, format_untrusted(dtype))
    )


_FILES_AT_ONCE = 64


def _starts(shards: Mapping[str, Shard]) -> Callable[[str], Mapping[str, int]]:
    """Where each tensor's data starts in a file, by the file's name; kept for those that were last asked for."""

    @lru_cache(_FILES_AT_ONCE)
    def starts(file: str) -> dict[str, int]:
        return shards[file].starts()

    return starts


class HuggingFaceReader:
    """An opened folder: headers read and checked against the index; data read on demand."""

    def __init__(self, folder: Folder, *, files: Sequence[str] | None = None, any_dtype: bool = False) -> None:
        """`any_dtype`: also with tensors of dtypes that cannot be converted, to report or to compare them."""
        self.folder = folder
        listed = weight_map(folder) if files is None else {}
        names = shard_names(folder, listed) if files is None else files
        self.shards = {name: read_shard(folder, name, any_dtype=any_dtype) for name in names}
        self.indexed = not self.shards.keys().isdisjoint(listed.values())
        """Is the folder's index of these files? One that an older model left behind is of others."""

        self._files: dict[str, str] = {}
        self._starts = _starts(self.shards)
        self.specs: dict[str, TensorSpec] = {}
        for file, shard in self.shards.items():
            self._add(file, shard)
        if self.indexed:
            self._check_index(listed)

    def _add(self, file: str, shard: Shard) -> None:
        for name in shard.tensors:
            if name in self._files:
                raise UserError(f"`{name}` is in two files: `{self._files[name]}` and `{file}`")
            self._files[name] = file
        self.specs.update(shard.tensors)

    def _check_index(self, listed: Mapping[str, str]) -> None:
        wrong = [name for name, file in self._files.items() if listed.get(name) != file]
        wrong += [name for name in listed if name not in self._files]
        for name in sorted(wrong):
            there = self._files.get(name, "no file")
            if listed.get(name, "no file") != there:
                raise UserError(
                    f"`{INDEX}` puts `{name}` in {listed.get(name, 'no file')}, it is in {there}",
                    hint="the index belongs to other files; fetch the directory again",
                )

    def read(self, name: str, region: Region, out: Array) -> None:
        file = self._files[name]
        read_box(self.folder, Stored(file, self._starts(file)[name], self.specs[name].shape), region, out)

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
        return place_of(self._stored(name), region, dtype.itemsize)

    def write(self, outputs: Outputs, name: str, region: Region, data: Array) -> None:
        write_box(outputs, self._stored(name), region, data)

    def _stored(self, name: str) -> Stored:
        file = self._files[name]
        return Stored(file, self._starts(file)[name], self._shards[file].tensors[name].shape)

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
    """Tensors in order, filled into files of at most `limit` bytes of data (a larger tensor gets its own), named as
    transformers names them."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    names = [SINGLE] if len(groups) == 1 else [_shard_name(i + 1, len(groups)) for i in range(len(groups))]
    return {name: parse_shard(make_header(group), source=name) for name, group in zip(names, groups, strict=True)}


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def make_index(shards: Mapping[str, Shard]) -> bytes:
    """The index document of these files, as transformers writes it."""
    placed = sorted((name, file) for file, shard in shards.items() for name in shard.tensors)
    specs = [spec for shard in shards.values() for spec in shard.tensors.values()]
    totals = {
        "total_parameters": sum(prod(spec.shape) for spec in specs),
        "total_size": sum(spec.nbytes for spec in specs),
    }
    return (json.dumps({"metadata": totals, "weight_map": dict(placed)}, indent=2, sort_keys=True) + "\n").encode()


def retyped(shard: Shard, specs: Mapping[str, TensorSpec], *, source: str) -> Shard:
    """The same tensors in the same order and file, with the dtypes of `specs`; the same shard where none differs."""
    if all(specs[name].dtype == spec.dtype for name, spec in shard.tensors.items()):
        return shard
    return parse_shard(make_header(specs[name] for name in shard.tensors), source=source)


_OTHER_WEIGHTS = re.compile(
    r"(^original/)|\.(bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data(_\d+)?|safetensors|tflite|npz|ot|nemo)$"
    r"|\.index(\.[\w-]+)?\.json$"
)
_ADAPTER = "adapter_"
_ADAPTER_CONFIG = f"{_ADAPTER}config.json"


def side_files(folder: Folder, shards: Iterable[str], *, indexed: bool) -> tuple[list[str], list[str]]:
    """The files beside the model's `shards`, as relative names: those that travel, and those that are not the model's: weights in
    other formats, an index of other files (if there is one and not `indexed`), adapters. UserError for a link that leads to no
    file, where the file would travel."""
    model, found = set(shards), folder.files()
    ours = {INDEX} if indexed else set[str]()
    adapters = tuple(name.removesuffix("config.json") for name in found if name.rpartition("/")[2] == _ADAPTER_CONFIG)
    left_out = [name for name in found if name not in model | ours and (name.startswith(adapters) or _does_not_travel(name))]
    travels = [name for name in found if name not in model and name not in left_out]
    for name in travels:
        if not folder.has(name):
            raise UserError(
                f"`{name}` in `{folder.label}` is a link that leads to no file",
                hint="fetch the file again, or remove the link if the model does not need it",
            )
    return travels, left_out


def _does_not_travel(name: str) -> bool:
    """Weights in other formats, version control, download caches, links to folders."""
    return bool(_OTHER_WEIGHTS.search(name)) or name.endswith("/")
