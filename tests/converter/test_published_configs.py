"""What published `config.json` files say otherwise than transformers 5 writes it."""

from __future__ import annotations

import pytest

from converter import families
from converter.config import make_model, to_huggingface, to_megatron
from formats.errors import UserError

SIZES = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
LAYERS = {"num_hidden_layers": 4}


def read(family, **config):
    return to_megatron(families.find(family).CONFIG, {**SIZES, **config})


def test_exaone_s_own_names_are_read_and_written_beside_llama_s():
    megatron = read("exaone", num_layers=4, layer_norm_epsilon=1e-3, activation_function="silu")
    assert (megatron["num_layers"], megatron["layernorm_epsilon"]) == (4, 1e-3)
    back = to_huggingface(families.find("exaone").CONFIG, megatron)
    assert (back["num_layers"], back["num_hidden_layers"], back["layer_norm_epsilon"], back["rms_norm_eps"]) == (4, 4, 1e-3, 1e-3)
    with pytest.raises(UserError, match="two things: `num_layers` is `4`, `num_hidden_layers` is `3`"):
        read("exaone", num_layers=4, num_hidden_layers=3)


def test_gemma_s_gelu_is_by_tanh():
    assert read("gemma", **LAYERS, hidden_act="gelu")["activation_func"] == "fast_gelu"


@pytest.mark.parametrize(
    "family", ["cwm", "ministral3", "smollm3", "seed_oss", "helium", "ernie4_5", "arcee", "gemma", "ministral"]
)
def test_absent_fields_mean_what_transformers_fills_in(family):
    from transformers import AutoConfig

    whole = AutoConfig.for_model(family, **SIZES, **LAYERS).to_dict()
    assert read(family, **LAYERS) == to_megatron(families.find(family).CONFIG, whole)


def test_ministral_3_s_queries_grow_as_in_every_model_of_it():
    rope = families.find("ministral3").SMALL["rope_parameters"]
    assert read("ministral3", **LAYERS, rope_parameters=rope)["exact_sequence_length"] == 32


def test_bloom_is_published_under_other_names():
    names = {"n_embed": 64, "num_attention_heads": 4, "n_layer": 4, "n_inner": None}
    megatron = to_megatron(families.find("bloom").CONFIG, {"vocab_size": 384, **names})
    assert [megatron[name] for name in ("hidden_size", "num_attention_heads", "num_layers")] == [64, 4, 4]
    assert make_model(families.find("bloom").CONFIG, {"vocab_size": 384, **names}).ffn == 256
    with pytest.raises(UserError, match="two things: `n_embed` is `64`, `hidden_size` is `32`"):
        to_megatron(families.find("bloom").CONFIG, {"vocab_size": 384, **names, "hidden_size": 32})


def test_hunyuan_s_alpha_enlarges_the_base_of_rotary_embeddings():
    from transformers import HunYuanDenseV1Config
    from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1RotaryEmbedding as Rotary

    scaling = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
    megatron = read("hunyuan_v1_dense", **LAYERS, head_dim=128, rope_theta=10000.0, rope_scaling=scaling)
    theirs = Rotary(HunYuanDenseV1Config(head_dim=128, rope_theta=10000.0, rope_scaling=dict(scaling))).inv_freq
    ours = [megatron["rotary_base"] ** (-2 * channel / 128) for channel in range(64)]
    assert theirs.tolist() == pytest.approx(ours, rel=1e-6)
    assert (megatron["position_embedding_type"], megatron["rope_scaling"]) == ("rope", False)
    with pytest.raises(UserError, match="rope type `dynamic`"):
        read("hunyuan_v1_dense", **LAYERS, rope_scaling={"type": "dynamic", "factor": 2.0})


@pytest.mark.parametrize("family", ["mistral", "ministral"])
def test_mistral_s_rotary_embeddings_may_be_scaled(family):
    scaling = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192, "finetuned": True}
    megatron = read(family, **LAYERS, rope_theta=10000.0, rope_scaling=scaling)
    assert (megatron["position_embedding_type"], megatron["yarn_rotary_scaling_factor"]) == ("yarn", 16.0)


def test_galactica_is_opt_with_gelu():
    assert read("opt", **LAYERS, ffn_dim=96, activation_function="gelu")["activation_func"] == "gelu"


def test_layer_types_win_over_the_pattern_that_transformers_never_reads():
    from transformers import Gemma3TextConfig

    types = ["sliding_attention", "full_attention"] * 2
    saved = Gemma3TextConfig(**SIZES, **LAYERS, layer_types=types).to_dict()
    assert saved["_sliding_window_pattern"] == 6
    assert read("gemma3_text", **saved)["window_attn_skip_freq"] == [1, 0, 1, 0]
    megatron = read("gemma3_text", **LAYERS, _sliding_window_pattern=2)
    assert megatron["window_attn_skip_freq"] is None, (
        "as transformers, which reads `sliding_window_pattern` alone: all four slide"
    )


def test_layer_types_need_no_pattern():
    types = ["sliding_attention", "full_attention"] * 2
    megatron = read("exaone4", **LAYERS, sliding_window=8, sliding_window_pattern=None, layer_types=types)
    assert megatron["window_attn_skip_freq"] == [1, 0, 1, 0]


YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
DEEPSEEK = {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "vocab_size": 102400, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "attention_bias": False, "hidden_act": "silu",
    "max_position_embeddings": 163840, "moe_layer_freq": 1, "rms_norm_eps": 1e-06, "ep_size": 1, "pretraining_tp": 1,
    "rope_theta": 10000, "tie_word_embeddings": False, "aux_loss_alpha": 0.001, "seq_aux": True,
}  # fmt: skip
PUBLISHED = {
    "V3": ("deepseek_v3", {"num_hidden_layers": 61, "num_attention_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "norm_topk_prob": True,
        "q_lora_rank": 1536, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {"moe_router_num_groups": 8, "moe_router_group_score": None, "mtp_num_layers": 1, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "Kimi K2": ("kimi_k2", {"num_hidden_layers": 61, "num_attention_heads": 64, "n_routed_experts": 384, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True,
        "q_lora_rank": 1536, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {"moe_router_num_groups": None, "moe_router_topk_scaling_factor": 2.827, "mtp_num_layers": None, "rope_type": "yarn"}),
    "V2-Lite": ("deepseek_v2", {"num_hidden_layers": 27, "num_attention_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": False,
        "q_lora_rank": None, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy",
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
        {"q_lora_rank": None, "moe_router_num_groups": None, "moe_router_pre_softmax": True, "mscale_all_dim": 0.707}),
    "V2": ("deepseek_v2", {"num_hidden_layers": 60, "num_attention_heads": 128, "n_routed_experts": 160, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "first_k_dense_replace": 1, "norm_topk_prob": False,
        "q_lora_rank": 1536, "routed_scaling_factor": 16.0, "scoring_func": "softmax", "topk_method": "group_limited_greedy",
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
        {"moe_router_num_groups": 8, "moe_router_group_topk": 3, "moe_router_group_score": 1}),
    "Moonlight": ("deepseek_v3", {"num_hidden_layers": 27, "num_attention_heads": 16, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "norm_topk_prob": True, "q_lora_rank": None, "routed_scaling_factor": 2.446, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "rope_theta": 50000.0, "rope_scaling": None},
        {"q_lora_rank": None, "rope_type": "rope", "moe_shared_expert_intermediate_size": 2816}),
}  # fmt: skip
"""Of published `config.json` files, with the sizes of one for all: what matters here; and what is made of it."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_deepseek_s_published_configurations_mean_what_their_models_compute(name):
    family, fields, expected = PUBLISHED[name]
    definition = families.find(family)
    megatron = to_megatron(definition.CONFIG, {**DEEPSEEK, **fields})
    assert {field: megatron[field] for field in expected} == expected
    assert to_megatron(definition.CONFIG, {**DEEPSEEK, **to_huggingface(definition.CONFIG, megatron)}) == megatron
    assert megatron["norm_topk_prob"] is None, "`mbtrain` computes it"
    assert make_model(definition.CONFIG, {**DEEPSEEK, **fields}).get("mtp", 0) == fields.get("num_nextn_predict_layers", 0)


NEXT = {
    "attention_bias": False, "decoder_sparse_step": 1, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5120, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
    "max_position_embeddings": 262144, "mlp_only_layers": [], "moe_intermediate_size": 512, "norm_topk_prob": True,
    "num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2,
    "output_router_logits": False, "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000000, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip
"""Qwen3-Next-80B-A3B, as transformers 4 wrote it: without `layer_types`."""

ROPE = {
    "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25, "rope_theta": 10000000,
    "rope_type": "default",
}  # fmt: skip
DENSE = {
    "attn_output_gate": True, "full_attention_interval": 4, "head_dim": 256, "hidden_size": 5120, "intermediate_size": 17408,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 16, "linear_num_value_heads": 48, "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144, "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False, "num_attention_heads": 24, "num_hidden_layers": 64, "num_key_value_heads": 4,
    "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_parameters": ROPE, "vocab_size": 248320,
}  # fmt: skip
"""`text_config` of Qwen3.5-27B."""

SPARSE = {
    "full_attention_interval": 4, "head_dim": 256, "hidden_size": 2048, "linear_num_value_heads": 32,
    "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 512, "num_attention_heads": 16, "num_experts": 256,
    "num_experts_per_tok": 8, "num_hidden_layers": 40, "num_key_value_heads": 2, "rope_parameters": ROPE,
    "shared_expert_intermediate_size": 512, "vocab_size": 248320,
}  # fmt: skip
"""Of `text_config` of Qwen3.5-35B-A3B."""

EACH_FOURTH = {"linear_attention_freq": [1, 1, 1, 0], "rotary_percent": 0.25, "rotary_base": 10000000, "kv_channels": 256}


@pytest.mark.parametrize(
    ("family", "config", "repeated", "expected"),
    [
        ("qwen3_next", NEXT, 12, {"moe_router_pre_softmax": False, "moe_layer_freq": 1, "mtp_num_layers": None}),
        ("qwen3_5", {"text_config": DENSE}, 16, {"num_moe_experts": None, "ffn_hidden_size": 17408, "mtp_num_layers": 1}),
        ("qwen3_5_moe", {"text_config": SPARSE}, 10, {"moe_router_topk": 8, "moe_shared_expert_intermediate_size": 512}),
    ],
)
def test_every_fourth_layer_of_published_delta_nets_has_attention(family, config, repeated, expected):
    megatron = to_megatron(families.find(family).CONFIG, config)
    expected = {**EACH_FOURTH, **expected, "linear_attention_freq": EACH_FOURTH["linear_attention_freq"] * repeated}
    assert {name: megatron[name] for name in expected} == expected
    model = make_model(families.find(family).CONFIG, config)
    assert (model.l_keys, model.l_values, model.gated_queries) == (2048, 128 * model.linear_heads, 2 * model.heads * 256)
    assert to_megatron(families.find(family).CONFIG, to_huggingface(families.find(family).CONFIG, megatron)) == megatron
