"""What an adapter is, in either format: its method and numbers, and the tensors that change each Hugging Face weight.

The formats themselves are `converter.adapters.peft` and `converter.adapters.megatron`, which build the readers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from converter.adapters.names import Factor
from converter.hybrid import GPT
from converter.plan import Piece, TensorPlan
from converter.run import PieceBuffers
from formats.home import expanded
from formats.spec import Array, Reader

METHODS = ("lora", "dora")


@dataclass(frozen=True, slots=True)
class Base:
    """The model that an adapter was trained on."""

    name: str
    """A path or a Hub id."""

    fingerprint: str
    """See `converter.adapters.fingerprint`; empty if unknown, as in PEFT's own files."""


def base_name(source: str | Path) -> str:
    """Return the name to store for a base model: a local path made absolute, so that it is valid from any directory.

    >>> base_name("meta-llama/Llama-3.2-1B")
    'meta-llama/Llama-3.2-1B'
    """
    path = Path(expanded(source))
    return str(path.absolute()) if path.exists() else str(source)


@dataclass(frozen=True, slots=True)
class Description:
    """The method and hyperparameters of an adapter. The fields are those of `adapter.json`."""

    method: str
    """`lora`, `dora`, or the class name of a user's own method."""

    dim: int = 0
    """The rank."""

    alpha: float = 0.0
    use_rslora: bool = False
    """Scale by alpha / √rank instead of alpha / rank (arXiv:2312.03732)."""

    canonical: bool = False
    """Separate adapters for query, key, value, gate and up, as PEFT has them."""

    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] = ()
    base: Base | None = None
    layout: str = GPT
    """The layout of the model in Megatron (see `converter.hybrid`), which its modules' names are of."""

    @property
    def scale(self) -> float:
        """The factor of B · A."""
        return scale(self.alpha, self.dim, use_rslora=self.use_rslora)


def scale(alpha: float, dim: int, *, use_rslora: bool) -> float:
    """Return the factor of B · A in double precision, as PEFT computes it: alpha / rank, or alpha / √rank with `use_rslora`.

    >>> scale(8, 16, use_rslora=False), scale(8, 16, use_rslora=True)
    (0.5, 2.0)
    """
    return alpha / dim**0.5 if use_rslora else alpha / dim


@dataclass(frozen=True, slots=True)
class Delta:
    """The change of one weight W, [out, in]: W + `scale` · `b` · `a`.

    With a magnitude, each row of the sum is then scaled to the norm that the magnitude gives (DoRA, arXiv:2402.09353).
    """

    a: Array
    """[rank, in], fp32."""

    b: Array
    """[out, rank], fp32."""

    scale: float
    magnitude: Array | None = None
    """[out], fp32."""


@dataclass(frozen=True, slots=True)
class AdapterReader:
    """An open adapter: headers are read and checked, data is read on demand. Close it when done."""

    label: str
    description: Description
    reader: Reader
    parts: Mapping[str, Mapping[Factor, TensorPlan]]
    """For each Hugging Face weight, such as `model.layers.0.self_attn.q_proj.weight`, its tensors under PEFT's names."""

    scales: Mapping[str, float]
    """The factor of B · A for each of those weights."""

    ranks: Mapping[str, int] = field(default_factory=dict[str, int])
    """By PEFT's configuration, the rank of each of those weights."""

    is_requested: Callable[[str], bool] = lambda _weight: False
    """Whether the adapter's configuration requests a change of a weight, even if its file has no tensors for it."""

    all_linear: bool = False
    """Whether the configuration requests all linear layers (PEFT's `all-linear`)."""

    fan_in_fan_out: bool = False
    """Whether the configuration says that weights are stored as [in, out]."""

    transposed: Collection[str] = ()
    """The weights that the base model stores as [in, out]."""

    @property
    def tensor_plans(self) -> dict[str, TensorPlan]:
        """All tensors by PEFT's names."""
        return {tensor_plan.spec.name: tensor_plan for factors in self.parts.values() for tensor_plan in factors.values()}

    def read_delta(self, weight: str) -> Delta:
        """Read the change of one weight as it is stored, in fp32. Thread-safe. Raises KeyError for a weight that does not change.

        The transpose of B · A is Aᵀ · Bᵀ.
        """
        arrays = {factor: self._read(tensor_plan) for factor, tensor_plan in self.parts[weight].items()}
        a, b = arrays[Factor.A], arrays[Factor.B]
        if weight in self.transposed:
            a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
        return Delta(a, b, self.scales[weight], arrays.get(Factor.MAGNITUDE))

    def close(self) -> None:
        self.reader.close()

    def _read(self, tensor_plan: TensorPlan) -> Array:
        piece = Piece(tensor_plan, tensor_plan.spec.full_region)
        return PieceBuffers().make(piece, self.reader).astype(np.float32)
