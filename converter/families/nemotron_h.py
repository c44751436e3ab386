"""Nemotron-H: layers of Mamba-2, of attention without positions, of squared ReLU, and of experts without gates, perhaps with
fewer channels (`moe_latent_size`).

transformers' own model keeps time steps above `time_step_min`, 0.001 in published files; megatron-core, with which the models
were trained, does not, nor does `mbtrain`. Layers of multi-token prediction pass through.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from converter.config import Config, Field, activation, field, fixed, named, one_of, optional, value
from converter.config import counts as sizes_by_name
from converter.config_mamba import (
    ATTENTION,
    DENSE,
    MAMBA,
    SPARSE,
    WORDS,
    counted,
    if_any,
    letters,
    mamba,
    mixer,
    pattern,
    spelled,
)
from converter.config_parts import dropouts, not_computed, only, rms_norm, routed, sizes, trained_with
from converter.config_router import best_groups, sigmoid_scores
from converter.families import deepseek_v3, llama, mamba2
from converter.hybrid import PATTERN
from converter.model import Model
from converter.rules import Condition, Indices, Rule, column_parallel, replicated, row_parallel, under

MODELS = "Nemotron-H, Nemotron Nano 2, Nemotron 3 Nano and Super"
ARCHITECTURE = "NemotronHForCausalLM"


def has(letter: str) -> Condition:
    """Return the condition that a layer is of the kind with this letter."""
    return lambda model, indices: model.pattern[indices["layer"]] == letter


def _from_few(model: Model, indices: Indices) -> bool:
    return has(SPARSE)(model, indices) and model.latent > 0


def _layers(letter: str, rules: Iterable[Rule]) -> Iterable[Rule]:
    return under("decoder.layers.{layer}", "backbone.layers.{layer}", rules, when=has(letter))


ATTENDING = (
    replace(llama.ATTENTION[0], huggingface="norm.weight"),
    replace(llama.ATTENTION[1], huggingface="mixer.{q,k,v}_proj.weight"),
    replace(llama.ATTENTION[2], huggingface="mixer.o_proj.weight"),
)
FEEDING = (
    replace(llama.MLP[0], huggingface="norm.weight"),
    column_parallel("mlp.linear_fc1.weight", "mixer.up_proj.weight", "ffn", "hidden"),
    row_parallel("mlp.linear_fc2.weight", "mixer.down_proj.weight", "hidden", "ffn"),
)
ROUTING = (
    replicated("pre_mlp_layernorm.weight", "norm.weight", "hidden"),
    replicated("mlp.router.weight", "mixer.gate.weight", "experts", "hidden"),
    replace(deepseek_v3.BIAS, huggingface="mixer.gate.e_score_correction_bias"),
)
LATENT = (
    replicated("mlp.fc1_latent_proj.weight", "mixer.fc1_latent_proj.weight", "latent", "hidden"),
    replicated("mlp.fc2_latent_proj.weight", "mixer.fc2_latent_proj.weight", "hidden", "latent"),
)
EXPERTS = (
    column_parallel("mlp.experts.{expert}.linear_fc1.weight", "mixer.experts.{expert}.up_proj.weight", "moe_ffn", "channels"),
    row_parallel("mlp.experts.{expert}.linear_fc2.weight", "mixer.experts.{expert}.down_proj.weight", "channels", "moe_ffn"),
    column_parallel("mlp.shared_experts.linear_fc1.weight", "mixer.shared_experts.up_proj.weight", "shared_ffn", "hidden"),
    row_parallel("mlp.shared_experts.linear_fc2.weight", "mixer.shared_experts.down_proj.weight", "hidden", "shared_ffn"),
)
RULES = mamba2.backbone(
    *_layers(MAMBA, mamba2.mixing("norm.weight", "mixer")),
    *_layers(ATTENTION, ATTENDING),
    *_layers(DENSE, FEEDING),
    *_layers(SPARSE, ROUTING),
    *(replace(rule, when=_from_few) for rule in _layers(SPARSE, LATENT)),
    *_layers(SPARSE, EXPERTS),
)

_WORDS, _LETTERS = "layers_block_type", "hybrid_override_pattern"
"""Fields of the kinds of layers: of transformers 5, and of the code that is published with the models."""

_KNOWN = {_WORDS: WORDS, _LETTERS: {letter: letter for letter in (MAMBA, ATTENTION, DENSE, SPARSE)}}


def _kinds(config: Config) -> str:
    """Return the pattern, transformers' own without one; UserError where both fields are there and differ."""
    patterns = {name: config[name] for name in _KNOWN if config.get(name) is not None} or {_LETTERS: "ME*-"}
    return one_of({f"`{name}`": letters(name, pattern, _KNOWN[name]) for name, pattern in patterns.items()})


def _nothing(_config: Config) -> dict[str, Any]:
    return {}


def _written_kinds(pattern: str) -> dict[str, Any]:
    return {_WORDS: spelled(pattern), _LETTERS: pattern}


_SHARED, _LATENT = "moe_shared_expert_intermediate_size", "moe_latent_size"
ROUTED = (
    *routed(experts="n_routed_experts", topk="num_experts_per_tok", ffn="moe_intermediate_size"),
    field(_SHARED, _SHARED, default=value(7688)),
    sizes_by_name(shared_ffn=_SHARED),
    optional(_LATENT, _LATENT),
    Field(_nothing, _nothing, lambda sizes: {"latent": sizes.megatron[_LATENT] or 0}),
    named(channels=lambda model: model.latent or model.hidden),
    best_groups(1, 1, best=2),
    *sigmoid_scores(scale=1.0),
    not_computed("norm_topk_prob", off=True),
    only(n_shared_experts=1),
)
CONFIG = (
    counted(
        (*sizes(groups_default=8, head_dim_default=128, positions_default=4096), *pattern(_kinds, _written_kinds)), _kinds
    ),
    *dropouts(),
    *rms_norm("layer_norm_epsilon", default=1e-5),
    activation("relu2", huggingface="mlp_hidden_act"),
    *mamba(heads="mamba_num_heads", dim="mamba_head_dim", groups="n_groups", state="ssm_state_size", kernel="conv_kernel",
           groups_default=8, state_default=128),
    *mixer(_kinds, norm="layer_norm_epsilon", default=1e-5, projection=("use_bias", "mamba_proj_bias"),
           convolution="use_conv_bias", function="mamba_hidden_act"),
    fixed(gated_linear_unit=False, add_bias_linear=False, add_qkv_bias=False, qk_layernorm=False, position_embedding_type="none"),
    only(attention_bias=False, mlp_bias=False),
    trained_with(sliding_window=None),
    if_any(ROUTED, lambda config: SPARSE in _kinds(config), lambda config: SPARSE in config[PATTERN], {"num_moe_experts": None}),
)  # fmt: skip
PASSTHROUGH_PREFIXES = ("mtp.",)
LAYOUTS = ("hybrid",)
SMALL = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 16,
    "n_groups": 2, "ssm_state_size": 16, "chunk_size": 8, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 80, "moe_latent_size": 32, "n_group": 4, "topk_group": 2,
    "routed_scaling_factor": 2.5, "head_dim": 24, "intermediate_size": 96, "layer_norm_epsilon": 0.01,
}  # fmt: skip
PROVIDER = ("moe_router_group_score", "mamba_norm_epsilon")
