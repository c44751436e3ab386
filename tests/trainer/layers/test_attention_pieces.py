"""Pieces of attention and of the ends of a model: each layout computes what one rank computes, and each piece does something."""

from __future__ import annotations

import pytest

from tests.trainer.layers import runs
from tests.trainer.layers.runs import LAYOUTS

SLIDING = {"window_size": (7, 0), "window_attn_skip_freq": [1, 0, 1, 0]}
MODELS = {
    "turned": {
        **SLIDING,
        "sliding_rope": {"rope_type": "default", "rope_theta": 100.0},
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 16,
        "yarn_mscale": 2.0,
        "yarn_mscale_all_dim": 0.0,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "softmax_scale": 1.0,
    },
    "normed": {"qk_layernorm": True, "qk_layernorm_after_rope": True},
    "clipped": {"qk_layernorm": True, "clip_qkv": 0.5},
    "biased": {
        "position_embedding_type": "alibi",
        "alibi": {"bias_max": 4.0, "scale": 0.5},
        "embedding_layernorm": True,
        "output_layer_bias": True,
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "share_embeddings_and_output_weights": True,
        "activation_func": "fast_gelu",
    },
    "placed": {
        "position_embedding_type": "learned_absolute",
        "position_offset": 2,
        "output_layer_bias": True,
        "activation_func": "xielu",
        "num_query_groups": 1,
        "make_vocab_size_divisible_by": 12,  # to 156 tokens at TP1, 168 at TP2
    },
    "long": {
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.5, 2.0, 3.0],
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
            "factor": 4.0,
        },
        "exact_sequence_length": 64,
    },
}
OTHERWISE = {
    "turned": [{"sliding_rope": None}, {"yarn_mscale": None}],
    "normed": [{"qk_layernorm_after_rope": False}],
    "clipped": [{"clip_qkv": None}],
    "biased": [{"alibi": {"bias_max": 8.0, "scale": 0.5}}, {"alibi": {"bias_max": 4.0}}],
    "placed": [{"position_offset": 1, "seq_length": 65}],
    "long": [{"rope_parameters": {**MODELS["long"]["rope_parameters"], "attention_factor": 1.0}}, {"rope_parameters": None}],
}
"""The same weights in other models, which must give another loss."""


@pytest.fixture(scope="module")
def weights(ranks, tmp_path_factory):
    """Weights of each model, and what one rank saw that trained them on."""
    known = {}

    def find(name):
        if name not in known:
            folder = runs.make(ranks, MODELS[name], tmp_path_factory.mktemp(name) / "run")
            known[name] = folder, ranks.run(runs.train, 1, MODELS[name], runs.start(folder))[0]
        return known[name]

    return find


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_layout_trains_as_one_rank(name, layout, ranks, weights):
    folder, alone = weights(name)
    world, changes = LAYOUTS[layout]
    for history in ranks.run(runs.train, world, MODELS[name], runs.start(folder, **changes)):
        assert history.losses == pytest.approx(alone.losses, abs=1e-5)
        assert history.grad_norms == pytest.approx(alone.grad_norms, rel=1e-4)


@pytest.mark.parametrize(("name", "other"), [(name, other) for name, others in OTHERWISE.items() for other in others])
def test_a_piece_changes_what_is_computed(name, other, ranks, weights, tmp_path):
    folder, alone = weights(name)
    unsaid = runs.without_settings(folder, tmp_path / "weights")
    (history,) = ranks.run(runs.train, 1, {**MODELS[name], **other}, runs.start(unsaid, train__train_iters=1))
    assert abs(history.losses[0] - alone.losses[0]) > 1e-4


@pytest.mark.parametrize("name", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_a_cap_changes_what_is_computed(name, ranks):
    fields = {**MODELS["turned"]}
    (capped,) = ranks.run(runs.train, 1, fields, {"train__train_iters": 1})
    (free,) = ranks.run(runs.train, 1, {**fields, name: None}, {"train__train_iters": 1})
    assert abs(capped.losses[0] - free.losses[0]) > 1e-4
