"""The spec of one decoder layer: a copy that pieces may change, and its parts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any


def copied(layer: Any) -> Any:
    """Return a copy of a layer's spec down to the submodules of its attention and feed-forward part, which pieces change."""
    parts = layer.submodules
    attention = replace(parts.self_attention, submodules=replace(parts.self_attention.submodules))
    mlp = partial(
        parts.mlp.func, *parts.mlp.args, **{**parts.mlp.keywords, "submodules": replace(parts.mlp.keywords["submodules"])}
    )
    keys = dict(parts.sharded_state_dict_keys_map)
    return replace(layer, submodules=replace(parts, self_attention=attention, mlp=mlp, sharded_state_dict_keys_map=keys))


def attention_parts(layer: Any) -> Any:
    """Return the submodules of a layer's attention: `linear_qkv`, `core_attention`, `linear_proj`, norms of query and key."""
    return layer.submodules.self_attention.submodules


def mlp_parts(layer: Any) -> Any:
    """Return the submodules of a layer's feed-forward part: `linear_fc1` and `linear_fc2`, or those of a mixture of experts."""
    return layer.submodules.mlp.keywords["submodules"]


def uses_transformer_engine(layer: Any) -> bool:
    """Tell whether a layer is of Transformer Engine's modules, and not of megatron-core's own."""
    from megatron.core.tensor_parallel.layers import RowParallelLinear  # noqa: PLC0415 - seconds to import

    return attention_parts(layer).linear_proj is not RowParallelLinear


def backend(layer: Any) -> Any:
    """Return megatron-core's provider of the modules that a layer is built from."""
    if uses_transformer_engine(layer):
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider  # noqa: PLC0415 - needs a GPU

        return TESpecProvider()
    from megatron.core.models.backends import LocalSpecProvider  # noqa: PLC0415

    return LocalSpecProvider()
