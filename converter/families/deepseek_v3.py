"""DeepSeek-V3: latent attention, experts chosen by sigmoids and a bias, and layers that predict further tokens (MTP)."""

from collections.abc import Iterator
from dataclasses import replace

from converter.config import named
from converter.config_latent import latent, latent_rope
from converter.config_parts import dimension, dropouts, not_computed, only, rms_norm, routed, sizes, trained_with
from converter.config_router import best_groups, dense_first, prediction_layers, shared_multiple, sigmoid_scores
from converter.families import llama, mixtral
from converter.model import Model
from converter.rules import Indices, Rule, column_parallel, copy_of, replicated, row_parallel, under

MODELS = "DeepSeek-V3, R1, V3.1, Moonlight"
ARCHITECTURE = "DeepseekV3ForCausalLM"


def from_few(model: Model, _indices: Indices) -> bool:
    """Return whether queries are projected from a few channels."""
    return model.q_lora is not None


def from_all(model: Model, _indices: Indices) -> bool:
    """Return whether queries are projected from all channels."""
    return model.q_lora is None


def _latent(name: str, rows: str, rank: str, down: str, down_rows: str) -> Iterator[Rule]:
    """Yield the rules of queries, or of keys and values: a projection to few channels, a norm, and a projection from them."""
    up = f"self_attention.linear_{name}_up_proj"
    yield replicated(f"self_attention.linear_{name}_down_proj.weight", f"self_attn.{down}.weight", down_rows, "hidden")
    alias = f"self_attention.{name}_layernorm.weight"
    yield replicated(f"{up}.layer_norm_weight", f"self_attn.{name}_a_layernorm.weight", rank, alias=alias)
    yield column_parallel(f"{up}.weight", f"self_attn.{name}_b_proj.weight", rows, rank)


ATTENTION = (
    replicated("input_layernorm.weight", "input_layernorm.weight", "hidden"),
    column_parallel("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight", "queries", "hidden", when=from_all),
    *(replace(rule, when=from_few) for rule in _latent("q", "queries", "q_lora", "q_a_proj", "q_lora")),
    *_latent("kv", "keys_values", "kv_lora", "kv_a_proj_with_mqa", "kv_down"),
    row_parallel("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden", "values"),
)
BIAS = replicated("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", "experts", keep_dtype="fp32")
SPARSE = (*mixtral.moe(), BIAS, *mixtral.shared())


def prediction(*layer: Rule) -> tuple[Rule, ...]:
    """Return the rules of layers of multi-token prediction: a layer of these, and what is around it. Hugging Face numbers them on
    from the model's layers, and its files may repeat the embedding and the output layer in each."""
    around = (
        replicated("enorm.weight", "enorm.weight", "hidden"),
        replicated("hnorm.weight", "hnorm.weight", "hidden"),
        column_parallel("eh_proj.weight", "eh_proj.weight", "hidden", "both"),
        replicated("final_layernorm.weight", "shared_head.norm.weight", "hidden"),
    )
    return (
        *under("mtp.layers.{mtp}", "model.layers.{after}", around),
        *under("mtp.layers.{mtp}.transformer_layer", "model.layers.{after}", layer),
        copy_of("model.layers.{after}.embed_tokens.weight", tied_to="model.embed_tokens.weight"),
        copy_of("model.layers.{after}.shared_head.head.weight", tied_to="lm_head.weight"),
    )


RULES = (*llama.decoder(*ATTENTION, *mixtral.mixed(llama.MLP, SPARSE)), *prediction(*ATTENTION, *SPARSE))

SIZES = (
    *dropouts(),
    *rms_norm(),
    *mixtral.GATED,
    *llama.NO_BIAS,
    *dimension("value", "v_head_dim", default=128),
    *routed(experts="n_routed_experts", topk="num_experts_per_tok", ffn="moe_intermediate_size"),
    only(attention_bias=False, mlp_bias=False, moe_layer_freq=1),
    named(both=lambda model: 2 * model.hidden),
)
CHOICE = (
    prediction_layers(),
    not_computed("norm_topk_prob", off=True),
    only(topk_method="noaux_tc"),
    trained_with(rope_interleave=True, scoring_func="sigmoid"),
)
CONFIG = (
    *sizes(head_dim="", positions_default=4096),
    *SIZES,
    *latent(q_lora=1536, kv_lora=512, plain=128, turned=64),
    latent_rope("default", "yarn"),
    dense_first(3),
    *sigmoid_scores(scale=2.5),
    best_groups(8, 4, best=2),
    *shared_multiple(1),
    *CHOICE,
)
EXTRAS = llama.EXTRAS
SMALL = {
    "num_key_value_heads": 8, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "n_shared_experts": 2,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 16, "beta_fast": 32,
        "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 1.0,
    },
}  # fmt: skip
PROVIDER = ("latent_layernorm_epsilon", "moe_router_group_score")
