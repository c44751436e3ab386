"""GLM-4.7-Flash: DeepSeek-V3's layers in other sizes."""

from converter.config_latent import latent, latent_rope
from converter.config_parts import dimension, rms_norm, sizes
from converter.config_router import best_groups, kinds_of_layers, shared_multiple, sigmoid_scores
from converter.families import deepseek_v3

MODELS = "GLM-4.7-Flash"
ARCHITECTURE = "Glm4MoeLiteForCausalLM"

RULES = deepseek_v3.RULES
CONFIG = (
    *sizes(head_dim="", positions_default=202752),
    *deepseek_v3.SIZES,
    *rms_norm(default=1e-5),
    *dimension("value", "v_head_dim", default=256),
    *latent(q_lora=768, kv_lora=512, plain=192, turned=64),
    latent_rope("default", "yarn"),
    kinds_of_layers(1),
    *sigmoid_scores(scale=1.8),
    best_groups(1, 1, best=2),
    *shared_multiple(1),
    *deepseek_v3.CHOICE,
)
EXTRAS = deepseek_v3.EXTRAS
SMALL = {
    **{name: value for name, value in deepseek_v3.SMALL.items() if name not in ("first_k_dense_replace", "rope_parameters")},
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8,
}  # fmt: skip
PROVIDER = deepseek_v3.PROVIDER[:1]
