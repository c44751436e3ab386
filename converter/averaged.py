"""Several checkpoints of one model as one, whose weights are their weighted sums: the sum is computed when a weight is read.

Arithmetic is fp32 (fp64 for weights in fp64), in the order of the checkpoints, and each element is rounded once, to nearest even,
to the weight's dtype. Which checkpoints may be averaged is decided in averaging.py.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from converter.values import cast_into
from formats.arrays import Buffer, bands, copy
from formats.dtypes import FLOATS
from formats.spec import DTYPES, Array, Reader, Region, TensorSpec, extent

BLOCK = 1 << 16
"""Elements that are summed at a time: what they take in fp32 stays in a processor's cache."""

_FLOATS = frozenset(DTYPES[name] for name in FLOATS)


@dataclass(frozen=True, slots=True)
class Input:
    """One of the checkpoints."""

    label: str
    weights: Reader
    share: float
    masters: Reader | None = None
    """The weights in fp32, by the names of the weights."""


def is_averaged(spec: TensorSpec) -> bool:
    """Return whether a tensor is summed. Those of other dtypes, such as integers, have to be equal."""
    return spec.dtype in _FLOATS


class AveragedReader:
    """Read the tensors of the first input, summed over all; those named in `of_masters` from the masters."""

    def __init__(self, inputs: Sequence[Input], of_masters: Collection[str] = ()) -> None:
        self._inputs, self._of_masters = inputs, of_masters
        self._local = threading.local()
        self.specs = inputs[0].weights.specs

    def read(self, name: str, region: Region, out: Array) -> None:
        spec = self.specs[name]
        if not is_averaged(spec):
            self._inputs[0].weights.read(name, region, out)
            return
        buffers, shape = self._buffers(), extent(region)
        parts: list[Array] = []
        for model, buffer in zip(self._inputs, buffers.parts, strict=True):
            reader = model.masters if model.masters and name in self._of_masters else model.weights
            parts.append(buffer.view(shape, reader.specs[name].dtype))
            reader.read(name, region, parts[-1])
        total = out if out.flags.c_contiguous else buffers.total.view(shape, spec.dtype)
        self._sum(parts, total, name)
        if total is not out:
            copy(out, total)

    def _sum(self, parts: Sequence[Array], out: Array, name: str) -> None:
        """Write the sum of contiguous arrays, each times its input's share, to `out`, a block at a time."""
        arithmetic, buffers = np.promote_types(DTYPES["fp32"], _numpy_dtype(parts[0])), self._buffers()
        flat, target = [part.reshape(-1) for part in parts], out.reshape(-1)
        for block in bands(slice(0, target.size), BLOCK):
            size = (block.stop - block.start,)
            sums, product = buffers.sums.view(size, arithmetic), buffers.product.view(size, arithmetic)
            for number, (model, part) in enumerate(zip(self._inputs, flat, strict=True)):
                into = product if number else sums
                np.copyto(into, part[block])
                np.multiply(into, arithmetic.type(model.share), out=into)
                if number:
                    np.add(sums, product, out=sums)
            cast_into(target[block], sums, name=name)

    def _buffers(self) -> _Buffers:
        """Return this thread's buffers."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = _Buffers([Buffer() for _ in self._inputs])
        return self._local.buffers

    def close(self) -> None:
        for model in self._inputs:
            model.weights.close()


def _numpy_dtype(part: Array) -> np.dtype[Any]:
    """Return fp64 for fp64, else fp32: numpy cannot promote dtypes of ml_dtypes."""
    return DTYPES["fp64" if part.dtype == DTYPES["fp64"] else "fp32"]


@dataclass(frozen=True, slots=True)
class _Buffers:
    """What one thread reads and sums in."""

    parts: Sequence[Buffer]
    total: Buffer = field(default_factory=Buffer)
    sums: Buffer = field(default_factory=Buffer)
    product: Buffer = field(default_factory=Buffer)
