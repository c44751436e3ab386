"""Decode compressed chunks of zarr arrays, which Megatron does not write, with the tensorstore library.

The chunks come from any folder. A chunk is decoded whole, in memory; those decoded last are kept, because pieces of a tensor are
read one after another.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.spec import Array, Shape

KEPT_BYTES = 1 << 30
"""Decoded chunks of a checkpoint that are kept in memory. A band of rows takes the chunks of all tensor-parallel ranks."""

MOST_BYTES = 4 << 30
"""A chunk that would decode to more is refused. tensorstore ends the process when it cannot allocate what a `.zarray` says."""


class Compression(NamedTuple):
    """What decodes the chunks of an array: parts of its `.zarray`. `dtype` is the name there, `chunk` the shape of each chunk."""

    compressor: Any
    dtype: str
    chunk: Shape

    @property
    def name(self) -> str:
        """The compressor's name, as the untrusted file says it."""
        fields = self.compressor
        return format_untrusted(cast("dict[str, Any]", fields).get("id") if isinstance(fields, dict) else fields)

    def metadata(self) -> dict[str, Any]:
        """Return the `.zarray` of an array that is one chunk."""
        return {
            "zarr_format": 2, "shape": self.chunk, "chunks": self.chunk, "dtype": self.dtype, "compressor": self.compressor,
            "order": "C", "filters": None, "fill_value": None,
        }  # fmt: skip


@dataclass(slots=True)
class _Slot:
    """A chunk's place among those kept. The lock makes threads that need the same chunk decode it once."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    data: Array | None = None


class DecodedChunks:
    """The chunks of a checkpoint's compressed arrays. Safe for several threads."""

    def __init__(self, folder: Folder, *, limit: int = KEPT_BYTES) -> None:
        """`limit`: bytes of decoded chunks that are kept, beside the last one."""
        self._folder, self._limit = folder, limit
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes of all chunks that are kept."""
        with self._lock:
            return self._held()

    def chunk(self, file: str, compression: Compression, nbytes: int) -> Array:
        """Return a decoded chunk of `nbytes`, which nobody may change.

        Raises UserError where tensorstore is not installed, for compressors that it lacks, and for damaged or too large chunks.
        """
        if nbytes > MOST_BYTES:
            raise UserError(
                f"chunk `{file}` is compressed and would take {nbytes} bytes; at most {MOST_BYTES} are decoded at once",
                hint="read it with the program that wrote it, and save it without a compressor or in smaller chunks",
            )
        with self._lock:
            slot = self._slots.setdefault(file, _Slot())
            self._slots.move_to_end(file)
        with slot.lock:
            data = slot.data
            if data is None:
                data = slot.data = _decode(self._folder, file, compression)
        with self._lock:
            self._drop()
        return data

    def _drop(self) -> None:
        """Drop the chunks that were used least recently, until the others keep to the limit."""
        excess = self._held() - self._limit
        for file in list(self._slots)[:-1]:
            if excess <= 0:
                break
            if (data := self._slots[file].data) is not None:
                excess -= data.nbytes
                del self._slots[file]

    def _held(self) -> int:
        return sum(slot.data.nbytes for slot in self._slots.values() if slot.data is not None)


def _decode(folder: Folder, file: str, compression: Compression) -> Array:
    """Read a chunk's file and decode it."""
    store = _in_memory(folder, file, compression)
    try:
        return store.read().result()
    except (OSError, ValueError) as error:
        expected = f"{list(compression.chunk)} of `{compression.dtype}`"
        raise UserError(
            f"chunk `{file}` cannot be decoded by `{compression.name}` to {expected}", hint="the checkpoint is damaged"
        ) from error


def _in_memory(folder: Folder, file: str, compression: Compression) -> Any:
    """Return an opened array of tensorstore's in memory: the chunk alone, as its file has it."""
    tensorstore: Any = _library(file)
    data = bytearray(folder.size(file))
    folder.read_into(file, 0, memoryview(data))
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
    memory = tensorstore.KvStore.open({"driver": "memory"}, context=context).result()
    memory.write(".zarray", json.dumps(compression.metadata())).result()
    memory.write(".".join("0" * len(compression.chunk)) or "0", bytes(data)).result()
    spec = {"driver": "zarr", "kvstore": memory.spec().to_json()}
    try:
        return tensorstore.open(spec, context=context, read=True).result()
    except (OSError, ValueError) as error:
        raise UserError(
            f"`{file}` is compressed by `{compression.name}`, which `tensorstore` cannot open",
            hint="read it with the program that wrote it, and save it without a compressor",
        ) from error


def _library(file: str) -> Any:
    try:
        import tensorstore  # noqa: PLC0415 - seldom needed, and 66 MB
    except ImportError:
        raise UserError(
            f"`{file}` is compressed, and `tensorstore` is not installed", hint="`pip install 'mbtools[zarr]'`"
        ) from None
    return tensorstore
