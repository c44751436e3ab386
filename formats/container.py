"""The protocol of what `megatron.core.dist_checkpointing` stores keys in: PyTorch's container, or a folder of zarr arrays.

A container knows keys, chunks and objects. What a key means in Megatron is left to `torch_dist.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Protocol

import numpy as np

from formats.chunks import ChunkedTensor
from formats.spec import Array, Region, Shape
from formats.torch_zip import OpenArchive


class TensorContainer(Protocol):
    """The tensors of an opened container. Opening reads its index alone; methods may be called from several threads."""

    @property
    def tensor_names(self) -> Iterable[str]: ...

    @property
    def index_files(self) -> Collection[str]:
        """The files that say what is stored where."""
        ...

    @property
    def files(self) -> Collection[str]:
        """The files that hold tensors and objects."""
        ...

    def tensor(self, name: str) -> ChunkedTensor:
        """Return a tensor's shape, dtype and chunks.

        Raises UserError if the chunks overlap, leave gaps or run past their files.
        """
        ...

    def read(self, tensor: ChunkedTensor, region: Region, out: Array) -> None:
        """Read a region of the tensor into `out`, from all chunks that overlap it."""
        ...

    def close(self) -> None: ...


class Container(TensorContainer, Protocol):
    """A container with objects beside its tensors."""

    @property
    def object_names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> np.dtype[Any]: ...

    def archive(self, name: str) -> OpenArchive:
        """Open an object: its pickle, and the tensors that it refers to."""
        ...
