"""Falcon: parallel branches of one norm (7B, 11B) or two (40B, 180B), or one after the other with ALiBi (RW)."""

from dataclasses import replace
from typing import Any

from converter.config import Config, Field, count, counts, fixed, named
from converter.config_layers import no_window
from converter.config_parts import dropouts, layer_norm, mlp, sizes
from converter.config_rope import rope
from converter.families.bloom import LAYER, fused_qkv, normed
from converter.families.llama import untied
from converter.model import Model
from converter.rules import Indices, Rule, under, vocab_parallel

MODELS = "Falcon 7B, 40B, 180B, 2 11B, RW 1B and 7B"
ARCHITECTURE = "FalconForCausalLM"


def _one(model: Model, _indices: Indices) -> bool:
    return model.branches == "one_norm"


def _two(model: Model, _indices: Indices) -> bool:
    return model.branches == "two_norms"


def _serial(model: Model, _indices: Indices) -> bool:
    return model.branches is None


def _biased(model: Model, _indices: Indices) -> bool:
    return model.biased


def _where(condition: Any, *rules: Any) -> tuple[Rule, ...]:
    """Return the rules, which apply where the condition does. Names stay as they are."""
    return tuple(replace(rule, when=condition) for rule in rules)


NORMS = (
    *_where(_one, *normed("input_layernorm.", "input_layernorm")),
    *_where(_two, *normed("self_attention.linear_qkv.layer_norm_", "ln_attn"), *normed("mlp.linear_fc1.layer_norm_", "ln_mlp")),
    *_where(_serial, *normed("self_attention.linear_qkv.layer_norm_", "input_layernorm"),
            *normed("mlp.linear_fc1.layer_norm_", "post_attention_layernorm")),
)  # fmt: skip
LINEAR = tuple(rule for rule in LAYER if "layer_norm" not in rule.megatron)
BODY = tuple(replace(rule, when=_biased) if rule.megatron.endswith("bias") else rule for rule in LINEAR)
RULES = (
    vocab_parallel("embedding.word_embeddings.weight", "transformer.word_embeddings.weight", "hidden"),
    *under("decoder.layers.{layer}", "transformer.h.{layer}", (*NORMS, *BODY)),
    *normed("decoder.final_layernorm.", "transformer.ln_f"),
    vocab_parallel("output_layer.weight", "lm_head.weight", "hidden", when=untied, tied_to="transformer.word_embeddings.weight"),
)


def _branches(config: Config) -> str | None:
    if config.get("new_decoder_architecture"):
        return "one_norm" if config.get("num_ln_in_parallel_attn") == 1 else "two_norms"
    return "one_norm" if config.get("parallel_attn", True) else None


def _groups(config: Config) -> int:
    heads = count(config, "num_attention_heads")
    if config.get("new_decoder_architecture"):
        return config.get("num_kv_heads") or heads
    return 1 if config.get("multi_query", True) else heads


def _read(config: Config) -> dict[str, Any]:
    heads, alibi = count(config, "num_attention_heads"), bool(config.get("alibi"))
    head_dim = count(config, "hidden_size") // heads
    return {
        "parallel_residual": _branches(config),
        "num_query_groups": _groups(config),
        "add_bias_linear": bool(config.get("bias")),
        "position_embedding_type": "alibi" if alibi else "rope",
        "alibi": {"bias_max": 8.0, "scale": head_dim**-0.5} if alibi else None,
    }


def _write(config: Config) -> dict[str, Any]:
    branches = config.get("parallel_residual")
    groups, heads = (count(config, name) for name in ("num_query_groups", "num_attention_heads"))
    new = branches == "two_norms" or (branches == "one_norm" and groups not in (1, heads))
    return {
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (1 if branches == "one_norm" else 2) if new else None,
        "parallel_attn": branches is not None,
        "multi_query": groups == 1,
        "num_kv_heads": groups if new else heads,
        "bias": bool(config.get("add_bias_linear")),
        "alibi": config.get("position_embedding_type") == "alibi",
    }


def _model_sizes(sizes: Any) -> dict[str, Any]:
    return {"branches": sizes.megatron["parallel_residual"], "biased": sizes.megatron["add_bias_linear"]}


ROPE = rope("default")


def _write_rope(config: Config) -> dict[str, Any]:
    return ROPE.to_huggingface({**config, "position_embedding_type": "rope"})


CONFIG = (
    *sizes(groups="", head_dim="", ffn="ffn_hidden_size", ffn_default=lambda config: 4 * count(config, "hidden_size"), tied=True),
    *dropouts(attention="", elsewhere=("attention_dropout", "hidden_dropout")),
    *layer_norm("layer_norm_epsilon"),
    *mlp("gelu", gated=False, huggingface="activation"),
    fixed(add_qkv_bias=False, qk_layernorm=False),
    Field(ROPE.to_megatron, _write_rope),
    Field(_read, _write, _model_sizes),
    counts(groups="num_query_groups"),
    named(fused_qkv=fused_qkv),
    no_window("window_size"),
)
SMALL = {"num_kv_heads": 8, "ffn_hidden_size": 96}
PROVIDER = ("parallel_residual", "alibi")
