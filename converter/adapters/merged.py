"""A model with the changes of an adapter added to its weights, as a reader: the sum is computed when rows are read.

Arithmetic is fp32, and each element is rounded once, to nearest even, to the requested dtype. B · A is multiplied in tiles whose
size depends on the shapes alone: BLAS may round the same element differently in a larger or smaller tile, and a row must have
one value, whichever band of rows a format reads. Knows Hugging Face names and no formats.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from converter.adapters.adapter import Delta
from converter.values import cast_into, target_dtype
from formats.arrays import Buffer, copy
from formats.spec import DTYPES, Array, Reader, Region, Shape, TensorSpec, extent

BLOCK_BYTES = 1 << 20
"""The most bytes of a block in fp32: it should stay in a processor's cache."""

BLOCK_ROWS = 32
"""The most rows of a block. Larger blocks multiply no faster. The rows of an attention head are whole blocks, since fused tensors
are read head by head."""

TILE_PRODUCTS = 1 << 18
"""The most multiplications in a tile. OpenBLAS (`interface/gemm.c`, `SMP_THRESHOLD_MIN`) computes up to that many on the calling
thread. Its own threads, besides our workers, cost ten times what they gain, and their number would change the bits."""

RECENT = 6
"""How many weights' deltas are cached: workers read neighboring weights at two positions of a file at once, and rows of three
weights alternate in a fused one."""

_FP32 = DTYPES["fp32"]


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight that changes, [out, in] as it is stored, and where it is: a tensor, or one expert's share of it."""

    name: str
    tensor: TensorSpec
    expert: int | None = None

    @property
    def shape(self) -> Shape:
        return self.tensor.shape if self.expert is None else self.tensor.shape[1:]

    def read(self, reader: Reader, region: Region, out: Array) -> None:
        """Read a region of the weight from the reader of its tensor."""
        if self.expert is None:
            reader.read(self.tensor.name, region, out)
        else:
            reader.read(self.tensor.name, (slice(self.expert, self.expert + 1), *region), out[np.newaxis])


class MergedReader:
    """Read the tensors of `reader` with deltas added to the weights `changed`, which have the deltas' shapes.

    `stacks`: the tensors that hold all experts of a layer, [experts, …], each with the names of its experts' weights, of which
    all change or none does. Changed weights have the dtype `dtype`, the others their own. `read_delta` returns the delta of one
    weight.
    """

    def __init__(
        self,
        reader: Reader,
        read_delta: Callable[[str], Delta],
        *,
        changed: Collection[str],
        stacks: Mapping[str, Sequence[str]] | None = None,
        dtype: str,
    ) -> None:
        self._reader = reader
        self._stacks = {tensor: weights for tensor, weights in (stacks or {}).items() if weights[0] in changed}
        self._changed = {name for name in reader.specs if name in changed or name in self._stacks}
        self._deltas = RecentValues(read_delta)
        self._local = threading.local()
        self.specs = {
            name: replace(spec, dtype=target_dtype(spec, dtype)) if name in self._changed else spec
            for name, spec in reader.specs.items()
        }

    def read(self, name: str, region: Region, out: Array) -> None:
        spec = self._reader.specs[name]
        if name not in self._changed:
            self._reader.read(name, region, out)
        elif name not in self._stacks:
            self._read(_Weight(name, spec), region, out)
        else:
            for index, expert in enumerate(range(region[0].start, region[0].stop)):
                self._read(_Weight(self._stacks[name][expert], spec, expert), region[1:], out[index])

    def _read(self, weight: _Weight, region: Region, out: Array) -> None:
        rows, delta, dtype = region[0], self._deltas.get(weight.name), weight.tensor.dtype
        if delta.magnitude is not None and extent(region[1:]) != weight.shape[1:]:
            return self._read_parts(weight, region, out)
        stored = out if out.dtype == dtype else self._buffers()[0].view(extent(region), dtype)
        weight.read(self._reader, region, stored)
        for block in blocks(rows, weight.shape):
            start, stop = max(block.start, rows.start), min(block.stop, rows.stop)
            band = slice(start - rows.start, stop - rows.start)
            cast_into(out[band], self._add(delta, block, (slice(start, stop), region[1]), stored[band]), name=weight.name)
        return None

    def _read_parts(self, weight: _Weight, region: Region, out: Array) -> None:
        """Read a region of some columns by reading whole rows: DoRA's factor depends on all of a row."""
        columns = weight.shape[1]
        for index, row in enumerate(range(region[0].start, region[0].stop)):
            merged = np.empty((1, columns), out.dtype)
            self._read(weight, (slice(row, row + 1), slice(0, columns)), merged)
            copy(out[index], merged[(0, *region[1:])])

    def close(self) -> None:
        self._reader.close()

    def _add(self, delta: Delta, block: slice, region: Region, stored: Array) -> Array:
        """Return a region of one block, `stored` with the delta added, in fp32. Valid until the thread's next call."""
        _, products, sums = self._buffers()
        product = products.view((block.stop - block.start, delta.a.shape[1]), _FP32)
        rows, columns = region
        multiply(delta.b[block], delta.a, product, columns)
        weight = sums.view(stored.shape, _FP32)
        np.copyto(weight, stored)
        change(weight, delta, product[rows.start - block.start : rows.stop - block.start, columns], rows)
        return weight

    def _buffers(self) -> tuple[Buffer, Buffer, Buffer]:
        """Return this thread's buffers."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffer(), Buffer(), Buffer()
        return self._local.buffers


def multiply(b: Array, a: Array, out: Array, columns: slice) -> None:
    """Write b · a into `out`, tile by tile: those tiles alone that have some of `columns`."""
    step = max(1, TILE_PRODUCTS // max(b.size, 1))
    for start in range(columns.start // step * step, columns.stop, step):
        tile = slice(start, min(start + step, a.shape[1]))
        np.matmul(b, a[:, tile], out=out[:, tile])


def change(weight: Array, delta: Delta, product: Array, rows: slice) -> None:
    """Change rows of a weight in place, all in fp32. `product`, the same rows of B · A, is overwritten.

    DoRA scales each row to the norm that its magnitude gives (`DoraLinearLayer` in PEFT's `tuners/lora/dora.py`). A row of zeros
    has no direction and stays zero.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        np.multiply(product, np.float32(delta.scale), out=product)
        np.add(weight, product, out=weight)
    if delta.magnitude is None:
        return
    np.square(weight, out=product)
    norms = np.sqrt(product.sum(axis=1, dtype=np.float64))
    factors = np.divide(delta.magnitude[rows], norms, out=np.zeros_like(norms), where=norms != 0)
    np.multiply(weight, factors.astype(_FP32)[:, np.newaxis], out=weight)


def blocks(rows: slice, shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield the blocks of a weight of `shape`, [out, in], that overlap `rows`.

    >>> list(blocks(slice(30, 70), (80, 16)))
    [slice(0, 32, None), slice(32, 64, None), slice(64, 80, None)]
    """
    step = block_rows(shape)
    for start in range(rows.start // step * step, rows.stop, step):
        yield slice(start, min(start + step, shape[0]))


def block_rows(shape: tuple[int, ...]) -> int:
    """Return how many rows of a weight are multiplied at a time."""
    return max(1, min(BLOCK_ROWS, BLOCK_BYTES // (max(prod(shape[1:]), 1) * _FP32.itemsize)))


class RecentValues[Value]:
    """The values last in use by name, such as the deltas of weights; at most `RECENT`. Thread-safe: one thread reads for all."""

    def __init__(self, read: Callable[[str], Value]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Value] = OrderedDict()

    def get(self, name: str) -> Value:
        with self._lock:
            if name not in self._kept:
                while len(self._kept) >= RECENT:
                    self._kept.popitem(last=False)
                self._kept[name] = self._read(name)
            self._kept.move_to_end(name)
            return self._kept[name]
