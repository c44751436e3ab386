"""Read what a checkpoint's own files say of its model, those of NeMo among them.

NeMo 2 writes its model's configuration in `context/model.yaml`, with the fields of TransformerConfig and GPTModel as
Megatron-Bridge has them. NeMo 1 has words of its own in `model_config.yaml`: NeMo 1.23's
`nemo/collections/nlp/models/language_modeling/megatron_gpt_model.py` and `megatron_base_model.py` say which fields they set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from converter import run_config
from converter.config import Config
from converter.consistency import embedding_rows
from converter.run_config import ModelSettings
from formats.megatron_reader import MegatronReader

_SAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "num_query_groups",
    "init_method_std", "layernorm_epsilon", "position_embedding_type", "rotary_base", "seq_len_interpolation_factor",
    "share_embeddings_and_output_weights", "attention_dropout", "qk_layernorm", "window_size",
    "make_vocab_size_divisible_by", "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size", "expert_model_parallel_size",
)  # fmt: skip
"""Fields that have the same name and meaning in NeMo 1 and in Megatron."""

_OTHER = {
    "max_position_embeddings": "seq_length", "rotary_percentage": "rotary_percent", "bias": "add_bias_linear",
    "qkv_bias": "add_qkv_bias", "num_moe_experts": "num_moe_experts", "moe_router_topk": "moe_router_topk",
}  # fmt: skip

_DEFAULTS = {
    "position_embedding_type": "learned_absolute", "rotary_base": 10000, "rotary_percent": 1.0, "layernorm_epsilon": 1e-5,
    "share_embeddings_and_output_weights": True, "add_bias_linear": True, "add_qkv_bias": False, "qk_layernorm": False,
}  # fmt: skip
"""What NeMo 1 takes for a field that the file does not have."""

_ACTIVATIONS = {
    "swiglu": ("silu", True), "fast-swiglu": ("silu", True), "gelu": ("gelu", False),
    "squared-relu": ("squared_relu", False), "fast-geglu": ("fast_gelu", True),
}  # fmt: skip
"""Megatron's function, and whether it is gated."""

_NORMS = {
    "rmsnorm": {"normalization": "RMSNorm"}, "layernorm": {"normalization": "LayerNorm"},
    "layernorm1p": {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True},
}  # fmt: skip

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "transformer_block_type": ("pre_ln",), "headscale": (False,), "normalize_attention_scores": (True,),
    "scale_positional_embedding": (False,), "embedding_scale": (), "apply_embedding_scaling": (False,), "openai_gelu": (False,),
    "onnx_safe": (False,), "multi_query_attention": (False,), "use_emha": (False,), "mcore_gpt": (True,),
}  # fmt: skip
"""What NeMo 1 calls further settings that change what a model computes, and the values that do not."""


def settings_of(reader: MegatronReader) -> list[ModelSettings]:
    """Return the recorded settings of a checkpoint's model, by precedence: `run_config.yaml`, Megatron-LM's `args`, NeMo's.

    Raises UserError for a file that is not readable.
    """
    return [*run_config.read_all(reader.folder, reader.args()), *_of_nemo(reader)]


def _of_nemo(reader: MegatronReader) -> list[ModelSettings]:
    if reader.settings is None:
        return []
    document: Any = run_config.document(reader.settings.get(), source=reader.settings.name)
    fields = cast("dict[Any, Any]", document) if isinstance(document, dict) else {}
    inner = fields.get("config")
    section = cast("dict[Any, Any]", inner) if isinstance(inner, dict) else fields
    known = {name: value for name, value in section.items() if isinstance(name, str)}
    if not all(isinstance(known.get(name), int) for name in ("num_layers", "hidden_size", "num_attention_heads")):
        return []
    origin = f"`{reader.settings.name}`"
    if section is fields:
        rows = embedding_rows(reader.specs)  # NeMo 1 takes the size from the tokenizer
        return [_of_nemo_1({**known, "padded_vocab_size": rows}, origin)]
    return [ModelSettings(run_config.model_fields(known), known, origin)]


def _of_nemo_1(section: Config, origin: str) -> ModelSettings:
    """Translate NeMo 1's words. Those that are not known here stay as they are, so that no family is found for them."""
    activation, norm = section.get("activation", "gelu"), section.get("normalization", "layernorm")
    function, gated = _ACTIVATIONS.get(str(activation), (activation, False))
    fields = {
        **_DEFAULTS,
        **{name: section[name] for name in _SAME if section.get(name) is not None},
        **{ours: section[theirs] for theirs, ours in _OTHER.items() if section.get(theirs) is not None},
        **_NORMS.get(str(norm), {"normalization": norm}),
        "activation_func": function,
        "gated_linear_unit": gated,
    }
    settings = {name: section[name] for name in _NEUTRAL if section.get(name) is not None}
    others = {name: value or str(value) for name, value in settings.items() if value not in _NEUTRAL[name]}
    return ModelSettings(fields, {**fields, **others, "padded_vocab_size": section["padded_vocab_size"]}, origin)
