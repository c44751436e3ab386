"""A model with another number of tokens, as a reader: rows of the vocabulary are kept, made, or left out when they are read."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from converter.values import cast_into
from formats.arrays import bands
from formats.spec import DTYPES, Array, Reader, Region, extent

BAND_BYTES = 4 << 20
"""The most bytes that are read at a time for a mean, and of new rows."""


class NewRows(Protocol):
    """Where the rows of new tokens come from."""

    def fill(self, name: str, region: Region, out: Array) -> None:
        """Write a region of the new rows of a tensor, which count from 0, to `out`, in the tensor's dtype."""
        ...


class ResizedReader:
    """Read the tensors of `reader`, those of the `vocabulary` with `size` rows.

    The first `tokens` rows are tokens, and are kept as far as there is room; what follows them is padding and is not read.
    """

    def __init__(self, reader: Reader, vocabulary: Mapping[str, str], *, tokens: int, size: int, new_rows: NewRows) -> None:
        """`vocabulary`: for each tensor with a row for each token, the name by which `new_rows` knows it."""
        self._reader, self._vocabulary, self._new_rows = reader, vocabulary, new_rows
        self._kept = min(tokens, size)
        self.specs = {
            name: replace(spec, shape=(size, *spec.shape[1:])) if name in vocabulary else spec
            for name, spec in reader.specs.items()
        }

    def read(self, name: str, region: Region, out: Array) -> None:
        if name not in self._vocabulary:
            self._reader.read(name, region, out)
            return
        rows, rest = region[0], region[1:]
        split = min(max(self._kept, rows.start), rows.stop)
        if rows.start < split:
            self._reader.read(name, (slice(rows.start, split), *rest), out[: split - rows.start])
        if split < rows.stop:
            new = (slice(split - self._kept, rows.stop - self._kept), *rest)
            self._new_rows.fill(self._vocabulary[name], new, out[split - rows.start :])

    def close(self) -> None:
        self._reader.close()


class ZeroRows:
    """New rows of zeros."""

    def fill(self, name: str, region: Region, out: Array) -> None:  # noqa: ARG002 - all rows are alike
        out[...] = 0


class MeanRow:
    """New rows that are all the mean of a tensor's first `tokens` rows: summed in fp64, in fp32 rounded to the tensor's dtype."""

    def __init__(self, reader: Reader, stored: Mapping[str, str], *, tokens: int) -> None:
        """`stored`: the tensor of `reader` that each name stands for."""
        self._reader, self._stored, self._tokens = reader, stored, tokens
        self._lock = threading.Lock()
        self._means: dict[str, Array] = {}

    def fill(self, name: str, region: Region, out: Array) -> None:
        with self._lock:
            if name not in self._means:
                self._means[name] = self._mean(self._stored[name])
        row = np.empty(self._means[name][region[1:]].shape, out.dtype)
        cast_into(row, self._means[name][region[1:]], name=name)
        out[...] = row

    def _mean(self, name: str) -> Array:
        spec = self._reader.specs[name]
        total = np.zeros(spec.shape[1:], np.float64)
        step = max(1, BAND_BYTES * spec.shape[0] // max(spec.nbytes, 1))
        for rows in bands(slice(0, self._tokens), step):
            region = (rows, *spec.full_region[1:])
            stored, numbers = np.empty(extent(region), spec.dtype), np.empty(extent(region), DTYPES["fp32"])
            self._reader.read(name, region, stored)
            np.copyto(numbers, stored)
            total += numbers.sum(axis=0, dtype=np.float64)
        return (total / self._tokens).astype(DTYPES["fp32"])


class GivenRows:
    """New rows that are read from a file, cast once to the tensor's dtype."""

    def __init__(self, reader: Reader, given: Mapping[str, str]) -> None:
        """`given`: the tensor of `reader` that holds the new rows of each name."""
        self._reader, self._given = reader, given

    def fill(self, name: str, region: Region, out: Array) -> None:
        spec = self._reader.specs[self._given[name]]
        rows = np.empty(extent(region), spec.dtype)
        self._reader.read(spec.name, region, rows)
        cast_into(out, rows, name=spec.name)


class RoundedRows:
    """Other new rows, in fp32, as the weights hold them: rounded to the weight's dtype."""

    def __init__(self, rows: NewRows, dtypes: Mapping[str, np.dtype[Any]]) -> None:
        """`dtypes`: that of the weight of each name."""
        self._rows, self._dtypes = rows, dtypes

    def fill(self, name: str, region: Region, out: Array) -> None:
        weights = np.empty(extent(region), self._dtypes[name])
        self._rows.fill(name, region, weights)
        np.copyto(out, weights)
