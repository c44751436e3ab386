"""How much memory a conversion will hold, from its plan: what `--dry-run` prints."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from converter.conversion_plan import ConversionPlan
from converter.plan import TensorPlan
from converter.run import PIECE_BYTES
from formats.arrays import contiguous_regions
from formats.location import is_remote
from formats.spec import extent

RUNNING_BYTES = 4 << 20
"""Threads, locks, journals: what a small conversion takes beyond planning and buffers."""

TENSOR_BYTES = 450
"""The hash of a tensor, its name in the set of those that have passed, and in the index where it is spelled."""

CLIENT_BYTES = {"s3": 36 << 20, "gs": 12 << 20}
"""The clients of object stores with their connections."""


def expected_peak(job: ConversionPlan, workers: int, *, planned: int, highest: int) -> int:
    """Bytes a conversion will hold at most: what planning left (`planned`), or what planning took (`highest`) if that is more."""
    running = RUNNING_BYTES + TENSOR_BYTES * len(job.tensor_plans) + workers * piece_buffers(job.tensor_plans)
    return max(highest, planned + running + upload_bytes(job)) + job.memory


def piece_buffers(tensor_plans: Iterable[TensorPlan]) -> int:
    """Bytes of one worker's buffers: the largest piece as it is written, and as it is read where that is another dtype."""
    pieces = {(tensor_plan.spec.shape, tensor_plan.spec.dtype, frozenset(tensor_plan.dtypes)) for tensor_plan in tensor_plans}
    most = 0
    for shape, dtype, dtypes in pieces:
        first = next(contiguous_regions(shape, PIECE_BYTES // max(one.itemsize for one in dtypes)), ())
        cast = max((one.itemsize for one in dtypes if one != dtype), default=0)
        most = max(most, prod(extent(first)) * (dtype.itemsize + cast))
    return most


def upload_bytes(job: ConversionPlan) -> int:
    """What an upload holds: the client, parts of all files together, and those that are being sent once more, in the client."""
    if not is_remote(job.target):
        return 0
    from formats.remote.part_memory import PART_BYTES, PART_MEMORY  # noqa: PLC0415 - of object stores

    parts = sum(-(-size // PART_BYTES) for size in job.writer.files.values()) * PART_BYTES
    return CLIENT_BYTES.get(job.target.partition("://")[0].lower(), 0) + min(PART_MEMORY, parts)
