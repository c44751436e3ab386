"""Gemma 3 from 4B: the language model of `gemma3_text`, beside a vision tower that passes through."""

from converter.config_nested import text_config
from converter.families import gemma3_text, mistral3

MODELS = "Gemma 3 4B, 12B and 27B"
ARCHITECTURE = "Gemma3ForConditionalGeneration"

RULES = gemma3_text.RULES
DEFAULTS = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256,
}  # fmt: skip
"""What Gemma 3 4B's `config.json` does not say."""

CONFIG = (text_config({"gemma3_text": gemma3_text.CONFIG}, DEFAULTS),)
EXTRAS = gemma3_text.EXTRAS
ROOTS = mistral3.ROOTS
MODULE_ROOT = mistral3.MODULE_ROOT
PASSTHROUGH_PREFIXES = mistral3.PASSTHROUGH_PREFIXES
SMALL = {
    "mm_tokens_per_image": 4,
    "text_config": {"model_type": "gemma3_text", **gemma3_text.SMALL},
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "patch_size": 4, "image_size": 16, "vision_use_head": False,
    },
}  # fmt: skip
PROVIDER = gemma3_text.PROVIDER
