"""DBRX: LayerNorm without bias, query, key and value in one tensor; experts one after another along the rows of one tensor each,
the last stored transposed."""

from typing import Any

from converter.config import Config, Field, fixed, object_of, optional
from converter.config_experts import SOFTMAX, auxiliary_loss
from converter.config_layers import no_window
from converter.config_nested import flattened, renamed
from converter.config_parts import dropouts, not_computed, only, routed, sizes
from converter.config_rope import rope
from converter.families import llama, mpt
from converter.rules import gated_mlp, qkv, replicated, row_parallel, under, vocab_parallel
from formats.errors import UserError, format_untrusted

MODELS = "DBRX"
ARCHITECTURE = "DbrxForCausalLM"

EXPERT = "mlp.experts.{expert}"
LAYER = (
    *mpt.weighted("self_attention.linear_qkv.layer_norm_", "norm_attn_norm.norm_1"),
    qkv("self_attention.linear_qkv.weight", "norm_attn_norm.attn.Wqkv.weight", "hidden"),
    row_parallel("self_attention.linear_proj.weight", "norm_attn_norm.attn.out_proj.weight", "hidden", "queries"),
    *mpt.weighted("pre_mlp_layernorm.", "norm_attn_norm.norm_2"),
    replicated("mlp.router.weight", "ffn.router.layer.weight", "experts", "hidden"),
    gated_mlp(f"{EXPERT}.linear_fc1.weight", "ffn.experts.mlp.{w1,v1}", "moe_ffn", "hidden", flat=True),
    row_parallel(f"{EXPERT}.linear_fc2.weight", "ffn.experts.mlp.w2", "hidden", "moe_ffn", flat=True, transposed=True),
)
RULES = (
    vocab_parallel("embedding.word_embeddings.weight", "transformer.wte.weight", "hidden"),
    *under("decoder.layers.{layer}", "transformer.blocks.{layer}", LAYER),
    *mpt.weighted("decoder.final_layernorm.", "transformer.norm_f"),
    vocab_parallel("output_layer.weight", "lm_head.weight", "hidden"),
)


def _read_weights(config: Config) -> dict[str, Any]:
    """Weights of the chosen experts are divided by a norm of them all: by their sum, or not at all."""
    norm = config.get(_NORM, 1.0)
    return {"moe_router_pre_softmax": norm is None, "moe_normalize_expert_weights": None if norm in (None, 1) else norm}


def _write_weights(config: Config) -> dict[str, Any]:
    other = config.get("moe_normalize_expert_weights")
    return {_NORM: other or (None if config.get("moe_router_pre_softmax") else 1.0)}


def _read_activation(config: Config) -> dict[str, Any]:
    function = object_of(config, _ACTIVATION).get("name", "silu")
    if function != "silu":
        raise UserError(f"`name` in `{_ACTIVATION}` is `{format_untrusted(function)}`; only `silu` is supported for this family")
    return {}


_NORM, _ACTIVATION = "ffn_config.moe_normalize_expert_weights", "ffn_config.ffn_act_fn"
FIELDS = (
    *sizes(layers="n_layers", hidden="d_model", heads="n_heads", groups="attn_config.kv_n_heads", groups_default=1, head_dim="",
           ffn="ffn_config.ffn_hidden_size", positions="max_seq_len"),
    *dropouts(attention="attn_config.attn_pdrop", hidden="resid_pdrop", embedding="emb_pdrop"),
    fixed(normalization="LayerNorm", layernorm_epsilon=1e-5, activation_func="silu", gated_linear_unit=True),
    Field(_read_activation, lambda _config: {_ACTIVATION: {"name": "silu"}}),
    llama.PLAIN_ATTENTION,
    *llama.NO_BIAS,
    renamed((rope("default"),), **{"attn_config.rope_theta": "rope_theta"}),
    no_window("window_size"),
    optional("clip_qkv", "attn_config.clip_qkv"),
    *routed(experts="ffn_config.moe_num_experts", topk="ffn_config.moe_top_k", ffn="ffn_config.ffn_hidden_size"),
    Field(_read_weights, _write_weights),
    SOFTMAX,
    auxiliary_loss(0.01, coefficient="ffn_config.moe_loss_weight"),
    not_computed("moe_jitter_eps", huggingface="ffn_config.moe_jitter_eps"),
    only(tie_word_embeddings=False),
)  # fmt: skip
CONFIG = (flattened(("attn_config", "ffn_config"), FIELDS),)
SMALL = {
    "n_layers": 4, "d_model": 64, "n_heads": 8, "max_seq_len": 256,
    "attn_config": {"kv_n_heads": 4, "clip_qkv": 0.5, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
}  # fmt: skip
PROVIDER = ("clip_qkv",)
