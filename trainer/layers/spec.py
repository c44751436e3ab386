"""The spec of one decoder layer: a copy that pieces may change, its parts, and the modules that it is built from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

_TRANSFORMER_ENGINE = "transformer_engine"


def copied(layer: Any) -> Any:
    """Return a copy of a layer's spec down to the submodules of its attention and feed-forward part, which pieces change."""
    parts = layer.submodules
    attention = replace(parts.self_attention, submodules=replace(parts.self_attention.submodules))
    mlp = partial(parts.mlp.func, *parts.mlp.args, **{**parts.mlp.keywords, "submodules": replace(mlp_parts(layer))})
    keys = dict(parts.sharded_state_dict_keys_map)
    backend = {_TRANSFORMER_ENGINE: not is_local(layer)}
    return replace(
        layer,
        submodules=replace(parts, self_attention=attention, mlp=mlp, sharded_state_dict_keys_map=keys),
        metainfo={**layer.metainfo, **backend},
    )


def is_local(layer: Any) -> bool:
    """Tell whether a layer's spec is of megatron-core's own modules, and not of Transformer Engine's."""
    parts = attention_parts(layer)
    return (parts.out_proj if isinstance(parts, GatedDeltaNetSubmodules) else parts.linear_proj) is RowParallelLinear


def attention_parts(layer: Any) -> Any:
    """Return the submodules of a layer's attention: `linear_qkv`, `core_attention`, `linear_proj`, norms of query and key; or
    those of its delta net."""
    return layer.submodules.self_attention.submodules


def mlp_parts(layer: Any) -> Any:
    """Return the submodules of a layer's feed-forward part: `linear_fc1` and `linear_fc2`, or those of a mixture of experts."""
    return layer.submodules.mlp.keywords["submodules"]


def has_experts(layer: Any) -> bool:
    """Tell whether the feed-forward part of a layer is a mixture of experts."""
    return isinstance(mlp_parts(layer), MoESubmodules)


def transformer_layers(model: Any) -> list[Any]:
    """Return this rank's layers of a GPTModel: the decoder's, and those inside its layers of multi-token prediction. Of a
    HybridModel, those that are attention, feed-forward or experts; what one lacks is megatron-core's identity."""
    further = model.mtp.layers if getattr(model, "mtp", None) is not None else ()
    return [*_of_transformers(model), *(layer.mtp_model_layer for layer in further)]


def attention_layers(model: Any) -> list[Any]:
    """Return those of this rank's layers in the decoder that have attention."""
    return [layer for layer in _of_transformers(model) if not isinstance(layer.self_attention, IdentityOp)]


def mlp_layers(model: Any) -> list[Any]:
    """Return those of this rank's layers in the decoder that have a feed-forward part or experts."""
    return [layer for layer in _of_transformers(model) if not isinstance(layer.mlp, IdentityOp)]


def _of_transformers(model: Any) -> list[Any]:
    return [layer for layer in model.decoder.layers if isinstance(layer, TransformerLayer)]


def uses_transformer_engine(layer: Any) -> bool:
    """Tell whether a copied layer is of Transformer Engine's modules, and not of megatron-core's own."""
    return layer.metainfo[_TRANSFORMER_ENGINE]


def backend(layer: Any) -> Any:
    """Return megatron-core's provider of the modules that a copied layer is built from."""
    return _provider(local=not uses_transformer_engine(layer))


def backend_of(layer: Any) -> Any:
    """Return the same for a layer's spec as megatron-core made it."""
    return _provider(local=is_local(layer))


def _provider(*, local: bool) -> Any:
    if not local:
        # Only where Transformer Engine is installed.
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider  # noqa: PLC0415

        return TESpecProvider()
    return LocalSpecProvider()
