"""Youtu-LLM: multi-head latent attention, whose queries, keys and values are projected from a few channels, and Llama's MLP."""

from converter.config import Config, field
from converter.config_latent import latent, latent_rope
from converter.config_parts import dimension, dropouts, mlp, only, rms_norm, sizes, trained_with
from converter.families import deepseek_v3, llama

MODELS = "Youtu-LLM 2B"
ARCHITECTURE = "YoutuForCausalLM"


RULES = llama.decoder(*deepseek_v3.ATTENTION, *llama.MLP)


def _std(config: Config) -> float:
    return 2 / (5 * config["hidden_size"]) ** 0.5


CONFIG = (
    *sizes(head_dim="", positions_default=131072, tied=True),
    field("init_method_std", "initializer_range", default=_std, null=_std),
    *dropouts(),
    *rms_norm(),
    *mlp("silu", gated=True),
    *dimension("value", "v_head_dim", default=128),
    *latent(q_lora=1536, kv_lora=512, plain=128, turned=64),
    *llama.NO_BIAS,
    latent_rope("default", "yarn"),
    only(attention_bias=False),
    trained_with(rope_interleave=True),
)
SMALL = {
    "num_key_value_heads": 8, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "pad_token_id": None,
}  # fmt: skip
PROVIDER = ("latent_layernorm_epsilon",)
