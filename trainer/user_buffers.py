"""Allocate Transformer Engine's user buffers, which send parts of a tensor-parallel product while other parts are computed.

Each tensor-parallel group holds them once per process, in the shape of a layer's input, [tokens, hidden size]. `settings.overlap`
decides which runs have them.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.config import RunConfig

FP8_RECIPES = frozenset({None, "delayed", "tensorwise"})
"""FP8 recipes with which Transformer Engine sends quantized activations; None is no FP8."""


@contextmanager
def initialized(config: RunConfig) -> Iterator[None]:
    """Allocate the buffers for layers that are built inside this context. All ranks call this, after process groups are
    formed."""
    if not getattr(config.model, "tp_comm_overlap", False):
        yield
        return
    from transformer_engine.pytorch.module import base  # noqa: PLC0415 - a CPU has none

    with warnings.catch_warnings(), contextlib.redirect_stdout(None):  # it prints every group's ranks
        base.initialize_ub(
            shape=_shape(config),
            tp_size=config.model.tensor_model_parallel_size,
            quantization_modes=_modes(config.model, base.UserBufferQuantizationMode),
            dtype=config.model.params_dtype,
            bootstrap_backend="nccl",
        )
    try:
        yield
    finally:
        base.destroy_ub()


def _shape(config: RunConfig) -> list[int]:
    """Return [tokens, hidden size] of a microbatch on one context-parallel rank, before tensor-parallel ranks divide the
    tokens."""
    tokens = config.dataset.sequence_length * config.train.micro_batch_size
    return [tokens // config.model.context_parallel_size, config.model.hidden_size]


def _modes(model: Any, mode: Any) -> list[Any]:
    """Return the quantization modes of the layers: the first and the last may stay in bf16."""
    if not model.fp8:
        return [mode.NONE]
    return [mode.FP8, mode.NONE] if model.first_last_layers_bf16 else [mode.FP8]


def set_environment() -> None:
    """Switch off NVLink multicast in Transformer Engine where it is off in NCCL, unless the variable is set."""
    if os.environ.get("NCCL_NVLS_ENABLE") == "0":
        os.environ.setdefault("UB_SKIPMC", "1")
