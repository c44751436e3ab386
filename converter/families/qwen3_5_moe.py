"""Qwen3.5 with experts: the language model of `qwen3_5_moe_text`, beside a vision tower that passes through."""

from converter.config_nested import text_config
from converter.families import qwen3_5, qwen3_5_moe_text

MODELS = "Qwen3.5 35B-A3B, 122B-A10B, 397B-A17B"
ARCHITECTURE = "Qwen3_5MoeForConditionalGeneration"

RULES = qwen3_5_moe_text.RULES
CONFIG = (text_config({"qwen3_5_moe_text": qwen3_5_moe_text.CONFIG}),)
EXTRAS = qwen3_5_moe_text.EXTRAS
ROOTS = qwen3_5.ROOTS
MODULE_ROOT = qwen3_5.MODULE_ROOT
PASSTHROUGH_PREFIXES = qwen3_5.PASSTHROUGH_PREFIXES
STACKED = qwen3_5_moe_text.STACKED
SMALL = {"text_config": {"model_type": "qwen3_5_moe_text", **qwen3_5_moe_text.SMALL}, "vision_config": qwen3_5.VISION}
