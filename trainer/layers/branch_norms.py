"""Norms before and after attention and the feed-forward part. Gemma 2 and 3, GLM-4, HyperCLOVA X have both, OLMo 2 and 3 and
EXAONE 4 only those after.

A norm after a branch is a submodule of the branch's last projection, `post_layernorm`, as Megatron-Bridge names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp

from formats.errors import UserError
from trainer.layers.norms import norm
from trainer.layers.spec import attention_parts, backend, mlp_parts

Output = tuple[torch.Tensor, torch.Tensor | None]


def branch_norms(provider: Any, layer: Any) -> None:
    """Leave out the norms before both branches, or add norms after them, as the provider's fields say."""
    _check_dense(provider)
    if not provider.pre_layernorms:
        attention_parts(layer).linear_qkv = mlp_parts(layer).linear_fc1 = backend(layer).column_parallel_linear()
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    if provider.post_layernorms:
        attention, mlp, kind = attention_parts(layer), mlp_parts(layer), norm(provider, layer)
        attention.linear_proj = _followed_by(kind, attention.linear_proj)
        mlp.linear_fc2 = _followed_by(kind, mlp.linear_fc2)


def _check_dense(provider: Any) -> None:
    """Raise UserError for a mixture of experts, whose output is no projection's."""
    for name, unusual in (("pre_layernorms", not provider.pre_layernorms), ("post_layernorms", provider.post_layernorms)):
        if unusual and provider.num_moe_experts:
            raise UserError(
                f"`model.{name}` is `{getattr(provider, name)}`, which this version cannot do with "
                f"`model.num_moe_experts` `{provider.num_moe_experts}`",
                hint="the weights of such a model can be converted",
            )


def _followed_by(kind: Any, linear: Any) -> Callable[..., torch.nn.Module]:
    """Return a builder of a projection with a norm of its output.

    The norm is a hook, not part of `forward`, so that it follows an adapter's output too.
    """

    def build(*args: Any, config: Any, **kwargs: Any) -> torch.nn.Module:
        projection = linear(*args, config=config, **kwargs)
        projection.post_layernorm = kind(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        projection.register_forward_hook(_normalize)
        return projection

    return build


def _normalize(projection: Any, _args: Any, output: Output) -> Output:
    """Return the norm of a projection's output and bias [sequence, batch, hidden], and no bias, which is part of it."""
    projected, bias = output
    return projection.post_layernorm(projected if bias is None else projected + bias), None
