"""Add the gradient of a weight to the accumulated one within the matrix product that computes it.

Layers of Transformer Engine can. megatron-core's own layers (the output layer) call a kernel of APEX, which no package index has:
`provide_kernel` gives them the same product of Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import layers


def provide_kernel() -> None:
    """Let megatron-core's own layers fuse, where APEX is not installed."""
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(  # type: ignore[attr-defined]
            wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
        )
        layers._grad_accum_fusion_available = True


def add_weight_gradient(inputs: torch.Tensor, gradient: torch.Tensor, total: torch.Tensor) -> None:
    """Add gradientᵀ · inputs to `total`, in its dtype: [tokens, in], [tokens, out] and [out, in]."""
    from megatron.core.extensions import transformer_engine as engine  # noqa: PLC0415 - starts CUDA

    options = {"workspace": engine._get_workspace()} if engine._get_workspace else {}  # which older versions ask for
    engine.general_gemm(inputs, gradient, out_dtype=total.dtype, layout="NT", out=total, accumulate=True, grad=True, **options)


def prepare(chunks: Iterable[torch.nn.Module], model: Any) -> None:
    """Make layers that fuse lose no gradient, before the chunks are wrapped.

    An output layer says that the gradient of its weight is added. Where the embedding has the same weight, its own part is not:
    `zero_out_wgrad` makes megatron-core add that. Transformer Engine writes the gradients of a step's first microbatch, and would
    lose a part where that runs a layer twice: here it adds them. Not for FP8, where the first microbatch is when weights are
    quantized.
    """
    if not getattr(model, "gradient_accumulation_fusion", False):
        return
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, layers.VocabParallelEmbedding):
            module.weight.zero_out_wgrad = True  # type: ignore[attr-defined]
        elif getattr(module, "fuse_wgrad_accumulation", False) and not _is_quantized(model):
            module.disable_parameter_transpose_cache = True


def leave_out(model: Any) -> None:
    """Do not fuse in FP8 or FP4, for a forward step that may run a layer twice in a microbatch."""
    if _is_quantized(model) and getattr(model, "gradient_accumulation_fusion", False):
        model.gradient_accumulation_fusion = False


def _is_quantized(model: Any) -> bool:
    return bool(getattr(model, "fp8", None) or getattr(model, "fp4", None))
