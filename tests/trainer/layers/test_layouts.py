"""Each piece computes the same loss and gradients at every layout, and another loss than a model without it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.trainer.layers import passes

BIASED = {"add_bias_linear": True}
LATENT = {
    "q_lora_rank": 12, "kv_lora_rank": 8, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 6, "qk_layernorm": True,
    "latent_layernorm_epsilon": 1.0, "num_query_groups": 4,
}  # fmt: skip
MAMBA = {
    "layout": "hybrid", "hybrid_layer_pattern": "M*M-", "mamba_state_dim": 8, "mamba_head_dim": 4, "mamba_num_groups": 4,
    "mamba_num_heads": 8, "residual_multiplier": 0.3,
}  # fmt: skip
EXPERTS = {
    "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 16,
    "moe_router_load_balancing_type": "none",
}  # fmt: skip
PIECES = {
    "one_norm": {"parallel_residual": "one_norm", "normalization": "LayerNorm"},
    "two_norms": {"parallel_residual": "two_norms"},
    "norms_around": {"post_layernorms": True, "layernorm_zero_centered_gamma": True},
    "norms_after": {"pre_layernorms": False, "post_layernorms": True, **BIASED},
    "multiplier": {"residual_multiplier": 0.3},
    "output_projection": {"attention_output_bias": True},
    "multiplier_with_biases": {"residual_multiplier": 0.3, **BIASED},
    "all_heads": {"qk_layernorm": True, "qk_layernorm_scope": "all_heads"},
    "latent": LATENT,
    "latent_from_all_channels": {**LATENT, "q_lora_rank": None},
    "each_head": {"qk_layernorm": True, "qk_layernorm_scope": "each_head", "normalization": "LayerNorm"},
    "sinks": {"softmax_type": "learnable"},
    "hybrid": {"layout": "hybrid", "residual_multiplier": 0.3, "qk_layernorm": True, "rotary_interleaved": True},
    "hybrid_latent": {"layout": "hybrid", **LATENT},
    "mamba": MAMBA,
    "latent_experts": {**EXPERTS, "moe_latent_size": 12},
}
WITHOUT = {
    "parallel_residual": None, "pre_layernorms": True, "post_layernorms": False, "residual_multiplier": 1.0,
    "attention_output_bias": False, "softmax_type": "vanilla", "rotary_interleaved": False,
    "qk_layernorm_scope": "head", "latent_layernorm_epsilon": None, "layernorm_zero_centered_gamma": False,
    "moe_latent_size": None,
}  # fmt: skip
CASES = [(piece, layout) for piece in PIECES for layout in passes.LAYOUTS]
TOLERANCE = 2e-5
"""Of the largest gradient: fp32 sums in another order."""


@pytest.fixture(scope="module")
def alone(ranks):
    """Loss and gradients on one rank, once for each piece."""
    known: dict[str, tuple[float, passes.Gradients]] = {}

    def run(piece: str) -> tuple[float, passes.Gradients]:
        if piece not in known:
            known[piece] = passes.step(ranks, PIECES[piece])
        return known[piece]

    return run


@pytest.mark.parametrize(("piece", "layout"), CASES)
def test_loss_and_gradients_are_those_of_one_rank(piece, layout, ranks, alone):
    expected_loss, expected = alone(piece)
    loss, gradients = passes.step(ranks, PIECES[piece], layout)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert np.abs(expected[name]).max() > 0, f"{name} has no gradient"
        np.testing.assert_allclose(gradient, expected[name], atol=TOLERANCE * np.abs(expected[name]).max(), err_msg=name)


@pytest.mark.parametrize("piece", PIECES)
def test_without_the_piece_the_loss_is_another(piece, ranks, alone):
    for field in PIECES[piece].keys() & WITHOUT.keys():
        loss, _ = passes.step(ranks, {**PIECES[piece], field: WITHOUT[field]})
        assert abs(loss - alone(piece)[0]) > 1e-3, field
