"""Sarvam MoE: GLM-4.5 under the names of Ling, with query, key and value in one tensor, and whole heads turned."""

from dataclasses import replace

from converter.config import field, switches, value
from converter.config_layers import no_window
from converter.config_nested import renamed
from converter.config_parts import dropouts, rms_norm, sizes
from converter.config_rope import rope
from converter.config_router import dense_first, sigmoid_scores
from converter.families import deepseek_v3, glm4, glm4_moe, llama, mixtral
from converter.rules import qkv, row_parallel, templates

MODELS = "Sarvam 30B"
ARCHITECTURE = "SarvamMoEForCausalLM"

ATTENTION = (
    llama.ATTENTION[0],
    qkv("self_attention.linear_qkv.weight", "attention.query_key_value.weight", "hidden"),
    replace(glm4.ATTENTION[-1], huggingface="attention.query_key_value.bias"),
    replace(glm4_moe.NORMS[0], huggingface="attention.query_layernorm.weight"),
    replace(glm4_moe.NORMS[1], huggingface="attention.key_layernorm.weight"),
    row_parallel("self_attention.linear_proj.weight", "attention.dense.weight", "hidden", "queries"),
)
BIAS = replace(deepseek_v3.BIAS, huggingface="mlp.gate.expert_bias")
SPARSE = (*mixtral.moe(), BIAS, *mixtral.shared())


def published(name: str) -> str:
    """Return the name that these models have for a tensor in place of Llama's."""
    return name.replace("model.embed_tokens.", "model.word_embeddings.")


RULES = templates(llama.decoder(*ATTENTION, *mixtral.mixed(llama.MLP, SPARSE)), published)

_FIELDS = (
    *sizes(positions_default=131072),
    field("num_query_groups", "num_key_value_heads", default=value(4)),
    field("kv_channels", "head_dim", default=value(64)),
    field("init_method_std", "initializer_range", default=value(0.006)),
    *rms_norm(),
    *dropouts(),
    *mixtral.GATED,
    *llama.NO_BIAS,
    *glm4_moe.ATTENTION_BIAS,
    field("qk_layernorm", "use_qk_norm", default=value(True)),
    switches(qk_norms="qk_layernorm"),
    rope("default", "yarn", theta=8e6),
    no_window("window_size"),
    *glm4_moe.EXPERTS,
    *sigmoid_scores(scale=2.5),
    dense_first(1),
)
CONFIG = (renamed(_FIELDS, num_experts="n_routed_experts", num_shared_experts="n_shared_experts", use_qkv_bias="attention_bias"),)
EXTRAS = llama.EXTRAS
SMALL = {
    **{name: value for name, value in glm4_moe.SMALL.items() if name not in ("attention_bias", "rope_parameters")},
    "head_dim": 16,
}
PROVIDER = ("moe_router_group_score",)
