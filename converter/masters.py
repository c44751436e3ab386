"""Hold the fp32 masters in a checkpoint's optimizer state against its weights, streaming.

A training step rounds masters to weights: to the nearest, and of two to the even one. So a master that does not round to its
weight, bit for bit, was written wrong, and the moments beside it with it. megatron-core 0.15 to 0.19.2 wrote such checkpoints:
`fully_reshardable` state, where buckets of gradients have padding between them (Megatron-LM's pull request 5077). A weight in
fp32 is its own master: where the optimizer state has it a second time, both must be the same.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from converter.execution import Reporter
from converter.run import PIECE_BYTES, in_threads
from formats.arrays import Buffer, contiguous_regions
from formats.integrity import Check
from formats.spec import DTYPES, Array, Region, TensorSpec, extent
from formats.torch_dist import TorchDistReader

PREFIXES = ("optimizer.state.param.", "optimizer.state.fp32_param.")
"""Before the key of the weight: of megatron-core's distributed optimizer, `fully_reshardable`, and of the one that is not."""

_ROUNDED_TO = frozenset(DTYPES[name] for name in ("bf16", "fp16", "fp32"))


def check(reader: TorchDistReader, found: Check, *, workers: int, reporter: Reporter) -> Check:
    """`found`, and what comparing weights and masters adds to it; as it is for a checkpoint without optimizer state.

    Holds, for each worker, a piece of at most 4 MiB of a master, its weight, and what the master rounds to.
    """
    if not reader.has_optimizer:
        return found
    kept = [reader.beside(prefix) for prefix in PREFIXES]
    pairs = _Pairs(reader, {name: one for one in kept for name in one.specs}, reporter.progress)
    reasons = Counter(reason for name in reader.specs if (reason := pairs.obstacle(name)))
    compared = [name for name in reader.specs if not pairs.obstacle(name)]
    reporter.start(sum(prod(reader.specs[name].shape) for name in compared) * 4)
    in_threads(pairs.pieces(compared), pairs.worker, workers=workers)
    return replace(
        found,
        masters=len(compared),
        wrong_masters=[name for name in compared if name in pairs.wrong],
        without_masters=[f"{count} {'weight' if count == 1 else 'weights'}, {reason}" for reason, count in reasons.items()],
    )


class _Pairs:
    """Weights and their masters, by the names of the weights; `wrong` are those that disagree."""

    def __init__(self, weights: TorchDistReader, masters: dict[str, TorchDistReader], progress: Callable[[int], None]) -> None:
        self.wrong: set[str] = set()
        self._weights, self._masters, self._progress = weights, masters, progress
        self._by_buckets = any(name.startswith("optimizer.distributed.") for name in weights.others)
        self._lock = threading.Lock()

    def obstacle(self, name: str) -> str:
        """Why a weight cannot be compared; empty where it can."""
        if name not in self._masters:
            kept = "state is kept by buckets (`dp_reshardable`)" if self._by_buckets else "state has none in their shape"
            return f"whose optimizer {kept}"
        weight, master = self._weights.specs[name], self._masters[name].specs[name]
        if weight.dtype not in _ROUNDED_TO or master.dtype != DTYPES["fp32"]:
            return f"which are {weight.stored_dtype}, with masters in {master.stored_dtype}"
        return ""

    def pieces(self, names: list[str]) -> Iterator[tuple[TensorSpec, Region]]:
        """Regions that hold at most `PIECE_BYTES` of a master."""
        for name in names:
            spec = self._weights.specs[name]
            for region in contiguous_regions(spec.shape, PIECE_BYTES // 4):
                yield spec, region

    def worker(self) -> Callable[[tuple[TensorSpec, Region]], None]:
        """What one thread does with a piece, in memory of its own."""
        buffers = Buffer(), Buffer(), Buffer()

        def compare(piece: tuple[TensorSpec, Region]) -> None:
            spec, region = piece
            shape = extent(region)
            weight, rounded = (buffer.view(shape, spec.dtype) for buffer in buffers[:2])
            master = buffers[2].view(shape, DTYPES["fp32"])
            self._weights.read(spec.name, region, weight)
            self._masters[spec.name].read(spec.name, region, master)
            if not rounds_to(master, weight, rounded):
                with self._lock:
                    self.wrong.add(spec.name)
            self._progress(master.nbytes)

        return compare


def rounds_to(master: Array, weight: Array, rounded: Array) -> bool:
    """Is every weight what its master rounds to, bit for bit? `rounded` is overwritten. One NaN is as good as another."""
    with np.errstate(all="ignore"):
        np.copyto(rounded, master, casting="unsafe")
    whole = np.dtype(f"u{weight.dtype.itemsize}")
    differ: Any = weight.view(whole) != rounded.view(whole)
    return not differ.any() or bool((np.isnan(weight[differ]) & np.isnan(master[differ])).all())
