"""Some tensors of a container, under other names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from formats.chunks import ChunkedTensor
from formats.container import Container
from formats.spec import Array, Region, Shape
from formats.torch_zip import OpenArchive


class RenamedContainer:
    """See `Container`. It has no objects, and closing it closes nothing."""

    def __init__(self, container: Container, names: Mapping[str, str]) -> None:
        """`names`: the tensor of `container` that each name stands for."""
        self._container, self._names = container, names

    @property
    def tensor_names(self) -> Iterable[str]:
        return self._names

    @property
    def object_names(self) -> Iterable[str]:
        return ()

    @property
    def index_files(self) -> Collection[str]:
        return self._container.index_files

    @property
    def files(self) -> Collection[str]:
        return self._container.files

    def shape(self, name: str) -> Shape:
        return self._container.shape(self._names[name])

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._container.dtype(self._names[name])

    def tensor(self, name: str) -> ChunkedTensor:
        return self._container.tensor(self._names[name])

    def archive(self, name: str) -> OpenArchive:
        raise KeyError(name)

    def read(self, tensor: ChunkedTensor, region: Region, out: Array) -> None:
        self._container.read(tensor, region, out)

    def close(self) -> None:
        pass
