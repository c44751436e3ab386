"""Kimi K2: DeepSeek-V3 under a `model_type` of its own, with code of the repository's own."""

from converter.families import deepseek_v3

MODELS = "Kimi K2"
ARCHITECTURE = deepseek_v3.ARCHITECTURE

RULES = deepseek_v3.RULES
CONFIG = deepseek_v3.CONFIG
EXTRAS = deepseek_v3.EXTRAS
SMALL = {**deepseek_v3.SMALL, "n_group": 1, "topk_group": 1}
PROVIDER = deepseek_v3.PROVIDER[:1]
