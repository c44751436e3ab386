"""Routers of our own: what they compute is what transformers computes, in training too."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from formats.errors import UserError
from tests.trainer.layers import passes
from trainer import layers
from trainer.layers.routing import SoftmaxWithBias, SparseMixer, sparse_mixer
from trainer.model import GPTModelProvider

BIASED = {"moe_router_scoring": "softmax_with_bias", "moe_router_enable_expert_bias": True}


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
    assert _router(num_moe_experts=4, **BIASED) is SoftmaxWithBias
    assert _router(num_moe_experts=4, moe_router_scoring="sparsemixer") is SparseMixer
    assert _router(num_moe_experts=4) not in (SoftmaxWithBias, SparseMixer)
    assert _router(moe_router_scoring="sparsemixer") is None, "a dense layer has none"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_router_scoring": "hash"}, "`model.moe_router_scoring` is `hash`"),
        (
            {**BIASED, "moe_router_enable_expert_bias": False},
            "`model.moe_router_scoring` is `softmax_with_bias`, and `model.moe_router_enable_expert_bias` is `False`",
        ),
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


EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 16, "moe_router_topk": 2, "moe_router_pre_softmax": True}
TRAINED = {
    "softmax_with_bias": {**EXPERTS, **BIASED, "moe_router_score_function": "sigmoid"},
    "sparsemixer": {**EXPERTS, "moe_router_scoring": "sparsemixer", "moe_router_sparsemixer_jitter": 0.2},
}


@pytest.mark.parametrize(
    ("scoring", "layout"),
    [*(("softmax_with_bias", layout) for layout in ("tp2_sp", "pp2", "full_recompute")), ("sparsemixer", "full_recompute")],
)
def test_a_step_is_the_same_at_other_layouts_and_where_layers_are_recomputed(scoring, layout, ranks):
    expected_loss, expected = passes.step(ranks, TRAINED[scoring])
    loss, gradients = passes.step(ranks, TRAINED[scoring], layout)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], atol=2e-5 * np.abs(expected[name]).max(), err_msg=name)
