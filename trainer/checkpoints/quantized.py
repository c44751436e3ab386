"""Replace weights that Transformer Engine keeps in 8 bits by plain tensors while they are loaded.

Each has a second copy in full precision, made with the model, from which the optimizer takes its fp32 masters. Both must get the
loaded values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor

_COPY = "_high_precision_init_val"


@contextmanager
def in_full(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Replace the quantized weights of `chunks` by plain tensors, of unspecified values, inside this context. On leaving, the
    weights get the values that were loaded into those tensors."""
    swapped = [
        (module, name, parameter, _plain(parameter))
        for chunk in chunks
        for module in chunk.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_float8tensor(parameter)
    ]
    for module, name, _, dequantized in swapped:
        module._parameters[name] = dequantized
    try:
        yield
    finally:
        for module, name, parameter, dequantized in swapped:
            module._parameters[name] = parameter
            _take(parameter, dequantized)


def _plain(parameter: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device))


@torch.no_grad()
def _take(parameter: Any, dequantized: torch.Tensor) -> None:
    parameter.copy_(dequantized)
    if hasattr(parameter, _COPY):
        setattr(parameter, _COPY, dequantized.detach().cpu())
