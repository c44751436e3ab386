"""Youtu-LLM: multi-head latent attention, whose queries, keys and values are projected from a few channels, and Llama's MLP."""

from collections.abc import Iterator

from converter.config import Config, Field, field, fixed, named
from converter.config_parts import dimension, dropouts, mlp, only, rms_norm, sizes
from converter.config_rope import rope
from converter.families import llama
from converter.rules import Rule, column_parallel, replicated, row_parallel

MODELS = "Youtu-LLM 2B"
ARCHITECTURE = "YoutuForCausalLM"


def _latent(name: str, rows: str, rank: str, down: str, down_rows: str) -> Iterator[Rule]:
    """Yield the rules of queries, or of keys and values: a projection to few channels, a norm, and a projection from them."""
    up = f"self_attention.linear_{name}_up_proj"
    yield replicated(f"self_attention.linear_{name}_down_proj.weight", f"self_attn.{down}.weight", down_rows, "hidden")
    alias = f"self_attention.{name}_layernorm.weight"
    yield replicated(f"{up}.layer_norm_weight", f"self_attn.{name}_a_layernorm.weight", rank, alias=alias)
    yield column_parallel(f"{up}.weight", f"self_attn.{name}_b_proj.weight", rows, rank)


ATTENTION = (
    replicated("input_layernorm.weight", "input_layernorm.weight", "hidden"),
    *_latent("q", "queries", "q_lora", "q_a_proj", "q_lora"),
    *_latent("kv", "keys_values", "kv_lora", "kv_a_proj_with_mqa", "kv_down"),
    row_parallel("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden", "values"),
)
RULES = llama.decoder(*ATTENTION, *llama.MLP)


def _std(config: Config) -> float:
    return 2 / (5 * config["hidden_size"]) ** 0.5


def latent(*, q_lora: int, kv_lora: int, plain: int, turned: int) -> tuple[Field, ...]:
    """Return the fields of latent attention, and its named sizes; the numbers are what `config.json` means where it has none."""
    return (
        *dimension("q_lora", "q_lora_rank", default=q_lora),
        *dimension("kv_lora", "kv_lora_rank", default=kv_lora),
        *dimension("plain", "qk_nope_head_dim", megatron="qk_head_dim", default=plain),
        *dimension("turned", "qk_rope_head_dim", megatron="qk_pos_emb_head_dim", default=turned),
        named(
            queries=lambda model: model.heads * (model.plain + model.turned),
            kv_down=lambda model: model.kv_lora + model.turned,
            keys_values=lambda model: model.heads * (model.plain + model.value),
            values=lambda model: model.heads * model.value,
        ),
        # transformers builds the two inner norms with this epsilon, whatever `rms_norm_eps` says.
        fixed(
            multi_latent_attention=True, rope_type="rope", latent_layernorm_epsilon=1e-6, add_qkv_bias=False, qk_layernorm=True
        ),
    )


CONFIG = (
    *sizes(head_dim="", positions_default=131072, tied=True),
    field("init_method_std", "initializer_range", default=_std, null=_std),
    *dropouts(),
    *rms_norm(),
    *mlp("silu", gated=True),
    *dimension("value", "v_head_dim", default=128),
    *latent(q_lora=1536, kv_lora=512, plain=128, turned=64),
    *llama.NO_BIAS,
    rope("default"),
    only(attention_bias=False, rope_interleave=True),
)
SMALL = {
    "num_key_value_heads": 8, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "pad_token_id": None,
}  # fmt: skip
PROVIDER = ("latent_layernorm_epsilon",)
