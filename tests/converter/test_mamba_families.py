"""Families with Mamba layers: what published configurations say, and what of them megatron-core does not compute."""

from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import Reporter, UserError, families, hf_to_mcore, mcore_to_hf, reshard
from converter.config import make_model, to_huggingface, to_megatron
from formats.folder import LocalFolder
from formats.torch_dist import TorchDistReader
from tests.converter.family_suite import save_small, small_config
from tests.models import model_tree

NEMOTRON = {
    "model_type": "nemotron_h", "attention_bias": False, "mlp_bias": False, "use_bias": False, "mamba_proj_bias": False,
    "use_conv_bias": True, "conv_kernel": 4, "mamba_hidden_act": "silu", "mlp_hidden_act": "relu2", "expand": 2,
    "time_step_floor": 0.0001, "time_step_limit": [0.0, math.inf], "time_step_max": 0.1, "time_step_min": 0.001,
    "layer_norm_epsilon": 1e-05, "residual_in_fp32": False, "sliding_window": None, "tie_word_embeddings": False,
    "vocab_size": 131072,
}  # fmt: skip
GRANITE = {
    "model_type": "granitemoehybrid", "attention_bias": False, "hidden_act": "silu", "vocab_size": 100352, "rms_norm_eps": 1e-05,
    "logits_scaling": 8, "embedding_multiplier": 12, "residual_multiplier": 0.22, "attention_multiplier": 0.0078125,
    "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_state": 128, "mamba_expand": 2,
    "mamba_n_groups": 1, "mamba_proj_bias": False, "max_position_embeddings": 131072, "rope_theta": 10000, "rope_scaling": None,
    "normalization_function": "rmsnorm", "init_method": "mup", "router_aux_loss_coef": 0.01, "output_router_logits": False,
}  # fmt: skip
PUBLISHED = {
    "Codestral Mamba": (
        {"model_type": "mamba2", "hidden_size": 4096, "num_hidden_layers": 64, "num_heads": 128, "head_dim": 64, "n_groups": 8,
         "state_size": 128, "expand": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
         "layer_norm_epsilon": 1e-05, "rms_norm": True, "norm_before_gate": True, "residual_in_fp32": True,
         "time_step_limit": [0.0, math.inf], "time_step_rank": 256, "vocab_size": 32768, "tie_word_embeddings": False},
        {"hybrid_layer_pattern": "M" * 64, "num_layers": 64, "mamba_num_heads": 128, "mamba_head_dim": 64, "mamba_num_groups": 8,
         "mamba_state_dim": 128, "position_embedding_type": "none"},
    ),
    "Nemotron-H 8B": (
        {**NEMOTRON, "hidden_size": 4096, "num_hidden_layers": 52, "intermediate_size": 21504, "num_attention_heads": 32,
         "num_key_value_heads": 8, "attention_head_dim": 128, "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 64,
         "n_groups": 8, "ssm_state_size": 128,
         "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"},
        {"num_layers": 52, "kv_channels": 128, "num_moe_experts": None, "activation_func": "squared_relu",
         "position_embedding_type": "none", "mamba_num_heads": 128},
    ),
    "Nemotron Nano 9B v2": (
        {**NEMOTRON, "hidden_size": 4480, "num_hidden_layers": 56, "intermediate_size": 15680, "num_attention_heads": 40,
         "num_key_value_heads": 8, "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 80, "n_groups": 8,
         "ssm_state_size": 128, "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"},
        {"num_layers": 56, "kv_channels": 128, "mamba_head_dim": 80, "hidden_size": 4480},
    ),
    "Nemotron 3 Nano 30B-A3B": (
        {**NEMOTRON, "hidden_size": 2688, "num_hidden_layers": 52, "intermediate_size": 1856, "num_attention_heads": 32,
         "num_key_value_heads": 2, "head_dim": 128, "mamba_num_heads": 64, "mamba_head_dim": 64, "n_groups": 8,
         "ssm_state_size": 128, "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
         "moe_shared_expert_intermediate_size": 3712, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
         "norm_topk_prob": True, "routed_scaling_factor": 2.5,
         "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"},
        {"num_moe_experts": 128, "moe_router_topk": 6, "moe_router_topk_scaling_factor": 2.5, "moe_latent_size": None,
         "moe_shared_expert_intermediate_size": 3712, "moe_router_num_groups": None, "num_query_groups": 2},
    ),
    "Bamba 9B": (
        {"model_type": "bamba", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "attn_layer_indices": [9, 18, 27],
         "attn_rotary_emb": 64, "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mamba_chunk_size": 256,
         "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2,
         "mamba_n_groups": 1, "mamba_n_heads": 128, "mamba_proj_bias": False, "rms_norm_eps": 1e-05,
         "max_position_embeddings": 262144, "tie_word_embeddings": False},
        {"num_layers": 64, "hybrid_layer_pattern": "M-" * 9 + ("*-" + "M-" * 8) * 2 + "*-" + "M-" * 4, "rotary_percent": 0.5},
    ),
    "Granite 4.0 H Small": (
        {**GRANITE, "hidden_size": 4096, "intermediate_size": 768, "shared_intermediate_size": 1536, "num_hidden_layers": 40,
         "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 72, "num_experts_per_tok": 10,
         "mamba_n_heads": 128, "mamba_d_head": 64, "position_embedding_type": "nope", "tie_word_embeddings": True,
         "layer_types": [*["mamba"] * 5, "attention", *(["mamba"] * 9 + ["attention"]) * 3, *["mamba"] * 4],
         "logits_scaling": 16},
        {"num_layers": 80, "num_moe_experts": 72, "moe_ffn_hidden_size": 768, "moe_shared_expert_intermediate_size": 1536,
         "position_embedding_type": "none", "mup_output_mult": 1 / 16, "residual_multiplier": 0.22},
    ),
    "Granite 4.0 Micro": (
        {**GRANITE, "hidden_size": 2560, "intermediate_size": 8192, "shared_intermediate_size": 8192, "num_hidden_layers": 40,
         "num_attention_heads": 40, "num_key_value_heads": 8, "num_local_experts": 0, "num_experts_per_tok": 0,
         "mamba_n_heads": 128, "mamba_d_head": 40, "position_embedding_type": "rope", "rope_theta": 10000000,
         "tie_word_embeddings": True, "layer_types": ["attention"] * 40},
        {"hybrid_layer_pattern": "*-" * 40, "num_moe_experts": None, "ffn_hidden_size": 8192, "rotary_base": 10000000,
         "position_embedding_type": "rope"},
    ),
}  # fmt: skip
"""The fields of published files that matter, and what they mean in Megatron."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_means_the_same_after_the_way_there_and_back(name):
    config, expected = PUBLISHED[name]
    family = families.find(config["model_type"])
    megatron = to_megatron(family.CONFIG, config)
    assert {field: megatron[field] for field in expected} == expected
    back = to_huggingface(family.CONFIG, megatron)
    assert to_megatron(family.CONFIG, back) == megatron
    assert make_model(family.CONFIG, back) == make_model(family.CONFIG, config)
    for field in ("mamba_norm_epsilon", "time_step_limit", "norm_topk_prob"):
        assert megatron.get(field) is None, "which `mbtrain` refuses"


REFUSED = {
    "projections": ("mamba2", {"use_bias": True}, "`use_bias` is `True`; only `False`"),
    "convolution": ("bamba", {"mamba_conv_bias": False}, "`mamba_conv_bias` is `False`; only `True`"),
    "width": ("nemotron_h", {"conv_kernel": 3}, "`conv_kernel` is `3`; only `4`"),
    "activation": ("nemotron_h", {"mamba_hidden_act": "gelu"}, "`mamba_hidden_act` is `gelu`; only `silu`"),
    "heads": ("bamba", {"mamba_n_heads": 6}, "`mamba_n_heads` is 6 and `mamba_d_head` `16`, and `mamba_expand` times"),
    "groups": ("mamba2", {"n_groups": 3}, "`num_heads` is 8, which is not divisible by `n_groups`, 3"),
    "kinds": ("nemotron_h", {"hybrid_override_pattern": "MMMM"}, "two things: `layers_block_type` is `ME.-`, `hybrid_override"),
    "unknown kind": ("nemotron_h", {"layers_block_type": ["mamba", "conv"]}, "`layers_block_type` has `conv`"),
    "layers": ("nemotron_h", {"num_hidden_layers": 5}, "two things: `num_hidden_layers` is `5`, the number of layers that have"),
    "indices": ("bamba", {"attn_layer_indices": [9]}, r"`attn_layer_indices` is `\[9\]`, which should be numbers of layers"),
    "positions": ("granitemoehybrid", {"position_embedding_type": "alibi"}, "`alibi`; this family has `rope` or `nope`"),
    "types": ("granitemoehybrid", {"layer_types": ["mamba"]}, "`layer_types` has 1 layers, and `num_hidden_layers` is 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_in_megatron_is_refused_by_name(case):
    family, changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        to_megatron(families.find(family).CONFIG, {**small_config(family).to_dict(), **changes})


NOT_TRAINED = [
    ("mamba2", {"time_step_limit": [0.0, 0.5]}, r"`time_step_limit` is `\[0\.0, 0\.5\]`"),
    ("bamba", {"time_step_limit": [0.01, {"__float__": "Infinity"}]}, r"`time_step_limit` is `\[0\.01, inf\]`"),
    ("nemotron_h", {"norm_topk_prob": False}, "`norm_topk_prob` is `False`"),
]


@pytest.mark.parametrize(("family", "changes", "message"), NOT_TRAINED)
def test_what_megatron_core_s_layers_do_not_compute_is_converted_with_a_note_and_not_trained(family, changes, message, tmp_path):
    from trainer.model import from_hf_config

    folder = save_small(family, tmp_path / "hf")
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    notes = []
    hf_to_mcore(folder, tmp_path / "m", reporter=Reporter(notes.append))
    assert [bool(re.match(f"{message}, with which", note)) for note in notes if "`mbtrain` refuses the model" in note] == [True]
    with pytest.raises(UserError, match=f"{message.replace(' is', '')} cannot be trained"):
        from_hf_config(config)


def test_a_model_without_mamba_layers_has_no_epsilon_of_their_own():
    config = {**small_config("granitemoehybrid").to_dict(), "rms_norm_eps": 1e-6, "layer_types": ["full_attention"] * 2}
    assert to_megatron(families.find("granitemoehybrid").CONFIG, config)["mamba_norm_epsilon"] is None


def test_a_nemotron_h_of_remote_code_comes_back_with_its_letters_and_its_prediction_layers(tmp_path):
    folder = save_small("nemotron_h", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    del config["layers_block_type"]
    config |= {"hybrid_override_pattern": "ME*-", "num_hidden_layers": 4}
    config |= {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    (folder / "config.json").write_text(json.dumps(config))
    mtp = {"mtp.layers.0.eh_proj.weight": torch.rand(64, 128), "mtp.layers.1.norm.weight": torch.rand(64)}
    save_file({**load_file(folder / "model.safetensors"), **mtp}, folder / "model.safetensors", {"format": "pt"})
    hf_to_mcore(folder, tmp_path / "m", tp=2, verify=True)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(folder)


def test_what_training_changed_in_fp32_comes_back_rounded_and_that_is_said(tmp_path):
    name, notes = "backbone.layers.0.mixer.A_log", []
    folder = save_small("mamba2", tmp_path / "hf")
    hf_to_mcore(folder, tmp_path / "m", integrity=False, reporter=Reporter(notes.append))
    assert [note for note in notes if "cast" in note] == [
        f"{kept('decoder', 6)} are cast from bf16 to fp32: Megatron keeps them in another dtype than the rest"
    ]
    before = load_file(folder / "model.safetensors")[name].float().numpy()
    location = TorchDistReader(LocalFolder(tmp_path / "m")).chunks("decoder.layers.0.mixer.A_log")[0].location
    path = tmp_path / "m" / "iter_0000000" / location.file
    data = path.read_bytes()
    at = data.index(before.tobytes(), location.offset)
    path.write_bytes(data[:at] + (before * np.float32(1.001)).tobytes() + data[at + before.nbytes :])
    mcore_to_hf(tmp_path / "m", tmp_path / "back", reporter=Reporter(notes.append))
    assert [note for note in notes if note.startswith(f"{kept('backbone', 6)} are cast from fp32 to bf16")]
    after = load_file(tmp_path / "back" / "model.safetensors")[name]
    assert torch.equal(after, torch.from_numpy(before * np.float32(1.001)).bfloat16())


def kept(root, more):
    names = ", ".join(f"`{root}.layers.{layer}.mixer.{name}`" for layer, name in ((0, "A_log"), (0, "D"), (1, "A_log")))
    return f"{names} and {more - 1} more"


@pytest.mark.parametrize("family", ["mamba2", "bamba", "nemotron_h", "granitemoehybrid"])
def test_a_checkpoint_without_config_json_comes_back_by_its_settings(family, tmp_path):
    folder, notes = save_small(family, tmp_path / "hf"), []
    hf_to_mcore(folder, tmp_path / "imported", tp=2)
    shutil.rmtree(tmp_path / "imported/iter_0000000/huggingface")
    reshard(tmp_path / "imported", tmp_path / "m")
    mcore_to_hf(tmp_path / "m", tmp_path / "back", reporter=Reporter(note=notes.append))
    assert notes[0] == "`config.json` is rebuilt from `run_config.yaml`"
    assert not [text for text in notes if "not known" in text]
    fields = families.find(family).CONFIG
    before, after = (to_megatron(fields, json.loads((path / "config.json").read_text())) for path in (folder, tmp_path / "back"))
    assert after == before
    weights = [load_file(path / "model.safetensors") for path in (folder, tmp_path / "back")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_setting_that_no_family_with_mamba_layers_says_is_refused_by_name(tmp_path):
    hf_to_mcore(save_small("mamba2", tmp_path / "hf"), tmp_path / "m")
    shutil.rmtree(tmp_path / "m/iter_0000000/huggingface")
    settings = tmp_path / "m/iter_0000000/run_config.yaml"
    settings.write_text(settings.read_text().replace("model:\n", "model:\n  residual_multiplier: 0.5\n", 1))
    with pytest.raises(UserError, match=r"residual_multiplier"):
        mcore_to_hf(tmp_path / "m", tmp_path / "back")
