"""IQuest-Coder: Llama, with eight query groups and heads of 128 channels where `config.json` does not say otherwise."""

from converter.config import field, value
from converter.config_parts import rms_norm
from converter.families import llama

MODELS = "IQuest-Coder V1"
ARCHITECTURE = "IQuestCoderForCausalLM"

RULES = llama.RULES
CONFIG = (
    *llama.CONFIG,
    field("num_query_groups", "num_key_value_heads", default=value(8)),
    field("kv_channels", "head_dim", default=value(128)),
    field("seq_length", "max_position_embeddings", default=value(131072)),
    *rms_norm(default=1e-5),
)
EXTRAS = llama.EXTRAS
PROVIDER = llama.PROVIDER
