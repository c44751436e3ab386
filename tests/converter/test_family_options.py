"""Options that a family's small model does not have, and what `config.json` may say otherwise."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from converter import UserError, families, hf_to_mcore, mcore_to_hf, verify
from converter.config import to_huggingface, to_megatron
from converter.execution import Reporter
from formats.folder import LocalFolder
from formats.huggingface import HuggingFaceReader
from tests.converter.family_suite import TOKENS, check_logits, check_names, save_small, small_config, transformers_logits
from tests.family_models import logits_of
from tests.models import model_tree
from trainer.checkpoints.live import plan_of
from trainer.model import from_hf_config

TP2 = {"tp2": {"tensor_model_parallel_size": 2}}

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 4.0}
OPTIONS = {
    "gpt2, scores not scaled": ("gpt2", {"scale_attn_weights": False, "activation_function": "relu", "n_inner": None}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt_bigcode, a key for each head": ("gpt_bigcode", {"multi_query": False, "num_key_value_heads": 8}),
    "starcoder2, without biases": ("starcoder2", {"use_bias": False, "sliding_window": None, "tie_word_embeddings": False}),
    "nemotron, biases of attention": ("nemotron", {"attention_bias": True, "head_dim": None}),
    "jais2, no biases of the feed-forward layer": ("jais2", {"mlp_bias": False}),
    "persimmon, without norms of query and key": ("persimmon", {"qk_layernorm": False}),
    "glm, without biases": ("glm", {"attention_bias": False}),
    "olmo, biases of attention": ("olmo", {"attention_bias": True}),
    "olmoe, clamped after norms": ("olmoe", {"clip_qkv": 0.5}),
    "mpt, clamped": ("mpt", {"attn_config": {"clip_qkv": 0.5}}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "granite, dynamic": ("granite", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "minimax_m2, yarn in a part of each head": ("minimax_m2", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_converted_computed_and_comes_back(option, ranks, tmp_path):
    family, changes = OPTIONS[option]
    check_names(family, save_small(family, tmp_path / "hf", dtype="float32", **changes))
    fields = to_megatron(families.find(family).CONFIG, small_config(family, **changes).to_dict())
    back = to_huggingface(families.find(family).CONFIG, fields)
    assert to_megatron(families.find(family).CONFIG, back) == fields
    check_logits(ranks, tmp_path / "hf", tmp_path, runs=TP2)
    mcore_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert model_tree(tmp_path / "back") == model_tree(tmp_path / "hf")


CONTROLS = [
    ("gpt2", {"softmax_scale": 1.0}), ("glm", {"rotary_interleaved": False}), ("glm", {"rotary_percent": 1.0}),
    ("starcoder2", {"window_size": None}), ("nemotron", {"layernorm_zero_centered_gamma": False}),
    ("persimmon", {"rotary_percent": 1.0}), ("jais2", {"activation_func": torch.nn.functional.relu}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "settings"), CONTROLS, ids=[f"{family} {next(iter(settings))}" for family, settings in CONTROLS]
)
def test_with_another_setting_the_logits_are_others(family, settings, ranks, tmp_path):
    folder = save_small(family, tmp_path / "hf", dtype="float32")
    hf_to_mcore(folder, tmp_path / "m")
    config, expected = json.loads((folder / "config.json").read_text()), transformers_logits(folder)
    (_, logits), *_ = ranks.run(logits_of, 1, (config, settings, ""), str(tmp_path / "m" / "iter_0000000"), TOKENS)
    assert np.abs(logits[..., : expected.shape[-1]] - expected).max() > 1e-3 * np.abs(expected).max()


def published_gpt2(folder, tmp_path):
    """The same model as the first uploads have it: names without a prefix, and masks beside the weights."""
    (published := tmp_path / "published").mkdir()
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    for layer in range(4):
        tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8), f"h.{layer}.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, published / "model.safetensors", {"format": "pt"})
    (published / "config.json").write_bytes((folder / "config.json").read_bytes())
    return published


def test_gpt2_without_a_prefix_is_the_same_model_and_comes_back(tmp_path):
    folder = save_small("gpt2", tmp_path / "hf")
    published = published_gpt2(folder, tmp_path)
    for source, name in ((folder, "one"), (published, "other")):
        hf_to_mcore(source, tmp_path / name, verify=True)
    data = [{path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.distcp")} for name in ("one", "other")]
    assert data[0] == data[1]
    mcore_to_hf(tmp_path / "other", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(published)
    assert verify(published, tmp_path / "other").same


def test_mbtrain_reads_other_prefixes_and_leaves_out_what_passes_through(tmp_path):
    published = published_gpt2(save_small("gpt2", tmp_path / "hf"), tmp_path)
    for folder, extras in ((published, 8), (save_small("mimo", tmp_path / "mimo"), 3)):
        plan = plan_of(HuggingFaceReader(LocalFolder(folder)))
        assert len(plan.extras) == extras
        assert "embedding.word_embeddings.weight" in {tensor.spec.name for tensor in plan.tensors}


def test_a_gpt2_under_another_family_s_config_is_named(model_folder, tmp_path):
    published = published_gpt2(save_small("gpt2", tmp_path / "hf"), tmp_path)
    (published / "config.json").write_bytes((model_folder("gqa") / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"holds `h\..*: names of another architecture \(GPT-2, GPT-NeoX\)\n\nhint: take the"):
        hf_to_mcore(published, tmp_path / "m")


def test_what_a_gpt2_has_more_is_not_said_to_be_gpt2_s(tmp_path):
    folder = save_small("gpt2", tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "transformer.h.0.crossattention.c_attn.bias": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"`transformer\.h\.0\.crossattention\.c_attn\.bias`") as error:
        hf_to_mcore(folder, tmp_path / "m")
    assert "another architecture" not in str(error.value)


REFUSED = {
    "gemma3_text": ({"use_bidirectional_attention": True}, "`use_bidirectional_attention` is `True`", "published models"),
    "gpt_oss": ({"hidden_act": "gelu", "swiglu_alpha": 1.5}, "`hidden_act` is `gelu` and `swiglu_alpha` is `1.5`", "published"),
    "ministral3": (
        {"rope_parameters": {**families.find("ministral3").SMALL["rope_parameters"], "llama_4_scaling_beta": 0.5}},
        "`llama_4_scaling_beta` is `0.5`",
        "published models",
    ),
    "gpt2": ({"scale_attn_by_inverse_layer_idx": True}, "`scale_attn_by_inverse_layer_idx` is `True`", "scores of attention"),
    "deepseek_v3": ({"norm_topk_prob": False}, "`norm_topk_prob` is `False`", "this family's routers"),
    "youtu": ({"rope_interleave": False}, "`rope_interleave` is `False`", "published models"),
    "deepseek_v2": ({"norm_topk_prob": True}, "`norm_topk_prob` is `True`", "this family's routers"),
    "baichuan": ({"z_loss_weight": 0}, "`normalized_output_layer` is `True`", "Baichuan 2 normalizes the rows"),
    "chatglm": ({"rope_ratio": 50}, "`rope_ratio` is `50`", "ChatGLM 2 divides positions by it"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_nothing_computes_is_converted_and_noted_and_refused_in_training(family, tmp_path):
    changes, problem, why = REFUSED[family]
    folder = save_small(family, tmp_path / "hf")
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    notes = []
    hf_to_mcore(folder, tmp_path / "m", reporter=Reporter(notes.append))
    assert any(note.startswith(f"{problem}, with which `mbtrain` refuses the model: {why}") for note in notes), notes
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert model_tree(tmp_path / "back") == model_tree(folder)
    with pytest.raises(UserError, match=r"cannot be trained: neither megatron-core nor this trainer computes it"):
        from_hf_config(config)
    fields = to_megatron(families.find(family).CONFIG, config)
    assert to_megatron(families.find(family).CONFIG, to_huggingface(families.find(family).CONFIG, fields)) == fields


@pytest.mark.parametrize("family", ["glm", "nemotron", "persimmon", "olmo", "jais2", "starcoder2", "internlm3"])
def test_transformers_4_and_5_spell_the_same_rope(family):
    config = AutoConfig.for_model(family, rope_theta=5e5).to_dict()
    new = config.pop("rope_parameters")
    assert new["rope_theta"] == 5e5
    old = {name: new[name] for name in ("rope_theta", "partial_rotary_factor") if name in new}
    fields = families.find(family).CONFIG
    assert to_megatron(fields, {**config, "rope_parameters": new}) == to_megatron(fields, {**config, **old})


def test_the_base_of_glm_4_s_rotary_embeddings_is_multiplied():
    glm4 = {**families.find("chatglm").SMALL, "hidden_size": 64, "num_attention_heads": 8, "padded_vocab_size": 151552}
    fields = to_megatron(families.find("chatglm").CONFIG, {**glm4, "rope_ratio": 500})
    assert (fields["rotary_base"], fields["rope_ratio"]) == (5e6, None)
    assert to_huggingface(families.find("chatglm").CONFIG, fields)["rope_ratio"] == 500


def test_an_internlm3_with_some_biases_is_refused():
    config = {**AutoConfig.for_model("internlm3").to_dict(), "qkv_bias": True}
    with pytest.raises(UserError, match=r"`config.json` has .*`mlp_bias`: `False`, `qkv_bias`: `True`"):
        to_megatron(families.find("internlm3").CONFIG, config)
