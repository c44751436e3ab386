"""Let megatron-core 0.19.2 load checkpoints with torch 2.15, whose index has one more field for each tensor.

megatron-core passes all fields of `TensorProperties` to `torch.empty`, which has no argument `strides`. Nothing reads that field:
without it, it is None, as in checkpoints of earlier versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.distributed.checkpoint.metadata import TensorProperties

_set_state = TensorProperties.__setstate__


def _set_state_without_strides(properties: TensorProperties, state: Any) -> None:
    _set_state(properties, state)
    vars(properties).pop("strides", None)


@contextmanager
def without_strides() -> Iterator[None]:
    """Leave out `strides` from what is read of an index inside this context."""
    with mock.patch.object(TensorProperties, "__setstate__", _set_state_without_strides):
        yield
