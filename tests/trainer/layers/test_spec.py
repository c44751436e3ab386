"""Specs of layers are copied before they are changed."""

from __future__ import annotations

import pytest

from trainer import layers
from trainer.layers.spec import attention_parts, backend, copied, mlp_parts, uses_transformer_engine
from trainer.model import GPTModelProvider


def _layer(**more):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(normalization="RMSNorm", **more)


@pytest.mark.parametrize("more", [{}, {"num_experts": 4}, {"multi_latent_attention": True, "qk_layernorm": True}])
def test_a_copy_can_be_changed_without_the_original(more):
    layer = _layer(**more)
    copy = copied(layer)
    assert copy.submodules.self_attention == layer.submodules.self_attention
    assert copy.submodules.mlp.keywords == layer.submodules.mlp.keywords
    attention_parts(copy).linear_proj = mlp_parts(copy).new = "changed"
    copy.submodules.sharded_state_dict_keys_map["a"] = "b"
    assert attention_parts(layer).linear_proj != "changed"
    assert not hasattr(mlp_parts(layer), "new")
    assert "a" not in layer.submodules.sharded_state_dict_keys_map


def test_layers_that_share_a_spec_share_its_copy():
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    dense, experts = _layer(), _layer(num_experts=2)
    adapted = layers.adapt_spec(
        GPTModelProvider(), TransformerBlockSubmodules(layer_specs=[dense, experts, dense], layer_norm=None)
    )
    first, second, third = adapted.layer_specs
    assert first is third is not dense
    assert second is not first


def test_a_layer_s_backend_is_known_by_its_projection():
    from megatron.core.models.backends import LocalSpecProvider

    layer = copied(_layer())
    attention_parts(layer).linear_proj = object  # a piece may exchange it
    assert not uses_transformer_engine(layer)
    assert isinstance(backend(layer), LocalSpecProvider)
