"""Hunyuan 3: Qwen3's attention, and experts chosen by sigmoids and a bias. Its layer of multi-token prediction passes through."""

from dataclasses import replace

from converter.config import field, fixed, value
from converter.config_layers import no_window
from converter.config_parts import dropouts, only, rms_norm, routed, sizes
from converter.config_rope import rope
from converter.config_router import kinds_of_layers, shared_multiple, sigmoid_scores
from converter.families import deepseek_v3, llama, mixtral, qwen3

MODELS = "Hunyuan 3 (Hy3)"
ARCHITECTURE = "HYV3ForCausalLM"

SHARED = mixtral.shared("mlp.shared_mlp.{gate,up}_proj.weight", "mlp.shared_mlp.down_proj.weight")
BIAS = replace(deepseek_v3.BIAS, huggingface="mlp.expert_bias")
RULES = llama.decoder(
    *llama.ATTENTION, *qwen3.NORMS, *mixtral.mixed(llama.MLP, (*mixtral.moe(router="mlp.router.gate.weight"), BIAS, *SHARED))
)
CONFIG = (
    *sizes(positions_default=131072),
    field("num_query_groups", "num_key_value_heads", default=value(8)),
    field("kv_channels", "head_dim", default=value(128)),
    field("init_method_std", "initializer_range", default=value(0.006)),
    *rms_norm(default=1e-5),
    *dropouts(),
    *mixtral.GATED,
    *llama.NO_BIAS,
    fixed(add_qkv_bias=False, qk_layernorm=True),
    only(attention_bias=False, mlp_bias=False),
    rope("default", "yarn", theta=11158840.0),
    no_window("window_size"),
    *routed(experts="num_experts", topk="num_experts_per_tok", ffn="moe_intermediate_size"),
    kinds_of_layers(1),
    *sigmoid_scores(scale=2.826, name="router_scaling_factor"),
    *shared_multiple(1, name="num_shared_experts"),
)
EXTRAS = llama.EXTRAS
PASSTHROUGH_PREFIXES = ("model.layers.80.",)
SMALL = {
    "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "num_shared_experts": 2,
    "router_scaling_factor": 2.5,
}  # fmt: skip
