"""Norms before and after attention and the feed-forward part. Gemma 2 and 3, GLM-4, HyperCLOVA X and Trinity have both, OLMo 2
and 3, FlexOlmo and EXAONE 4 only those after.

A norm after a branch is a submodule of the branch's last projection, `post_layernorm`, as Megatron-Bridge names it; of a mixture
of experts, which has no last projection, it is one of the mixture itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp

from trainer.layers.norms import norm
from trainer.layers.spec import attention_parts, backend, has_experts, mlp_parts

Output = tuple[torch.Tensor, torch.Tensor | None]


def branch_norms(provider: Any, layer: Any) -> None:
    """Leave out the norms before both branches, or add norms after them, as the provider's fields say."""
    if not provider.pre_layernorms:
        attention_parts(layer).linear_qkv = backend(layer).column_parallel_linear()
        if not has_experts(layer):
            mlp_parts(layer).linear_fc1 = backend(layer).column_parallel_linear()
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    if provider.post_layernorms:
        attention, mlp, kind = attention_parts(layer), layer.submodules.mlp, norm(provider, layer)
        attention.linear_proj = _followed_by(kind, attention.linear_proj)
        if has_experts(layer):
            layer.submodules.mlp = partial(_followed_by(kind, mlp.func), *mlp.args, **mlp.keywords)
        else:
            mlp_parts(layer).linear_fc2 = _followed_by(kind, mlp_parts(layer).linear_fc2)


def _followed_by(kind: Any, module: Any) -> Callable[..., torch.nn.Module]:
    """Return a builder of a projection, or of a mixture of experts, with a norm of its output.

    The norm is a hook, not part of `forward`, so that it follows an adapter's output too.
    """

    def build(*args: Any, config: Any, **kwargs: Any) -> torch.nn.Module:
        built = module(*args, config=config, **kwargs)
        built.post_layernorm = kind(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        built.register_forward_hook(_normalize)
        return built

    return build


def _normalize(module: Any, _args: Any, output: Output) -> Output:
    """Return the norm of a branch's output and bias [sequence, batch, hidden], and no bias, which is part of it."""
    computed, bias = output
    return module.post_layernorm(computed if bias is None else computed + bias), None
