"""Let megatron-core 0.19.2 load checkpoints with torch 2.15, whose index has one more field for each tensor, `strides`.

megatron-core passes all fields of `TensorProperties` to `torch.empty`, which has no argument `strides`, and sets none. Earlier
versions of torch cannot read an index that has the field.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.distributed.checkpoint.metadata import TensorProperties

_get_state, _set_state = TensorProperties.__getstate__, TensorProperties.__setstate__
_FIELDS = 5
"""The number of fields that every version of torch has. `strides` comes after them."""


def _get_state_without_strides(properties: TensorProperties) -> tuple[Any, ...]:
    return tuple(_get_state(properties))[:_FIELDS]


def _set_state_without_strides(properties: TensorProperties, state: tuple[Any, ...]) -> None:
    _set_state(properties, state)
    vars(properties).pop("strides", None)


@contextmanager
def without_strides() -> Iterator[None]:
    """Leave out `strides` where an index is read or written inside this context."""
    states = {"__getstate__": _get_state_without_strides, "__setstate__": _set_state_without_strides}
    with mock.patch.multiple(TensorProperties, **states):
        yield
