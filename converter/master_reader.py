"""Read a Megatron checkpoint's fp32 masters in place of its weights: what training holds, before it is rounded.

Each master proves itself while it is read: rounded to the weight's dtype it must be the weight, bit for bit (see
`converter/masters.py` for checkpoints where it is not). A weight in fp32 is its own master.
"""

from __future__ import annotations

from converter.derived import DerivedCheckpoint
from converter.plan import list_names
from converter.run import PIECE_BYTES
from converter.values import MASTERS
from formats.errors import UserError
from formats.megatron_reader import MegatronReader
from formats.optimizer.state import MASTER
from formats.spec import DTYPES, JoinedReader, Reader, RenamedReader

WORKER_BYTES = PIECE_BYTES * 3 // 4
"""Memory of one thread: of a piece of a master the weight, and what is rounded at a time."""

_FP32 = DTYPES["fp32"]
_INSTEAD = "`--from weights`, the default, takes the weights as they are stored"


def reader_of(weights: MegatronReader, values_from: str) -> MegatronReader:
    """Return the reader of the values that are asked for: `weights` itself, or that of their masters.

    Raises UserError for masters that are not there.
    """
    return DerivedCheckpoint(weights, _values(weights)) if values_from == MASTERS else weights


def _values(weights: MegatronReader) -> Reader:
    """Return the reader of every weight's master, or of the weight itself where it is in fp32 and has none."""
    masters = _masters(weights)
    held = masters.specs.keys() & weights.specs.keys() if masters else set[str]()
    own = RenamedReader(weights, {name: name for name in weights.specs if name not in held})
    values = JoinedReader(RenamedReader(masters, {name: name for name in held}), own) if masters else JoinedReader(own)
    values.specs = {name: values.specs[name] for name in weights.specs}
    return values


def _masters(weights: MegatronReader) -> Reader | None:
    """Return the reader of the masters, None where all weights are in fp32. Raises UserError for weights that have none, or none
    that can prove itself."""
    from converter.masters import ROUNDED_TO, ProvenMasters  # noqa: PLC0415 - seldom asked for, and all kinds of optimizers with it
    from formats.optimizer.open import open_optimizer  # noqa: PLC0415

    if all(spec.dtype == _FP32 for spec in weights.specs.values()):
        return None
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
