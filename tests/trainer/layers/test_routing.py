"""Routers of our own: what they compute is what transformers computes, in training too."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from formats.errors import UserError
from trainer import layers
from trainer.layers.routing import SoftmaxWithBias, SparseMixer, sparse_mixer
from trainer.model import GPTModelProvider


@pytest.mark.parametrize("training", [False, True])
def test_sparse_mixer_is_that_of_transformers_with_its_gradient(training, monkeypatch):
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    monkeypatch.setattr(torch.Tensor, "uniform_", lambda drawn: drawn)  # transformers draws some numbers twice
    computed = []
    for choose in (partial(sparsemixer, jitter_eps=0.1, training=training), partial(sparse_mixer, jitter=0.1, training=training)):
        logits = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)
        weights, chosen = choose(logits)
        (weights * torch.arange(1, 401).view(200, 2)).sum().backward()
        computed.append((weights.detach(), chosen, logits.grad))
    for theirs, ours in zip(*computed, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (computed[0][1][:, 0] != logits.argmax(-1)).any() == training


def _router(**fields):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from trainer.layers.spec import mlp_parts

    spec = get_gpt_layer_local_spec(num_experts=fields.get("num_moe_experts"), normalization="RMSNorm")
    block = TransformerBlockSubmodules(layer_specs=[spec], layer_norm=None)
    provider = GPTModelProvider(normalization="RMSNorm", num_attention_heads=2, **fields)
    return getattr(mlp_parts(layers.adapt_spec(provider, block).layer_specs[0]), "router", None)


def test_a_layer_with_experts_has_the_router_that_a_setting_names():
    assert _router(num_moe_experts=4, moe_router_scoring="softmax_with_bias") is SoftmaxWithBias
    assert _router(num_moe_experts=4, moe_router_scoring="sparsemixer") is SparseMixer
    assert _router(num_moe_experts=4) not in (SoftmaxWithBias, SparseMixer)
    assert _router(moe_router_scoring="sparsemixer") is None, "a dense layer has none"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_router_scoring": "hash"}, "`model.moe_router_scoring` is `hash`"),
        (
            {"moe_router_scoring": "sparsemixer", "moe_router_fusion": True},
            "`model.moe_router_fusion` cannot be used with `model.moe_router_scoring` `sparsemixer`",
        ),
    ],
)
def test_a_router_that_cannot_be_built_is_refused(fields, message):
    with pytest.raises(UserError) as error:
        _router(num_moe_experts=4, **fields)
    assert str(error.value.args[0]) == message
