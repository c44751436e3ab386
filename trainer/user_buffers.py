"""Transformer Engine's buffers for sending parts of a tensor-parallel product while other parts are computed.

Each tensor-parallel group holds them once per process, in the shape of the activations that enter a layer. Which runs have
them is `settings.overlap`'s to say. Knows nothing of models but their width.
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
"""FP8 scalings with which Transformer Engine sends quantized activations; None is no FP8."""


@contextmanager
def initialized(config: RunConfig) -> Iterator[None]:
    """While this is entered, layers that are built may overlap. All ranks call this, with their process groups formed."""
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
    """Tokens of a microbatch on one context-parallel rank, before tensor-parallel ranks share them, and the hidden size."""
    tokens = config.dataset.sequence_length * config.train.micro_batch_size
    return [tokens // config.model.context_parallel_size, config.model.hidden_size]


def _modes(model: Any, mode: Any) -> list[Any]:
    """First and last layers may stay in bf16 beside those in FP8."""
    if not model.fp8:
        return [mode.NONE]
    return [mode.FP8, mode.NONE] if model.first_last_layers_bf16 else [mode.FP8]


def set_environment() -> None:
    """Where NCCL was told to leave NVLink's multicast alone, so is Transformer Engine. Nothing that somebody set is changed."""
    if os.environ.get("NCCL_NVLS_ENABLE") == "0":
        os.environ.setdefault("UB_SKIPMC", "1")
