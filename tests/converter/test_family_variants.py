"""Models of a family whose options change which weights there are."""

from __future__ import annotations

import json

import pytest

from converter import hf_to_mcore
from formats.errors import UserError
from tests.converter.family_suite import check_logits, check_names, check_round_trip, save_small

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 50000.0}
VARIANTS = {
    "neox_serial": ("gpt_neox", {"use_parallel_residual": False}),
    "neox_without_attention_bias": ("gpt_neox", {"attention_bias": False}),
    "command_r_plus": ("cohere", {"use_qk_norm": True}),
    "stablelm_2_12b": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "stablelm_2_1_6b": ("stablelm", {"use_qkv_bias": True}),
    "granite_biased": ("granite", {"attention_bias": True}),
    "hyperclovax_without_norms_after": ("hyperclovax", {"use_post_norm": False}),
    "glm4_without_bias": ("glm4", {"attention_bias": False}),
    "falcon_40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_2_11b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    ),
    "falcon_rw_1b": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "gptj_tied": ("gptj", {"tie_word_embeddings": True}),
    "moonlight": ("deepseek_v3", {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_parameters": PLAIN_ROPE}),
    "deepseek_v3_all_sparse": ("deepseek_v3", {"first_k_dense_replace": 0, "num_experts_per_tok": 4}),
    "deepseek_v2_lite": ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "youtu_without_rank": ("youtu", {"q_lora_rank": None}),
    "codegen_tied": ("codegen", {"tie_word_embeddings": True}),
    "nemotron_3_nano": ("nemotron_h", {"moe_latent_size": None, "n_group": 1, "topk_group": 1}),
    "nemotron_h_8b": ("nemotron_h", {"layers_block_type": ["mamba", "mlp", "attention", "mlp"]}),
    "granite_4_h_micro": ("granitemoehybrid", {"num_local_experts": 0, "num_experts_per_tok": 0, "tie_word_embeddings": True}),
    "granite_4_micro": (
        "granitemoehybrid",
        {
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "layer_types": ["full_attention"] * 2,
            "position_embedding_type": "rope",
        },
    ),
}

OTHER_ATTENTION = {"falcon_rw_1b": "sdpa"}
"""Transformers' eager attention adds Falcon's bias of distances twice."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_converted_to_the_bit_and_has_transformers_logits(variant, ranks, tmp_path):
    family, changes = VARIANTS[variant]
    folder = save_small(family, tmp_path / "hf", dtype="float32", **changes)
    check_names(family, folder)
    check_round_trip(folder, tmp_path)
    check_logits(ranks, folder, tmp_path, attention=OTHER_ATTENTION.get(variant, "eager"))


BIASED = ("apertus", "cohere", "cohere2", "gemma2", "hunyuan_v1_dense", "minicpm3", "olmo2", "olmo3", "qwen3", "youtu")
"""Families that transformers has a switch for, without a published model that turns it on."""


@pytest.mark.parametrize("family", BIASED)
def test_biases_that_no_published_model_has_are_refused_by_name(family, tmp_path):
    folder = save_small(family, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    with pytest.raises(UserError, match="`attention_bias` is `True`"):
        hf_to_mcore(folder, tmp_path / "m")
