"""Name the objects of a distributed checkpoint, computed on request.

Every module of a large model has one, for each of its layers and experts: the names alone would take tens of MiB.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, overload

from formats.spec import Shape


class ObjectName(NamedTuple):
    """An object of a `key`, or of one of its rows where layers or experts are stacked; `sizes` are how many rows there are, None
    where the key alone is the name, as torch's own containers have it.

    >>> str(ObjectName("decoder.layers.mlp.linear_fc1._extra_state", (3,), (16,))), str(ObjectName("common_state"))
    ('decoder.layers.mlp.linear_fc1._extra_state/shard_3_16', 'common_state/shard_0_1')
    """

    key: str
    rows: Shape = ()
    sizes: Shape | None = ()

    def __str__(self) -> str:
        """Return the name in the index, as megatron-core's `ShardedObject.unique_key`."""
        if self.sizes is None:
            return self.key
        return f"{self.key}/shard_{_dotted(self.rows) or 0}_{_dotted(self.sizes) or 1}"


def _dotted(numbers: Iterable[int]) -> str:
    return ".".join(map(str, numbers))


class ObjectNames(Sequence[str]):
    """Names of objects in order. Those of one key differ in a number, that of the row in C order."""

    def __init__(self) -> None:
        self._keys: dict[tuple[str, Shape | None], int] = {}
        self._of_key: list[tuple[str, Shape | None]] = []
        self._key_numbers, self._row_numbers = array("i"), array("q")

    def append(self, name: ObjectName) -> None:
        key, number = (name.key, name.sizes), 0
        if key not in self._keys:
            self._keys[key] = len(self._of_key)
            self._of_key.append(key)
        for row, size in zip(name.rows, name.sizes or (), strict=True):
            number = number * size + row
        self._key_numbers.append(self._keys[key])
        self._row_numbers.append(number)

    def __len__(self) -> int:
        return len(self._row_numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        (key, sizes), number = self._of_key[self._key_numbers[index]], self._row_numbers[index]
        rows: list[int] = []
        for size in reversed(sizes or ()):
            number, row = divmod(number, size)
            rows.append(row)
        return str(ObjectName(key, tuple(reversed(rows)), sizes))
