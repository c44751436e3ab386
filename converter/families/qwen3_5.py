"""Qwen3.5: the language model of `qwen3_5_text`, beside a vision tower that passes through."""

from converter.config_nested import text_config
from converter.families import qwen3_5_text

MODELS = "Qwen3.5 0.8B to 27B"
ARCHITECTURE = "Qwen3_5ForConditionalGeneration"

RULES = qwen3_5_text.RULES
CONFIG = (text_config({"qwen3_5_text": qwen3_5_text.CONFIG}),)
EXTRAS = qwen3_5_text.EXTRAS
ROOTS = ("model.", "model.language_model.", "language_model.")
MODULE_ROOT = ROOTS[1]
PASSTHROUGH_PREFIXES = ("model.visual.", "visual.")
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64,
    "num_position_embeddings": 16,
}  # fmt: skip
SMALL = {"text_config": {"model_type": "qwen3_5_text", **qwen3_5_text.SMALL}, "vision_config": VISION}
