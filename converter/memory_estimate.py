"""Estimate the memory that a conversion will hold, from its plan, for `--dry-run`."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from converter.conversion import Conversion
from converter.conversion_plan import ConversionPlan
from converter.plan import TensorPlan
from converter.run import PIECE_BYTES
from formats.arrays import contiguous_regions
from formats.spec import extent
from formats.urls import is_remote

RUNNING_BYTES = 4 << 20
"""Bytes of threads, locks and journals: what a small conversion takes beyond planning and buffers."""

TENSOR_BYTES = 220
"""Bytes of a written tensor: of its hash, and of its name in the set of those that have passed."""

SOURCE_BYTES = 460
"""Bytes of a source tensor that is hashed while it is read, and of its entries in the index and in `conversion.json`."""

CLIENT_BYTES = {"s3": 36 << 20, "gs": 12 << 20}
"""Bytes of the clients of object stores with their connections."""


def expected_peak(conversion: Conversion, target: str, workers: int, *, planned: int, highest: int) -> int:
    """Return the bytes that a conversion to `target` will hold at most.

    `planned` bytes are resident after planning; `highest` is the peak of planning, which counts if it is more.
    """
    tensor_plans = conversion.plan.tensor_plans
    provenance = conversion.plan.provenance
    hashed_sources = len(provenance.tensors) if provenance.hashed and provenance.passing == "read" else 0
    of_tensors = TENSOR_BYTES * len(tensor_plans) + SOURCE_BYTES * hashed_sources
    running = RUNNING_BYTES + of_tensors + workers * piece_buffers(tensor_plans)
    return max(highest, planned + running + upload_bytes(conversion.plan, target)) + conversion.memory


def piece_buffers(tensor_plans: Iterable[TensorPlan]) -> int:
    """Return the bytes of one worker's buffers: the largest piece as it is written, and as it is read if that is in another
    dtype."""
    pieces = {(tensor_plan.spec.shape, tensor_plan.spec.dtype, frozenset(tensor_plan.dtypes)) for tensor_plan in tensor_plans}
    most = 0
    for shape, dtype, dtypes in pieces:
        first = next(contiguous_regions(shape, PIECE_BYTES // max(each.itemsize for each in dtypes)), ())
        cast = max((each.itemsize for each in dtypes if each != dtype), default=0)
        most = max(most, prod(extent(first)) * (dtype.itemsize + cast))
    return most


def upload_bytes(plan: ConversionPlan, target: str) -> int:
    """Return the bytes of an upload: the client, and the parts of all files together; 0 for a local target."""
    if not is_remote(target):
        return 0
    from formats.remote.part_memory import PART_BYTES, PART_MEMORY  # noqa: PLC0415 - of object stores

    parts = sum(-(-size // PART_BYTES) for size in plan.writer.files.values()) * PART_BYTES
    return CLIENT_BYTES.get(target.partition("://")[0].lower(), 0) + min(PART_MEMORY, parts)
