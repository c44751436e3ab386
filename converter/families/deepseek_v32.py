"""DeepSeek-V3.2: DeepSeek-V3, whose tokens attend to a few tokens before them that an indexer chooses (DSA)."""

from dataclasses import replace

from converter.config_latent import indexer, latent, latent_rope
from converter.config_parts import sizes
from converter.config_router import best_groups, kinds_of_layers, shared_multiple, sigmoid_scores
from converter.families import deepseek_v3, llama, mixtral
from converter.rules import replicated, under

MODELS = "DeepSeek-V3.2, V3.2-Exp"
ARCHITECTURE = "DeepseekV32ForCausalLM"

LATENT = tuple(replace(rule, megatron=rule.alias, alias="") if rule.alias else rule for rule in deepseek_v3.ATTENTION)
"""The norms between two projections are not in the second one here, since the indexer reads what the first one gives."""

INDEXER = tuple(
    under("self_attention.core_attention.indexer", "self_attn.indexer", (
        replicated("linear_wq_b.weight", "wq_b.weight", "index_queries", "q_lora"),
        replicated("linear_wk.weight", "wk.weight", "index_dim", "hidden"),
        replicated("k_norm.weight", "k_norm.weight", "index_dim"),
        replicated("k_norm.bias", "k_norm.bias", "index_dim"),
        replicated("linear_weights_proj.weight", "weights_proj.weight", "index_heads", "hidden"),
    ))
)  # fmt: skip
RULES = (
    *llama.decoder(*LATENT, *INDEXER, *mixtral.mixed(llama.MLP, deepseek_v3.SPARSE)),
    *deepseek_v3.prediction(*LATENT, *INDEXER, *deepseek_v3.SPARSE),
)
CONFIG = (
    *sizes(head_dim="", positions_default=163840),
    *deepseek_v3.SIZES,
    *latent(q_lora=1536, kv_lora=512, plain=128, turned=64),
    latent_rope("default", "yarn"),
    *indexer(heads=64, interleaved=False),
    kinds_of_layers(3),
    *sigmoid_scores(scale=2.5),
    best_groups(8, 4, best=2),
    *shared_multiple(1),
    *deepseek_v3.CHOICE,
)
EXTRAS = deepseek_v3.EXTRAS
SMALL = {**deepseek_v3.SMALL, "index_topk": 5, "index_head_dim": 16, "index_n_heads": 16}
PROVIDER = deepseek_v3.PROVIDER
