"""Negative controls: with an option of a family switched off in the model that `mbtrain` builds, logits differ. So the tests of
logits see each option that `config.json` of a small model sets (`SMALL`)."""

from __future__ import annotations

import json

import pytest

from converter import families, hf_to_mcore
from converter.config import to_megatron
from tests.converter.family_suite import TOKENS, save_small, small_config
from tests.family_models import differences

TOLERANCE = 1e-4
"""Of the largest logit: what the tests of logits allow."""

OFF = {
    "activation_func_clamp_value": None,
    "add_qkv_bias": False,
    "alibi": None,
    "attention_output_bias": False,
    "attention_output_gate": False,
    "attn_logit_softcapping": None,
    "clip_qkv": None,
    "dsa_indexer_rope_interleaved": False,
    "dsa_indexer_topk": 2048,
    "embedding_layernorm": False,
    "final_logit_softcapping": None,
    "glu_linear_offset": 0.0,
    "layernorm_zero_centered_gamma": False,
    "mamba_norm_epsilon": None,
    "moe_output_multiplier": 1.0,
    "moe_router_enable_expert_bias": False,
    "moe_router_group_score": None,
    "moe_router_num_groups": None,
    "moe_router_score_function": "softmax",
    "moe_router_scoring": None,
    "moe_router_sparsemixer_jitter": 0.0,
    "moe_router_topk_scaling_factor": None,
    "moe_shared_expert_gate": False,
    "moe_shared_expert_intermediate_size": None,
    "mscale_all_dim": 0.0,
    "mup_embedding_mult": 1.0,
    "mup_output_mult": 1.0,
    "no_rope_freq": None,
    "output_layer_bias": False,
    "parallel_residual": None,
    "position_embedding_type": "rope",
    "position_offset": 0,
    "post_layernorms": False,
    "pre_layernorms": True,
    "moe_apply_probs_on_input": False,
    "qk_l2_norm": False,
    "qk_l2_norm_with_rope": False,
    "qk_layernorm": False,
    "qk_layernorm_after_rope": False,
    "qk_layernorm_scope": "head",
    "residual_multiplier": 1.0,
    "rope_parameters": None,
    "rope_scaling": False,
    "rope_type": "rope",
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "seq_len_interpolation_factor": None,
    "sliding_rope": None,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "window_attn_skip_freq": None,
    "window_size": None,
    "yarn_correction_range_round_to_int": True,
    "yarn_mscale": None,
}
"""Fields of the provider, each with the value that switches it off."""

TOGETHER: dict[str, dict] = {
    "alibi": {"position_embedding_type": "none"},
    "moe_router_enable_expert_bias": {"moe_router_scoring": None},
    "moe_router_num_groups": {"moe_router_group_topk": None, "moe_router_group_score": None},
    "moe_router_score_function": {
        "moe_router_enable_expert_bias": False,
        "moe_router_pre_softmax": True,
        "moe_router_scoring": None,
    },
    "moe_shared_expert_intermediate_size": {"moe_shared_expert_gate": False},
    "qk_layernorm": {"qk_layernorm_scope": "head", "qk_layernorm_after_rope": False},
    "rotary_percent": {"rope_parameters": None},
}
"""What has to change with an option, for megatron-core to build a model."""

OTHER_ACTIVATIONS = {
    "silu": "gelu",
    "gelu": "relu",
    "fast_gelu": "quick_gelu",
    "relu": "silu",
    "squared_relu": "relu",
    "quick_gelu": "relu",
    "xielu": "silu",
}
"""GELU by tanh is nearer to GELU than logits of small models tell."""

NOT_SEEN = {"exact_sequence_length", "latent_layernorm_epsilon"}
"""Fields that change nothing of the sequences that are computed, or too little."""

QUICK = ("gemma", "smollm3")


def controls(family, config):
    """What is switched off for a family, by names: the options that its small model has."""
    fields = to_megatron(families.find(family).CONFIG, config)
    on = [name for name, off in OFF.items() if name in fields and fields[name] not in (None, off)]
    if fields.get("alibi") or fields["position_embedding_type"] == "learned_absolute":
        on.remove("position_embedding_type")  # switched off with `alibi`; a model's learned positions are its own weights
    if not fields.get("qk_layernorm"):
        on = [name for name in on if not name.startswith("qk_layernorm_")]
    kinds = set(fields.get("hybrid_layer_pattern", "*-"))
    if "*" not in kinds:
        on.remove("position_embedding_type")
    changes = {name: {name: OFF[name], **TOGETHER.get(name, {})} for name in on}
    if fields.get("moe_router_score_function") == "softmax":
        changes["moe_router_pre_softmax"] = {"moe_router_pre_softmax": not fields["moe_router_pre_softmax"]}
    activation = {"activation_func": {"activation_func": OTHER_ACTIVATIONS[fields["activation_func"]]}}
    takes_others = not fields.get("experimental_attention_variant")  # megatron-core's gated delta nets take SiLU alone
    return changes | (activation if takes_others and kinds & {"-", "E"} else {})


def cases():
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in families.names()]


@pytest.mark.parametrize("family", cases())
def test_logits_see_every_option_of_a_family(family, ranks, tmp_path):
    if not families.find(family).trains:
        return
    save_small(family, tmp_path / "hf", dtype="float32")
    hf_to_mcore(tmp_path / "hf", tmp_path / "megatron")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    changes = controls(family, config)
    shares = ranks.run(differences, 1, config, str(tmp_path / "megatron" / "iter_0000000"), TOKENS, changes)[0]
    assert {name: share for name, share in shares.items() if share <= TOLERANCE} == {}


def test_every_field_that_is_not_megatron_core_s_is_switched_off_in_some_family():
    needed = {field.partition("=")[0] for name in families.names() for field in families.find(name).PROVIDER} - NOT_SEEN
    shown = {field for name in families.names() for field in controls(name, small_config(name).to_dict())}
    assert needed - shown == set()
