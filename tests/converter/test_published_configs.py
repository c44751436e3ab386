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
    found = read("exaone", num_layers=4, layer_norm_epsilon=1e-3, activation_function="silu")
    assert (found["num_layers"], found["layernorm_epsilon"]) == (4, 1e-3)
    back = to_huggingface(families.find("exaone").CONFIG, found)
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
    with pytest.raises(UserError, match=r"`llama_4_scaling_beta` is `0\.5`"):
        read("ministral3", **LAYERS, rope_parameters={**rope, "llama_4_scaling_beta": 0.5})


def test_bloom_is_published_under_other_names():
    names = {"n_embed": 64, "num_attention_heads": 4, "n_layer": 4, "n_inner": None}
    found = to_megatron(families.find("bloom").CONFIG, {"vocab_size": 384, **names})
    assert [found[name] for name in ("hidden_size", "num_attention_heads", "num_layers")] == [64, 4, 4]
    assert make_model(families.find("bloom").CONFIG, {"vocab_size": 384, **names}).ffn == 256
    with pytest.raises(UserError, match="two things: `n_embed` is `64`, `hidden_size` is `32`"):
        to_megatron(families.find("bloom").CONFIG, {"vocab_size": 384, **names, "hidden_size": 32})


def test_hunyuan_s_alpha_enlarges_the_base_of_rotary_embeddings():
    from transformers import HunYuanDenseV1Config
    from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1RotaryEmbedding as Rotary

    scaling = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
    found = read("hunyuan_v1_dense", **LAYERS, head_dim=128, rope_theta=10000.0, rope_scaling=scaling)
    theirs = Rotary(HunYuanDenseV1Config(head_dim=128, rope_theta=10000.0, rope_scaling=dict(scaling))).inv_freq
    ours = [found["rotary_base"] ** (-2 * channel / 128) for channel in range(64)]
    assert theirs.tolist() == pytest.approx(ours, rel=1e-6)
    assert (found["position_embedding_type"], found["rope_scaling"]) == ("rope", False)
    with pytest.raises(UserError, match="rope type `dynamic`"):
        read("hunyuan_v1_dense", **LAYERS, rope_scaling={"type": "dynamic", "factor": 2.0})


@pytest.mark.parametrize("family", ["mistral", "ministral"])
def test_mistral_s_rotary_embeddings_may_be_scaled(family):
    scaling = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192, "finetuned": True}
    found = read(family, **LAYERS, rope_theta=10000.0, rope_scaling=scaling)
    assert (found["position_embedding_type"], found["yarn_rotary_scaling_factor"]) == ("yarn", 16.0)


def test_galactica_is_opt_with_gelu():
    assert read("opt", **LAYERS, ffn_dim=96, activation_function="gelu")["activation_func"] == "gelu"


def test_layer_types_win_over_the_pattern_that_transformers_never_reads():
    from transformers import Gemma3TextConfig

    types = ["sliding_attention", "full_attention"] * 2
    saved = Gemma3TextConfig(**SIZES, **LAYERS, layer_types=types).to_dict()
    assert saved["_sliding_window_pattern"] == 6
    assert read("gemma3_text", **saved)["window_attn_skip_freq"] == [1, 0, 1, 0]
    found = read("gemma3_text", **LAYERS, _sliding_window_pattern=2)
    assert found["window_attn_skip_freq"] is None, "as transformers, which reads `sliding_window_pattern` alone: all four slide"


def test_layer_types_need_no_pattern():
    types = ["sliding_attention", "full_attention"] * 2
    found = read("exaone4", **LAYERS, sliding_window=8, sliding_window_pattern=None, layer_types=types)
    assert found["window_attn_skip_freq"] == [1, 0, 1, 0]
