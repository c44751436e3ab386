"""Granite 3: Llama's weights; embeddings, scores, what each branch adds, and logits are multiplied by fixed numbers."""

from converter.config import derived, field, value
from converter.config_parts import multipliers
from converter.families import llama

MODELS = "Granite 3 and 3.1 to 3.3, Granite Code 3B and 8B, dense"
ARCHITECTURE = "GraniteForCausalLM"

RULES = llama.RULES
MULTIPLIERS = (
    *multipliers(
        embedding=field("mup_embedding_mult", "embedding_multiplier", default=value(1.0)),
        logits=derived("mup_output_mult", "logits_scaling", lambda number: 1 / number, lambda number: 1 / number, default=1.0),
    ),
    field("residual_multiplier", "residual_multiplier", default=value(1.0)),
    field("softmax_scale", "attention_multiplier", default=value(1.0)),
)
CONFIG = (*llama.CONFIG, *MULTIPLIERS)
EXTRAS = llama.EXTRAS
SMALL = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0625, "logits_scaling": 0.25}
PROVIDER = ("residual_multiplier", *llama.PROVIDER)
