"""Compare the fp32 masters in a checkpoint's optimizer state with its weights, streaming.

A training step rounds masters to weights, to nearest even. A master that does not round to its weight, bit for bit, was written
wrong, and so were its moments. megatron-core 0.15 to 0.19.2 wrote such checkpoints: `fully_reshardable` state with padding
between the gradient buckets (Megatron-LM's pull request 5077). A weight in fp32 is its own master: if the optimizer state also
stores it, both must be equal.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any, cast

import numpy as np

from converter.execution import Reporter
from converter.nemo_config import settings_of
from converter.run import PIECE_BYTES, in_threads
from formats.arrays import Buffer, bands, contiguous_regions
from formats.dtypes import MODEL_DTYPES
from formats.errors import UserError
from formats.integrity import Check
from formats.megatron_reader import MegatronReader
from formats.optimizer.open import open_optimizer
from formats.optimizer.state import MASTER
from formats.spec import DTYPES, Array, Reader, Region, TensorSpec, extent

ROUNDED_TO = frozenset(DTYPES[name] for name in MODEL_DTYPES)
"""The dtypes of weights that have masters."""

ROUNDED_AT_ONCE = 256 << 10
"""Numbers that are rounded at a time, to be compared: more took no less time."""


_QUANTIZED = ("fp8_param", "fp4_param", "fp8_param_gather", "fp4_param_gather")
"""Settings of training with weights in FP8 or FP4, of `run_config.yaml` and of Megatron-LM's `args`."""


def are_quantized(reader: MegatronReader) -> bool:
    """Return whether training held the weights in FP8 or FP4: what is stored of them is then not what their masters round to."""
    return any(recorded.settings.get(name) for recorded in settings_of(reader) for name in _QUANTIZED)


def check(reader: MegatronReader, result: Check, *, workers: int, reporter: Reporter) -> Check:
    """Return `result` with the comparison of weights and masters added; unchanged for a checkpoint without optimizer state.

    Memory for each worker: a piece of at most 4 MiB of a master, and its weight.
    """
    if not reader.has_optimizer:
        return result
    count = f"{len(reader.specs)} {'weight' if len(reader.specs) == 1 else 'weights'}"
    if are_quantized(reader):
        return replace(result, without_masters=[f"{count}, which were in FP8 or FP4 while they were trained"])
    try:
        optimizer = open_optimizer(reader)
    except UserError as error:
        return replace(result, without_masters=[f"{count}: {error}"])
    pairs = _Pairs(reader, optimizer.states.get(MASTER) if optimizer else None, reporter.progress)
    reasons = Counter(reason for name in reader.specs if (reason := pairs.obstacle(name)))
    compared = [name for name in reader.specs if not pairs.obstacle(name)]
    reporter.start(sum(prod(reader.specs[name].shape) for name in compared) * 4)
    in_threads(pairs.pieces(compared), pairs.worker, workers=workers)
    return replace(
        result,
        masters=len(compared),
        wrong_masters=[name for name in compared if name in pairs.wrong],
        without_masters=[f"{count} {'weight' if count == 1 else 'weights'}, {reason}" for reason, count in reasons.items()],
    )


class _Pairs:
    """Weights and their masters, by the names of the weights; `wrong` are the weights that differ from their rounded masters."""

    def __init__(self, weights: MegatronReader, masters: Reader | None, progress: Callable[[int], None]) -> None:
        self.wrong: set[str] = set()
        self._weights, self._masters, self._progress = weights, masters, progress
        self._lock = threading.Lock()

    def obstacle(self, name: str) -> str:
        """Return why a weight cannot be compared, or an empty string."""
        if not self._masters or name not in self._masters.specs:
            return "of which the optimizer state has none"
        weight, master = self._weights.specs[name], self._masters.specs[name]
        if weight.dtype not in ROUNDED_TO or master.dtype != DTYPES["fp32"]:
            return f"which are {weight.stored_dtype}, with masters in {master.stored_dtype}"
        return ""

    def pieces(self, names: list[str]) -> Iterator[tuple[TensorSpec, Region]]:
        """Yield regions of at most `PIECE_BYTES` of a master."""
        for name in names:
            spec = self._weights.specs[name]
            for region in contiguous_regions(spec.shape, PIECE_BYTES // 4):
                yield spec, region

    def worker(self) -> Callable[[tuple[TensorSpec, Region]], None]:
        """Return a thread's function for one piece, with buffers of its own."""
        masters, buffers = cast("Reader", self._masters), (Buffer(), Buffer())

        def compare(piece: tuple[TensorSpec, Region]) -> None:
            spec, region = piece
            shape = extent(region)
            weight, master = buffers[0].view(shape, spec.dtype), buffers[1].view(shape, DTYPES["fp32"])
            self._weights.read(spec.name, region, weight)
            masters.read(spec.name, region, master)
            if not rounds_to(master, weight):
                with self._lock:
                    self.wrong.add(spec.name)
            self._progress(master.nbytes)

        return compare


class ProvenMasters:
    """Read masters that prove themselves: each piece, rounded, must be that of its weight. Closing it closes nothing.

    Memory for each thread: the weight of a piece.
    """

    def __init__(self, masters: Reader, weights: Reader, *, instead: str) -> None:
        """`instead`: what can be done where masters are wrong, for the hint."""
        self.specs = masters.specs
        self._masters, self._weights, self._instead, self._scratch = masters, weights, instead, _Scratch()

    def read(self, name: str, region: Region, out: Array) -> None:
        """Read a region of a master. Raises UserError if a number in it does not round to the weight."""
        self._masters.read(name, region, out)
        weight = self._scratch.buffer.view(extent(region), self._weights.specs[name].dtype)
        self._weights.read(name, region, weight)
        if not rounds_to(out, weight):
            raise UserError(
                f"the fp32 master of `{name}` does not round to the weight",
                hint="the weights are intact, the optimizer state is not (megatron-core 0.15 to 0.19.2 could shift it): "
                f"`mbconvert inspect --check` counts such weights; {self._instead}",
            )

    def close(self) -> None:
        pass


class _Scratch(threading.local):
    """Each thread's buffer."""

    def __init__(self) -> None:
        self.buffer = Buffer()


def rounds_to(master: Array, weight: Array) -> bool:
    """Return whether every weight is its rounded master, bit for bit. All NaNs are equal.

    >>> rounds_to(np.array([0.1], np.float32), np.array([0.1], np.float16))
    True
    """
    master, weight = master.reshape(-1), weight.reshape(-1)
    with np.errstate(all="ignore"):
        return all(_round_to(master[band], weight[band]) for band in bands(slice(0, weight.size), ROUNDED_AT_ONCE))


def _round_to(master: Array, weight: Array) -> bool:
    bits = np.dtype(f"u{weight.dtype.itemsize}")
    differ: Any = weight.view(bits) != master.astype(weight.dtype).view(bits)
    return not differ.any() or bool((np.isnan(weight[differ]) & np.isnan(master[differ])).all())
