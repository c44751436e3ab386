"""Mixtures of experts: what published configurations say beside sizes, in families of DeepSeek-V3's kind and others."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from converter import Reporter, families, hf_to_mcore
from converter.config import make_model, to_huggingface, to_megatron
from formats.errors import UserError
from tests.converter.family_suite import check_logits, random_model, save_small, small_config


def fields(family, **changes):
    return to_megatron(families.find(family).CONFIG, {**small_config(family).to_dict(), **changes})


def without(family, *names):
    """The configuration of a small model without some fields."""
    return {name: value for name, value in small_config(family).to_dict().items() if name not in names}


def back(family, megatron):
    return to_huggingface(families.find(family).CONFIG, megatron)


def test_a_router_s_bias_of_another_shape_is_named(tmp_path):
    file, name = save_small("hy_v3", tmp_path / "hf") / "model.safetensors", "model.layers.2.mlp.expert_bias"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name][:-1].clone()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"`{name}`.*\[7\].*\[8\]"):
        hf_to_mcore(tmp_path / "hf", tmp_path / "megatron")


@pytest.mark.parametrize(
    ("family", "changes", "name"),
    [
        ("flint", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("dots1", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("hunyuan_v1_moe", {"moe_topk": [1, 2, 2, 2]}, "moe_topk"),
        ("minimax_m2", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("phimoe", {"input_jitter_noise": 0.1}, "input_jitter_noise"),
    ],
)
def test_what_no_router_here_computes_is_refused_by_name_and_converted(family, changes, name):
    from trainer.model import from_hf_config

    megatron = fields(family, **changes)
    with pytest.raises(UserError, match=f"`{name}`.*cannot be trained"):
        from_hf_config({**small_config(family).to_dict(), **changes})
    assert changes.items() <= back(family, megatron).items()


def test_a_family_of_weights_alone_is_converted_with_a_note_and_not_trained(tmp_path):
    from trainer.model import from_hf_config

    why, notes = families.find("kolibri1").WEIGHTS_ONLY, list[str]()
    hf_to_mcore(save_small("kolibri1", tmp_path / "hf"), tmp_path / "m", reporter=Reporter(note=notes.append))
    assert f"weights alone: `mbtrain` cannot train a `kolibri1`: {why}" in notes
    with pytest.raises(UserError) as error:
        from_hf_config(small_config("kolibri1").to_dict())
    assert error.value.args[0] == f"a `kolibri1` cannot be trained: {why}"


def test_flint_has_dense_layers_and_full_ones_where_config_json_says_neither():
    megatron = to_megatron(families.find("flint").CONFIG, without("flint", "mlp_only_layers", "layer_types"))
    assert megatron["moe_layer_freq"] == [0, 0, 1, 1]
    assert megatron["window_attn_skip_freq"] == [0, 0, 1, 0]
    assert megatron["no_rope_freq"] == [1, 1, 0, 1]
    assert fields("flint", mlp_only_layers=[])["moe_layer_freq"] == 1


def test_the_same_number_of_experts_in_each_layer_is_one_number():
    assert fields("hunyuan_v1_moe", moe_topk=[2, 2, 2, 2]) == fields("hunyuan_v1_moe", moe_topk=2)


def test_minimax_counts_the_channels_that_are_turned():
    config_fields = families.find("minimax_m2").CONFIG
    config = {**without("minimax_m2", "rope_parameters"), "rope_theta": 5e6, "rotary_dim": 4}
    megatron = to_megatron(config_fields, config)
    assert megatron["rotary_percent"] == 0.25
    assert to_huggingface(config_fields, megatron)["rotary_dim"] == 4
    with pytest.raises(UserError, match="two things"):
        to_megatron(config_fields, {**config, "partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}})


def test_sarvam_s_own_names_are_read_and_written():
    own = {"num_experts": 8, "num_shared_experts": 2, "use_qkv_bias": False}
    plain = without("sarvam_moe", "n_routed_experts", "n_shared_experts", "attention_bias")
    megatron = to_megatron(families.find("sarvam_moe").CONFIG, {**plain, **own})
    assert megatron == fields("sarvam_moe")
    assert own.items() <= back("sarvam_moe", megatron).items()


@pytest.mark.parametrize(
    ("start", "end", "interval", "sparse"),
    [(1, -1, 1, {1, 2, 3}), (0, 2, 1, {0, 1, 2}), (1, 3, 2, {1, 3}), (3, 3, 1, {3}), (5, -1, 1, set())],
)
def test_ernie_s_layers_with_experts_follow_from_three_numbers(start, end, interval, sparse):
    config = {"moe_layer_start_index": start, "moe_layer_end_index": end, "moe_layer_interval": interval}
    megatron = fields("ernie4_5_moe", **config)
    family = families.find("ernie4_5_moe")
    again = {**small_config("ernie4_5_moe").to_dict(), **back("ernie4_5_moe", megatron)}
    assert make_model(family.CONFIG, again).sparse == sparse == make_model(family.CONFIG, {**again, **config}).sparse


def test_an_ernie_without_shared_experts_has_no_weights_of_them(ranks, tmp_path):
    model = random_model(small_config("ernie4_5_moe", moe_num_shared_experts=0), dtype="float32")
    model.save_pretrained(tmp_path / "hf")
    check_logits(ranks, tmp_path / "hf", tmp_path, runs={"tp1": {}})


@pytest.mark.slow
def test_phi_s_short_contexts_have_the_attention_factor_that_its_config_names(ranks, tmp_path):
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 8.0, 16.0],
        "short_mscale": 1.3, "long_mscale": 1.6, "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = small_config("phimoe", rope_parameters=rope)
    config.original_max_position_embeddings = 64
    random_model(config, dtype="float32").save_pretrained(tmp_path / "hf")
    check_logits(ranks, tmp_path / "hf", tmp_path, runs={"tp1": {}})
    saved = json.loads((tmp_path / "hf" / "config.json").read_text())
    megatron = to_megatron(families.find("phimoe").CONFIG, saved)
    assert megatron["rope_parameters"]["attention_factor"] == 1.3
    assert "attention_factor" not in (back("phimoe", megatron).get("rope_scaling") or {})


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"rope_parameters": None, "rope_theta": 10000.0},
    ],
)
def test_a_mellum_s_rotary_embeddings_are_those_of_each_type_of_layers(changes):
    with pytest.raises(UserError, match="is not said for each type of layers"):
        fields("mellum", **changes)
    assert fields("mellum", rope_parameters=None)["sliding_rope"] == {"rope_type": "default", "rope_theta": 10000.0}
