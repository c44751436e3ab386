"""Sarvam 105B: DeepSeek-V3's model with queries from all channels, and other names and defaults in `config.json`."""

from converter.config import field, value
from converter.config_latent import latent, latent_rope
from converter.config_nested import renamed
from converter.config_parts import sizes
from converter.config_router import best_groups, dense_first, shared_multiple, sigmoid_scores
from converter.families import deepseek_v3

MODELS = "Sarvam 105B"
ARCHITECTURE = "SarvamMLAForCausalLM"

RULES = deepseek_v3.RULES
CONFIG = (
    renamed(
        (
            *sizes(head_dim="", positions_default=4096),
            field("init_method_std", "initializer_range", default=value(0.006)),
            *deepseek_v3.SIZES,
            *latent(q_lora=None, kv_lora=512, plain=128, turned=64),
            latent_rope("default", "yarn"),
            dense_first(1),
            *sigmoid_scores(scale=2.5),
            best_groups(1, 1, best=2),
            *shared_multiple(1),
            *deepseek_v3.CHOICE,
        ),
        num_experts="n_routed_experts",
        num_shared_experts="n_shared_experts",
        num_mtp_layers="num_nextn_predict_layers",
    ),
)
EXTRAS = deepseek_v3.EXTRAS
SMALL = {**deepseek_v3.SMALL, "q_lora_rank": None, "n_group": 1, "topk_group": 1}
PROVIDER = deepseek_v3.PROVIDER
