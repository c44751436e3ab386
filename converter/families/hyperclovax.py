"""HyperCLOVA X SEED: Granite with norms after both branches."""

from converter.config import Config, count, field, switches, value
from converter.config_parts import multipliers
from converter.families import granite, llama
from converter.model import Model
from converter.rules import Indices, replicated

MODELS = "HyperCLOVA X SEED Think, text"
ARCHITECTURE = "HyperCLOVAXForCausalLM"


def _normed(model: Model, _indices: Indices) -> bool:
    return model.post_norms


POST = (
    replicated("self_attention.linear_proj.post_layernorm.weight", "post_norm1.weight", "hidden", when=_normed),
    replicated("mlp.linear_fc2.post_layernorm.weight", "post_norm2.weight", "hidden", when=_normed),
)

RULES = llama.decoder(*llama.LAYER, *POST)


def _by_head(config: Config) -> float:
    size = config.get("head_dim") or count(config, "hidden_size") // count(config, "num_attention_heads")
    return size**-0.5


CONFIG = (
    *granite.CONFIG,
    *multipliers(logits=field("mup_output_mult", "logits_scaling", default=value(1.0))),
    field("softmax_scale", "attention_multiplier", default=_by_head, null=_by_head),
    field("post_layernorms", "use_post_norm", default=value(True)),
    switches(post_norms="post_layernorms"),
)
EXTRAS = llama.EXTRAS
SMALL = {**granite.SMALL, "logits_scaling": 4.0}
PROVIDER = (*granite.PROVIDER, "post_layernorms")
