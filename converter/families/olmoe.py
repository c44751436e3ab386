"""OLMoE: norms over all heads of queries and of keys together, and a mixture of experts in each layer."""

from converter.config import fixed, optional
from converter.config_experts import SOFTMAX, auxiliary_loss
from converter.config_layers import no_window
from converter.config_parts import dropouts, only, rms_norm, routed, sizes
from converter.config_rope import rope
from converter.families import llama, mixtral, olmo2

MODELS = "OLMoE 1B-7B"
ARCHITECTURE = "OlmoeForCausalLM"

RULES = llama.decoder(*llama.ATTENTION, *olmo2.NORMS[:2], *mixtral.moe())
SIZES = (
    *sizes(head_dim="", positions_default=4096),
    *dropouts(),
    *mixtral.GATED,
    *llama.NO_BIAS,
    only(attention_bias=False),
    fixed(add_qkv_bias=False, qk_layernorm=True, qk_layernorm_scope="all_heads"),
    *routed(
        experts="num_experts", topk="num_experts_per_tok", ffn="intermediate_size", renormalized="norm_topk_prob", absent=False
    ),
    SOFTMAX,
    auxiliary_loss(0.01),
    no_window("window_size"),
)
CONFIG = (*SIZES, *rms_norm(default=1e-5), rope("default"), optional("clip_qkv", "clip_qkv"))
EXTRAS = llama.EXTRAS
SMALL = {"num_experts": 4, "num_experts_per_tok": 2}
PROVIDER = ("qk_layernorm_scope", "clip_qkv")
