"""Names of the norms before attention and before the feed-forward part: megatron-core has two for each.

Its own layers have a module for a norm, Transformer Engine's keep it in the linear layer that follows. `torch_dist` stores both
under the latter's name (`sharded_state_dict_keys_map` in megatron-core's specs), other kinds under that of the model.
"""

from __future__ import annotations

from collections.abc import Collection

_FUSED = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def spelled_as(wanted: Collection[str], name: str) -> str:
    """Return the name under which `wanted` have a weight: its own, unless they have the other spelling alone.

    >>> spelled_as({"decoder.layers.0.mlp.linear_fc1.layer_norm_weight"}, "decoder.layers.0.pre_mlp_layernorm.weight")
    'decoder.layers.0.mlp.linear_fc1.layer_norm_weight'
    """
    if name in wanted:
        return name
    others = (name.replace(norm, fused) for norm, fused in _FUSED.items() if norm in name)
    return next((other for other in others if other in wanted), name)
