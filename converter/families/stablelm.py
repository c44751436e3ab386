"""StableLM: LayerNorm, a quarter of each head turned. StableLM 2 12B has one norm for both branches, and one for each head."""

from collections.abc import Iterator
from typing import Any

from converter.config import Config, Field, field, fixed, switches, value
from converter.config_layers import no_window
from converter.config_parts import dropouts, layer_norm, mlp, sizes
from converter.config_rope import partial_rotary, rope
from converter.families import llama
from converter.families.gpt_neox import normed
from converter.model import Model
from converter.rules import Indices, Rule, qkv, under, vocab_parallel

MODELS = "StableLM 3B, StableLM 2 1.6B and 12B, Stable Code"
ARCHITECTURE = "StableLmForCausalLM"


def _biased(model: Model, _indices: Indices) -> bool:
    return model.qkv_bias


def _parallel(model: Model, _indices: Indices) -> bool:
    return model.one_norm


def _one_after_another(model: Model, _indices: Indices) -> bool:
    return not model.one_norm


MOST_HEADS = 64
"""A norm for each head is a tensor for each head; there are rules for models with up to so many."""


def _head_norms(name: str, size: str) -> Iterator[Rule]:
    """Yield the rule of the norms of each head for every number of heads."""
    for count in range(1, MOST_HEADS + 1):
        numbers = ",".join(map(str, range(count)))
        yield Rule(
            f"self_attention.{name}.weight",
            f"self_attn.{name}.norms.{{{numbers}}}.weight" if count > 1 else f"self_attn.{name}.norms.0.weight",
            ((1, "head_dim"),) * count,
            huggingface_shape=("head_dim",),
            when=lambda model, _, count=count: model.head_norms and model.size(size) == count,
        )


RULES = (
    vocab_parallel("embedding.word_embeddings.weight", "model.embed_tokens.weight", "hidden"),
    *under("decoder.layers.{layer}", "model.layers.{layer}", (
        *normed("input_layernorm.", "input_layernorm", when=_parallel),
        *normed("self_attention.linear_qkv.layer_norm_", "input_layernorm", when=_one_after_another),
        llama.ATTENTION[1],
        qkv("self_attention.linear_qkv.bias", "self_attn.{q,k,v}_proj.bias", when=_biased),
        llama.ATTENTION[2],
        *_head_norms("q_layernorm", "heads"),
        *_head_norms("k_layernorm", "groups"),
        *normed("mlp.linear_fc1.layer_norm_", "post_attention_layernorm", when=_one_after_another),
        *llama.MLP[1:],
    )),
    *normed("decoder.final_layernorm.", "model.norm"),
    llama.RULES[-1],
)  # fmt: skip


def _read_parallel(config: Config) -> dict[str, Any]:
    return {"parallel_residual": "one_norm" if config.get("use_parallel_residual", False) else None}


CONFIG = (
    *sizes(head_dim="", positions_default=4096),
    field("num_query_groups", "num_key_value_heads", default=value(32)),
    *layer_norm(),
    *dropouts(elsewhere=("hidden_dropout",)),
    *mlp("silu", gated=True),
    *llama.NO_BIAS,
    rope("default", partial=partial_rotary(0.25)),
    no_window("window_size"),
    field("add_qkv_bias", "use_qkv_bias", default=value(False)),
    field("qk_layernorm", "qk_layernorm", default=value(False)),
    Field(
        _read_parallel,
        lambda config: {"use_parallel_residual": config.get("parallel_residual") is not None},
        lambda sizes: {"one_norm": sizes.megatron["parallel_residual"] is not None},
    ),
    switches(qkv_bias="add_qkv_bias", head_norms="qk_layernorm"),
    fixed(qk_layernorm_scope="each_head"),
)
EXTRAS = llama.EXTRAS
PROVIDER = ("parallel_residual", "qk_layernorm_scope")
