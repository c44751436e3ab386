"""Read a Megatron checkpoint's fp32 masters in place of its weights: what training holds, before it is rounded.

Each master proves itself while it is read: rounded to the weight's dtype it must be the weight, bit for bit (see
`converter/masters.py` for checkpoints where it is not). A weight in fp32 is its own master.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from converter.masters import ROUNDED_TO, ProvenMasters
from converter.plan import list_names
from converter.run import PIECE_BYTES
from formats.chunks import Chunk
from formats.errors import UserError
from formats.folder import Folder
from formats.megatron_reader import MegatronReader
from formats.optimizer.open import open_optimizer
from formats.optimizer.state import MASTER
from formats.spec import DTYPES, Array, Reader, Region

WEIGHTS, MASTERS = SOURCES = ("weights", "master")
"""What values may be taken from."""

WORKER_BYTES = PIECE_BYTES
"""Memory of one thread: of a piece of a master the weight, and the rounded master."""

_FP32 = DTYPES["fp32"]
_INSTEAD = "`--from weights`, the default, takes the weights as they are stored"


def reader_of(weights: MegatronReader, values_from: str) -> MegatronReader:
    """Return the reader of the values that are asked for: `weights` itself, or that of their masters.

    Raises UserError for masters that are not there.
    """
    return MasterReader(weights) if values_from == MASTERS else weights


class MasterReader:
    """A `MegatronReader` of masters under the names of the weights. Closing it closes that of the weights."""

    def __init__(self, weights: MegatronReader) -> None:
        """Raise UserError unless every weight has a master, or is in fp32 itself."""
        self._weights, self.settings = weights, weights.settings
        is_own = all(spec.dtype == _FP32 for spec in weights.specs.values())
        self._masters = None if is_own else _masters(weights)
        self.specs = {name: spec.cast(_FP32) for name, spec in weights.specs.items()}

    @property
    def folder(self) -> Folder:
        return self._weights.folder

    @property
    def files(self) -> Collection[str]:
        return self._weights.files

    @property
    def index_files(self) -> Collection[str]:
        return self._weights.index_files

    @property
    def others(self) -> Sequence[str]:
        return self._weights.others

    @property
    def has_optimizer(self) -> bool:
        return self._weights.has_optimizer

    @property
    def contents(self) -> Collection[str]:
        return self._weights.contents

    def args(self) -> Mapping[str, Any]:
        return self._weights.args()

    def common_state(self) -> Mapping[str, Any]:
        return self._weights.common_state()

    def check(self, names: Iterable[str] | None = None) -> None:
        self._weights.check(names)

    def chunks(self, name: str) -> Sequence[Chunk]:
        return self._weights.chunks(name)

    def read(self, name: str, region: Region, out: Array) -> None:
        """Read a region of a master. Raises UserError if a number in it does not round to the weight."""
        if not self._masters or name not in self._masters.specs:
            return self._weights.read(name, region, out)
        return self._masters.read(name, region, out)

    def close(self) -> None:
        self._weights.close()


def _masters(weights: MegatronReader) -> Reader:
    """Return the reader of the masters. Raises UserError for weights that have none, or none that can prove itself."""
    optimizer = open_optimizer(weights)
    masters = optimizer.states.get(MASTER) if optimizer else None
    proven = {name for name, spec in weights.specs.items() if spec.dtype in ROUNDED_TO}
    held = {name for name, spec in masters.specs.items() if spec.dtype == _FP32} if masters else set[str]()
    missing = [name for name, spec in weights.specs.items() if spec.dtype != _FP32 and name not in (proven & held)]
    if not masters or missing:
        raise UserError(
            f"the optimizer state of `{weights.folder.label}` has no fp32 masters of {len(missing)} of {len(weights.specs)} "
            f"weights: {list_names(missing)}",
            hint=f"frozen weights have none, and a checkpoint without optimizer state has none at all; {_INSTEAD}",
        )
    return ProvenMasters(masters, weights, instead=_INSTEAD)
