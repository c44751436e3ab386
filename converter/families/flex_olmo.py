"""FlexOlmo: OLMo 2 with a mixture of experts in each layer."""

from converter.config import fixed
from converter.config_parts import rms_norm
from converter.config_rope import rope
from converter.families import llama, mixtral, olmo2, olmoe
from converter.rules import replicated

MODELS = "FlexOlmo 7x7B"
ARCHITECTURE = "FlexOlmoForCausalLM"

POST_NORM = replicated("mlp.post_layernorm.weight", "post_feedforward_layernorm.weight", "hidden")
RULES = llama.decoder(*llama.ATTENTION[1:], *olmo2.NORMS[:3], *mixtral.moe()[1:], POST_NORM)
CONFIG = (
    *olmoe.SIZES,
    *rms_norm(),
    rope("default", theta=500000.0),
    fixed(pre_layernorms=False, post_layernorms=True),
)
EXTRAS = llama.EXTRAS
SMALL = olmoe.SMALL
PROVIDER = ("pre_layernorms", "post_layernorms", "qk_layernorm_scope")
