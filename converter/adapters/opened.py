"""An adapter that lies in files of either kind: how each of its tensors is read under PEFT's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from converter.adapters.adapter import Adapter, Delta
from converter.adapters.description import Description
from converter.adapters.names import Factor
from converter.plan import Piece, TensorPlan
from converter.run import PieceBuffers
from formats.spec import Array, Reader


@dataclass(frozen=True, slots=True)
class AdapterReader:
    """Headers read and checked, no data."""

    label: str
    description: Description
    reader: Reader
    parts: Mapping[str, Mapping[Factor, TensorPlan]]
    """The tensors of the adapter of each Hugging Face weight, as PEFT has them."""

    scales: Mapping[str, float]
    """What B · A is multiplied by, for each of those weights."""

    asks_for: Callable[[str], bool] = lambda _weight: False
    """See `Adapter`."""

    all_linear: bool = False

    @property
    def tensor_plans(self) -> dict[str, TensorPlan]:
        """All of them by name."""
        return {tensor_plan.spec.name: tensor_plan for factors in self.parts.values() for tensor_plan in factors.values()}

    def adapter(self) -> Adapter:
        names = frozenset(self.parts)
        return Adapter(self.description, names, self._delta, self.reader.close, self.asks_for, self.all_linear)

    def _delta(self, weight: str) -> Delta:
        found = {factor: self._whole(tensor_plan) for factor, tensor_plan in self.parts[weight].items()}
        return Delta(found[Factor.A], found[Factor.B], self.scales[weight], found.get(Factor.MAGNITUDE))

    def _whole(self, tensor_plan: TensorPlan) -> Array:
        piece = Piece(tensor_plan, tensor_plan.spec.full_region)
        return PieceBuffers().make(piece, self.reader).astype(np.float32)
