"""Trinity: gated attention, norms before and after both branches, three of four layers slide and the others have no positions,
experts chosen by sigmoids and a bias."""

from dataclasses import replace
from typing import Any

from converter.config import Config, Field, count, fixed
from converter.config_layers import FULL, layer_types, no_rope, one_full_in, window_pattern
from converter.config_parts import dropouts, multipliers, only, rms_norm, routed, sizes
from converter.config_rope import rope
from converter.config_router import dense_first, shared_multiple, sigmoid_scores
from converter.families import gemma2, llama, mixtral, qwen3
from converter.rows import interleaved_by_group
from converter.rules import Rule, replicated
from formats.errors import UserError, format_untrusted

MODELS = "Arcee Trinity"
ARCHITECTURE = "AfmoeForCausalLM"

NORM, POST_NORM = "pre_mlp_layernorm.weight", "post_mlp_layernorm.weight"
GATED_ATTENTION = Rule(
    "self_attention.linear_qkv.weight",
    "self_attn.{q,gate,k,v}_proj.weight",
    (("queries", "hidden"), ("queries", "hidden"), ("keys", "hidden"), ("keys", "hidden")),
    interleaved_by_group,
    partition_dim=0,
)
DENSE = (
    replace(llama.MLP[0], huggingface=NORM),
    *llama.MLP[1:],
    replicated("mlp.linear_fc2.post_layernorm.weight", POST_NORM, "hidden"),
)
SPARSE = (
    *mixtral.moe(router="mlp.router.gate.weight", norm=NORM),
    replicated("mlp.router.expert_bias", "mlp.expert_bias", "experts", keep_dtype="fp32"),
    *mixtral.shared(),
    replicated("mlp.post_layernorm.weight", POST_NORM, "hidden"),
)
RULES = llama.decoder(
    llama.ATTENTION[0],
    GATED_ATTENTION,
    llama.ATTENTION[2],
    *qwen3.NORMS,
    gemma2.POST_NORMS[0],
    *mixtral.mixed(DENSE, SPARSE),
)

TYPES = one_full_in(4, name="global_attn_every_n_layers")


def _full(config: Config) -> list[bool]:
    return [kind == FULL for kind in layer_types(config, TYPES)]


def _read_multiplier(config: Config) -> dict[str, Any]:
    return {"mup_embedding_mult": count(config, "hidden_size") ** 0.5 if config.get("mup_enabled") else 1.0}


def _write_multiplier(config: Config) -> dict[str, Any]:
    multiplier = config.get("mup_embedding_mult", 1.0)
    if multiplier not in (1.0, count(config, "hidden_size") ** 0.5):
        raise UserError(f"`mup_embedding_mult` is `{format_untrusted(multiplier)}`, neither 1 nor √`hidden_size`")
    return {"mup_enabled": multiplier != 1.0}


CONFIG = (
    *sizes(head_dim_default=128, positions_default=16384),
    *dropouts(),
    *rms_norm(default=1e-5),
    *mixtral.GATED,
    *llama.NO_BIAS,
    only(attention_bias=False),
    fixed(add_qkv_bias=False, qk_layernorm=True, post_layernorms=True, attention_output_gate=True),
    rope("default", "yarn"),
    window_pattern(TYPES, default=1024),
    no_rope(_full),
    *multipliers(embedding=Field(_read_multiplier, _write_multiplier)),
    *routed(experts="num_experts", topk="num_experts_per_tok", ffn="moe_intermediate_size"),
    dense_first(1, name="num_dense_layers"),
    *shared_multiple(2, name="num_shared_experts"),
    *sigmoid_scores(scale=1.0, name="route_scale"),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_shared_experts": 1,
    "num_dense_layers": 1, "route_scale": 2.5, "sliding_window": 8, "mup_enabled": True,
}  # fmt: skip
PROVIDER = ("post_layernorms",)
