"""Mistral 3: the language model of Mistral or Ministral 3, beside a vision tower that passes through."""

from converter.config_nested import text_config
from converter.families import llama, ministral3, mistral

MODELS = "Mistral Small 3.1 and 3.2, Ministral 3"
ARCHITECTURE = "Mistral3ForConditionalGeneration"

RULES = llama.RULES
CONFIG = (text_config({"mistral": mistral.CONFIG, "ministral3": ministral3.CONFIG}),)
EXTRAS = llama.EXTRAS
ROOTS = ("model.", "language_model.model.", "model.language_model.")
MODULE_ROOT = ROOTS[2]
PASSTHROUGH_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
SMALL = {
    "tie_word_embeddings": False,
    "text_config": {"model_type": "ministral3", **ministral3.SMALL},
    "vision_config": {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "head_dim": 16, "patch_size": 4, "image_size": 16,
    },
}  # fmt: skip
PROVIDER = ministral3.PROVIDER
