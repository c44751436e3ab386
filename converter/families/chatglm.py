"""ChatGLM 2 and 3, GLM-4 (remote code): the arithmetic of `glm`, under names and settings of their own.

Names are those of `modeling_chatglm.py` in the published repositories. ChatGLM 1 is another model.
"""

from typing import Any

from converter.config import Config, Field, agreeing, count, field, fixed, flag, number, value
from converter.config_layers import no_window
from converter.config_parts import dropouts, rms_norm, sizes
from converter.families import llama
from converter.model import Model
from converter.rules import Indices, gated_mlp, qkv, replicated, row_parallel, under, vocab_parallel, with_bias
from formats.errors import UserError

MODELS = "ChatGLM2, ChatGLM3, GLM-4 (remote code)"
ARCHITECTURE = "ChatGLMModel"


def _biased(model: Model, _indices: Indices) -> bool:
    return model.add_qkv_bias


EMBEDDING = vocab_parallel("embedding.word_embeddings.weight", "transformer.embedding.word_embeddings.weight", "hidden")
LAYER = (
    llama.ATTENTION[0],
    *with_bias(qkv("self_attention.linear_qkv.weight", "self_attention.query_key_value.weight", "hidden"), when=_biased),
    row_parallel("self_attention.linear_proj.weight", "self_attention.dense.weight", "hidden", "queries"),
    llama.MLP[0],
    gated_mlp("mlp.linear_fc1.weight", "mlp.dense_h_to_4h.weight", "ffn", "hidden"),
    row_parallel("mlp.linear_fc2.weight", "mlp.dense_4h_to_h.weight", "hidden", "ffn"),
)
RULES = (
    EMBEDDING,
    *under("decoder.layers.{layer}", "transformer.encoder.layers.{layer}", LAYER),
    replicated("decoder.final_layernorm.weight", "transformer.encoder.final_layernorm.weight", "hidden"),
    vocab_parallel(
        "output_layer.weight", "transformer.output_layer.weight", "hidden", when=llama.untied, tied_to=EMBEDDING.huggingface
    ),
)

_ALWAYS = {
    "rmsnorm": True, "apply_residual_connection_post_layernorm": False, "post_layer_norm": True, "add_bias_linear": False,
    "original_rope": True,
}  # fmt: skip
"""What the published models have, with the values that they have."""


def _groups(config: Config) -> dict[str, Any]:
    shared = config.get("multi_query_attention", False)
    return {"num_query_groups": count(config, "multi_query_group_num" if shared else "num_attention_heads")}


def _written_groups(config: Config) -> dict[str, Any]:
    return {"multi_query_attention": True, "multi_query_group_num": count(config, "num_query_groups")}


def _is_glm4(config: Config) -> bool:
    """GLM-4 has a larger vocabulary than ChatGLM 2 and 3."""
    return count(config, "padded_vocab_size") > 65024


def _rope(config: Config) -> dict[str, Any]:
    ratio = number("rope_ratio", config.get("rope_ratio", 1))
    known = ratio == 1 or _is_glm4(config)
    return {"rotary_base": 10000.0 * ratio if known else 10000.0, "rope_ratio": None if known else ratio}


def _written_rope(config: Config) -> dict[str, Any]:
    if config.get("rope_ratio") is not None:
        return {"rope_ratio": number("rope_ratio", config["rope_ratio"])}
    ratio = number("rotary_base", config.get("rotary_base", 10000.0)) / 10000.0
    if ratio != 1 and not _is_glm4({"padded_vocab_size": config.get("vocab_size")}):
        raise UserError("`rotary_base` is not 10000, and the vocabulary is ChatGLM 2's or 3's")
    return {"rope_ratio": ratio}


CONFIG = (
    *sizes(layers="num_layers", groups="", head_dim="kv_channels", ffn="ffn_hidden_size", positions="seq_length",
           vocab="padded_vocab_size"),
    field("kv_channels", "kv_channels", default=value(128)),
    Field(lambda config: agreeing(config, _ALWAYS), lambda _config: dict(_ALWAYS)),
    Field(_groups, _written_groups, lambda sizes: {"groups": sizes.megatron["num_query_groups"]}),
    *dropouts(hidden="hidden_dropout"),
    *rms_norm("layernorm_epsilon", default=1e-5),
    fixed(activation_func="silu", gated_linear_unit=True, num_moe_experts=None),
    fixed(add_bias_linear=False, qk_layernorm=False, rotary_interleaved=True, rotary_percent=0.5),
    flag("add_qkv_bias", "add_qkv_bias"),
    fixed(position_embedding_type="rope", rope_scaling=False),
    Field(_rope, _written_rope),
    no_window("window_size"),
)  # fmt: skip
EXTRAS = ("transformer.rotary_pos_emb.inv_freq",)
SMALL = {
    "vocab_size": None, "num_layers": 4, "ffn_hidden_size": 96, "padded_vocab_size": 384, "kv_channels": 16, "seq_length": 256,
    "multi_query_attention": True, "multi_query_group_num": 4, "add_qkv_bias": True, "layernorm_epsilon": 1e-5,
}  # fmt: skip
