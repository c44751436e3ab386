"""A `config.json` that says that weights are quantized, and weights that are not: dequantized ones, or a base that an adapter
was merged into. Loaders would take the plain numbers for quantized ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from formats.spec import DTYPES

_FIELDS = ("quantization_config", "compression_config")
_PLAIN = frozenset(DTYPES[name] for name in ("bf16", "fp16", "fp32", "fp64"))


def quantization(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields that say that weights are quantized."""
    return tuple(name for name in _FIELDS if config.get(name))


def is_plain(dtypes: Collection[np.dtype[Any]]) -> bool:
    """Are weights of these dtypes numbers as they are, without scales?"""
    return _PLAIN.issuperset(dtypes)
