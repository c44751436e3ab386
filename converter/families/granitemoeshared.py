"""Granite with experts, and one more that every token goes through."""

from dataclasses import replace
from typing import Any

from converter.config import Config, Field, count
from converter.families import granitemoe, llama, mixtral
from converter.model import Model
from converter.rules import Indices

MODELS = "Granite MoE with shared experts"
ARCHITECTURE = "GraniteMoeSharedForCausalLM"

_NAME, _MEGATRON = "shared_intermediate_size", "moe_shared_expert_intermediate_size"


def _has_shared(model: Model, _indices: Indices) -> bool:
    return model.shared_ffn > 0


SHARED = mixtral.shared("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight")
RULES = llama.decoder(*llama.ATTENTION, *granitemoe.EXPERTS, *(replace(rule, when=_has_shared) for rule in SHARED))


def _read(config: Config) -> dict[str, Any]:
    return {_MEGATRON: count(config, _NAME) if config.get(_NAME) else None}


def _write(config: Config) -> dict[str, Any]:
    return {_NAME: count(config, _MEGATRON) if config.get(_MEGATRON) else 0}


CONFIG = (
    *granitemoe.CONFIG,
    Field(_read, _write, lambda sizes: {"shared_ffn": sizes.megatron[_MEGATRON] or 0}),
)
EXTRAS = llama.EXTRAS
SMALL = {**granitemoe.SMALL, "shared_intermediate_size": 80}
PROVIDER = granitemoe.PROVIDER
