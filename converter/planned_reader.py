"""Read tensors as plans make them of those of another reader: a checkpoint under other names, and in other rows."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from converter.plan import Piece, TensorPlan
from converter.run import PieceBuffers
from formats.spec import Array, Reader, Region


class PlannedReader:
    """Tensors planned from another reader's."""

    def __init__(self, reader: Reader, tensor_plans: Mapping[str, TensorPlan]) -> None:
        self._reader, self._tensor_plans = reader, tensor_plans
        self._local = threading.local()
        self.specs = {name: tensor_plan.spec for name, tensor_plan in tensor_plans.items()}

    def read(self, name: str, region: Region, out: Array) -> None:
        if not hasattr(self._local, "buffers"):
            self._local.buffers = PieceBuffers()
        self._local.buffers.fill(Piece(self._tensor_plans[name], region), self._reader, out)

    def close(self) -> None:
        self._reader.close()
