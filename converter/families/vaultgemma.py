"""VaultGemma: Gemma 2 without the norms after each branch."""

from converter.config import fixed
from converter.config_layers import one_full_in, window_pattern
from converter.config_rope import rope
from converter.families import gemma2, llama

MODELS = "VaultGemma"
ARCHITECTURE = "VaultGemmaForCausalLM"

RULES = llama.decoder(*llama.ATTENTION, gemma2.MLP_NORM, *llama.MLP[1:])
CONFIG = (
    *gemma2.SIZES,
    *gemma2.CAPS,
    llama.PLAIN_ATTENTION,
    fixed(post_layernorms=False),
    rope("default"),
    window_pattern(one_full_in(2), default=4096),
)
EXTRAS = llama.EXTRAS
SMALL = gemma2.SMALL
PROVIDER = ("attn_logit_softcapping", "final_logit_softcapping")
