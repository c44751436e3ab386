"""Latent attention is megatron-core's, of a provider of its own; other models know nothing of it."""

from __future__ import annotations

from dataclasses import fields

import pytest
from megatron.core.transformer import MLATransformerConfig

from formats.errors import UserError
from tests.converter.family_suite import small_config
from trainer import rehearsal
from trainer.config import RunConfig
from trainer.model import GPTModelProvider, MLAModelProvider, from_hf_config, shapes
from trainer.settings.resolve import resolve


def made(family: str, **changes):
    """What `mbtrain` resolves for a family's small model on a CPU."""
    provider = from_hf_config(small_config(family).to_dict())
    for name, value in changes.items():
        setattr(provider, name, value)
    config = RunConfig(model=provider, mixed_precision="fp32")
    config.dataset.sequence_length, config.optimizer.lr = 64, 1e-3
    return resolve(config, world_size=1, device="cpu").config.model


def epsilons(provider) -> list[float]:
    """The epsilon of the norms of the first layer."""
    provider.use_cpu_initialization = True
    with rehearsal.as_rank(0, 1, provider):
        layer = shapes(provider)[0].decoder.layers[0]
    attention = layer.self_attention
    return [norm.eps for norm in (layer.input_layernorm, attention.q_layernorm, attention.kv_layernorm)]


@pytest.mark.parametrize("family", ["youtu", "minicpm3"])
def test_norms_between_the_projections_have_transformers_epsilon(family):
    provider = made(family)
    assert epsilons(provider) == [1e-5, 1e-6, 1e-6]
    provider.latent_layernorm_epsilon = None
    assert epsilons(provider) == [1e-5, 1e-5, 1e-5]


def test_only_a_model_with_latent_attention_has_its_fields():
    assert isinstance(made("youtu"), MLATransformerConfig)
    plain = from_hf_config(small_config("llama").to_dict())
    assert type(plain) is GPTModelProvider
    own = {field.name for field in fields(MLAModelProvider)} - {field.name for field in fields(GPTModelProvider)}
    assert {"q_lora_rank", "kv_lora_rank", "v_head_dim", "latent_layernorm_epsilon"} <= own


def test_an_ordinary_model_does_not_become_one_with_latent_attention():
    with pytest.raises(UserError, match=r"`model\.multi_latent_attention` needs megatron-core's MLATransformerConfig"):
        made("llama", multi_latent_attention=True)


def test_an_attention_factor_is_refused_which_latent_attention_leaves_out():
    numbers = {"rope_type": "longrope", "short_factor": [1.0] * 4, "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(UserError, match=r"has the attention factor `1\.15\d*`, which latent attention leaves out"):
        made("minicpm3", rope_parameters=numbers)


def test_a_kernel_that_computes_another_rotary_embedding_is_refused():
    with pytest.raises(UserError, match="with latent attention, the fused kernel computes `rope_type=yarn` alone"):
        made("youtu", apply_rope_fusion=True)
    with pytest.raises(UserError, match="with latent attention, the fused kernel computes heads of 2, 4, 8, … channels alone"):
        made("deepseek_v3", apply_rope_fusion=True)  # of 12 channels
