"""Read a checkpoint with quantized weights as plain ones: plain names, plain dtypes, no scales.

Regions are decoded as they are read, a band at a time, so memory does not grow with the weight.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from formats.arrays import Buffer, contiguous_regions, copy
from formats.quantized.scheme import QuantizedWeight
from formats.spec import Array, Reader, Region, TensorSpec, extent, intersect, relative_to

BAND = 1 << 20
"""Elements of codes that are decoded at a time."""

THREAD_BYTES = 8 << 20
"""Bytes that a thread holds at most beside what it reads: a band of codes, and the numbers of one that is cut."""


class DequantizedReader:
    """The tensors of another reader, the quantized weights among them as plain numbers.

    `raw` reads them as they are stored. `side_tensors` are the tensors that are not presented and not codes: scales and the like.
    """

    def __init__(self, raw: Reader, weights: Mapping[str, QuantizedWeight]) -> None:
        """`weights`: the quantized weights by their plain names."""
        self.raw, self.weights = raw, weights
        self.side_tensors = {spec.name: spec for weight in weights.values() for spec in weight.side_tensors}
        self.specs = self._plain_specs()
        self._local = threading.local()

    def _plain_specs(self) -> dict[str, TensorSpec]:
        """Return the tensors in the order of the source, each weight where its codes are."""
        plain = {weight.codes.name: weight.spec for weight in self.weights.values()}
        shown = (plain.get(name, spec) for name, spec in self.raw.specs.items() if name not in self.side_tensors)
        return {spec.name: spec for spec in shown}

    def read(self, name: str, region: Region, out: Array) -> None:
        weight = self.weights.get(name)
        if weight is None:
            return self.raw.read(name, region, out)
        weight.check_shape(self.raw)
        stored = weight.scheme.stored(region)
        for band in contiguous_regions(extent(stored), BAND):
            self._decode(weight, _moved(band, stored), region, out)
        return None

    def _decode(self, weight: QuantizedWeight, stored: Region, region: Region, out: Array) -> None:
        """Decode a band of codes, and put what it has of `region` into `out`."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffer(), Buffer()
        first, second = self._local.buffers
        codes = first.view(extent(stored), weight.codes.dtype)
        self.raw.read(weight.codes.name, stored, codes)
        held = weight.scheme.plain(stored)
        wanted = intersect(held, region)
        if wanted is None:
            return
        target = out[relative_to(wanted, region)]
        values = target if wanted == held else second.view(extent(held), out.dtype)
        parameters = weight.read_parameters(self.raw, held)
        weight.scheme.decode(codes, parameters, held, values)
        if values is not target:
            copy(target, values[relative_to(wanted, held)])
        weight.check_values(target, parameters)

    def close(self) -> None:
        self.raw.close()


def _moved(band: Region, origin: Region) -> Region:
    """Return a region counted from the start of `origin` in the tensor's own indices."""
    return tuple(slice(part.start + first.start, part.stop + first.start) for part, first in zip(band, origin, strict=True))
