"""MiMo 7B (remote code): Qwen2, and layers of multi-token prediction that pass through untouched: they are not trained."""

from converter.families import llama, qwen2

MODELS = "MiMo 7B (remote code), without training its layers of multi-token prediction"
ARCHITECTURE = "MiMoForCausalLM"

RULES = qwen2.RULES
CONFIG = qwen2.CONFIG
EXTRAS = llama.EXTRAS
PASSTHROUGH_PREFIXES = ("model.mtp_layers.",)
SMALL = {"num_nextn_predict_layers": 1}
