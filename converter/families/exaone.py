"""EXAONE 3, 3.5 and Deep: Llama under GPT-2's names."""

from converter.config import flag
from converter.config_layers import no_window
from converter.config_nested import renamed
from converter.config_parts import dropouts, mlp, rms_norm, sizes
from converter.config_rope import rope
from converter.families import llama
from converter.rules import templates

MODELS = "EXAONE 3.0, 3.5 and Deep"
ARCHITECTURE = "ExaoneForCausalLM"

_NAMES = {
    "model.embed_tokens.": "transformer.wte.", "model.norm.": "transformer.ln_f.", "model.layers.": "transformer.h.",
    ".input_layernorm.": ".ln_1.", ".post_attention_layernorm.": ".ln_2.", ".self_attn.": ".attn.attention.",
    ".o_proj.": ".out_proj.", "{gate,up}_proj.": "{c_fc_0,c_fc_1}.", ".down_proj.": ".c_proj.",
}  # fmt: skip


def _name(llamas: str) -> str:
    for one, other in _NAMES.items():
        llamas = llamas.replace(one, other)
    return llamas


RULES = templates(llama.RULES, _name)
FIELDS = (
    *sizes(groups_default=8, positions_default=4096),
    *dropouts(embedding="embed_dropout"),
    *rms_norm(default=1e-5),
    *mlp("silu", gated=True),
    llama.PLAIN_ATTENTION,
    flag("add_bias_linear", "attention_bias", "mlp_bias"),
    rope("default", "linear", "llama3", "yarn", theta=5e5),
    no_window("window_size"),
)
CONFIG = (renamed(FIELDS, num_layers="num_hidden_layers", layer_norm_epsilon="rms_norm_eps", activation_function="hidden_act"),)
EXTRAS = ("transformer.h.{layer}.attn.attention.rotary.inv_freq",)
