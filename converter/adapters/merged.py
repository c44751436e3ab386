"""A model whose weights an adapter has changed, read like any other: the sum is made as rows pass by.

Arithmetic is fp32 and each element is rounded once, to nearest even, into the dtype it is asked for in. B · A is multiplied
in tiles that depend on the shapes alone: BLAS may round the same element differently in a larger or smaller one, and a row
must have one value, whichever band of rows a format happens to ask for. Knows Hugging Face names and no formats.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod

import numpy as np

from converter.adapters.adapter import Adapter, Delta
from converter.values import cast_into, target_dtype
from formats.arrays import Buffer, bands, copy
from formats.spec import DTYPES, Array, Reader, Region, extent

BLOCK_BYTES = 1 << 20
"""Of a block in fp32, at most, so that it stays in a processor's cache."""

BLOCK_ROWS = 32
"""Larger ones multiply no faster. The rows of one attention head are whole blocks: fused tensors are read head by head."""

TILE_PRODUCTS = 1 << 18
"""Multiplications in a tile at most. OpenBLAS (`interface/gemm.c`, `SMP_THRESHOLD_MIN`) multiplies no more than that on the
calling thread: its own threads beside our workers cost ten times what they gain, and how many there are would show in the bits.
"""

RECENT = 6
"""Adapters of weights that are kept: workers are busy with neighbors, in two places of a file's order at once, and rows of
three weights take turns in a fused one."""

_FP32 = DTYPES["fp32"]


class MergedReader:
    """See the module. `adapter` changes only weights that `reader` has, of the same shape; those are presented in `dtype`."""

    def __init__(self, reader: Reader, adapter: Adapter, *, dtype: str) -> None:
        self._reader = reader
        self._names = adapter.names
        self._recent = Recent(adapter.read)
        self._local = threading.local()
        self.specs = {
            name: replace(spec, dtype=target_dtype(spec, dtype)) if name in adapter.names else spec
            for name, spec in reader.specs.items()
        }

    def read(self, name: str, region: Region, out: Array) -> None:
        if name not in self._names:
            return self._reader.read(name, region, out)
        spec, rows = self._reader.specs[name], region[0]
        if region[1:] != spec.full_region[1:]:
            return self._read_parts(name, region, out)
        stored = out if out.dtype == spec.dtype else self._buffers()[0].view(extent(region), spec.dtype)
        self._reader.read(name, region, stored)
        delta = self._recent.get(name)
        for block in blocks(rows, spec.shape):
            start, stop = max(block.start, rows.start), min(block.stop, rows.stop)
            band = slice(start - rows.start, stop - rows.start)
            cast_into(out[band], self._changed(delta, block, slice(start, stop), stored[band]), name=name)
        return None

    def _read_parts(self, name: str, region: Region, out: Array) -> None:
        """Parts of rows: a row has to be whole to be changed, since DoRA's factor depends on all of it."""
        whole = self.specs[name].full_region
        for number, row in enumerate(range(region[0].start, region[0].stop)):
            changed = np.empty((1, *self.specs[name].shape[1:]), out.dtype)
            self.read(name, (slice(row, row + 1), *whole[1:]), changed)
            copy(out[number], changed[(0, *region[1:])])

    def close(self) -> None:
        self._reader.close()

    def _changed(self, delta: Delta, block: slice, rows: slice, stored: Array) -> Array:
        """Rows of one block of a weight: what is stored of them, changed, in fp32; valid until the next call."""
        _, products, sums = self._buffers()
        product = products.view((block.stop - block.start, delta.a.shape[1]), _FP32)
        multiply(delta.b[block], delta.a, product)
        weight = sums.view(stored.shape, _FP32)
        np.copyto(weight, stored)
        change(weight, delta, product[rows.start - block.start : rows.stop - block.start], rows)
        return weight

    def _buffers(self) -> tuple[Buffer, Buffer, Buffer]:
        """This thread's."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffer(), Buffer(), Buffer()
        return self._local.buffers


def multiply(b: Array, a: Array, out: Array) -> None:
    """b · a into `out`, tile by tile."""
    step = max(1, TILE_PRODUCTS // max(b.size, 1))
    for columns in bands(slice(0, a.shape[1]), step):
        np.matmul(b, a[:, columns], out=out[:, columns])


def change(weight: Array, delta: Delta, product: Array, rows: slice) -> None:
    """Change rows of a weight in place; all are fp32, `product` is those rows of B · A and is used up.

    DoRA brings each row to the length that its magnitude says (`DoraLinearLayer` in PEFT's `tuners/lora/dora.py`); a row of
    zeros has no direction and stays.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        np.multiply(product, np.float32(delta.scale), out=product)
        np.add(weight, product, out=weight)
    if delta.magnitude is None:
        return
    np.square(weight, out=product)
    lengths = np.sqrt(product.sum(axis=1, dtype=np.float64))
    factors = np.divide(delta.magnitude[rows], lengths, out=np.zeros_like(lengths), where=lengths != 0)
    np.multiply(weight, factors.astype(_FP32)[:, np.newaxis], out=weight)


def blocks(rows: slice, shape: tuple[int, ...]) -> Iterator[slice]:
    """The blocks of a weight of `shape`, [out, in], that hold some of its `rows`."""
    step = block_rows(shape)
    for start in range(rows.start // step * step, rows.stop, step):
        yield slice(start, min(start + step, shape[0]))


def block_rows(shape: tuple[int, ...]) -> int:
    """How many rows of a weight are multiplied at a time."""
    return max(1, min(BLOCK_ROWS, BLOCK_BYTES // (max(prod(shape[1:]), 1) * _FP32.itemsize)))


class Recent:
    """The adapters of the weights in use, each read when it is first asked for, by one thread for all."""

    def __init__(self, read: Callable[[str], Delta]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Delta] = OrderedDict()

    def get(self, name: str) -> Delta:
        with self._lock:
            if name not in self._kept:
                while len(self._kept) >= RECENT:
                    self._kept.popitem(last=False)
                self._kept[name] = self._read(name)
            self._kept.move_to_end(name)
            return self._kept[name]
