"""`adapter.json`: what an adapter is, beside its tensors. Lies in the iteration's folder of a Megatron checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

FILE = "adapter.json"


@dataclass(frozen=True, slots=True)
class Base:
    """The model that an adapter was trained beside."""

    name: str
    """Where it lay, or its Hub id."""

    fingerprint: str
    """See `converter.adapters.fingerprint`."""


@dataclass(frozen=True, slots=True)
class Description:
    """Method and numbers of an adapter."""

    method: str
    """`lora`, `dora`, or the class of a method of somebody's own."""

    dim: int = 0
    """The rank."""

    alpha: float = 0.0
    use_rslora: bool = False
    """Scaled by alpha / √rank instead of alpha / rank (arXiv:2312.03732)."""

    canonical: bool = False
    """Separate adapters for query, key, value, gate and up, as PEFT has them."""

    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] = ()
    base: Base | None = None
