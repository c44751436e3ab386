"""MiniCPM3: Youtu's latent attention, with rotary rows half after half where Megatron's lie pair by pair, and multipliers."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import sqrt
from typing import Any

from converter.config import Config, Field, count, counts, field, number, undone, value
from converter.config_latent import latent, latent_rope
from converter.config_parts import dropouts, mlp, multipliers, only, rms_norm, sizes
from converter.families import deepseek_v3, llama, youtu
from converter.model import Model
from converter.rows import RowRange

MODELS = "MiniCPM3 4B"
ARCHITECTURE = "MiniCPM3ForCausalLM"


def _pairs(plain: int, turned: int, start: int) -> Iterator[RowRange]:
    """Yield `plain` rows as they are, then `turned` rows, one of the first half and one of the second in turn."""
    yield RowRange(0, start, start, plain)
    for row in range(turned):
        half, pair = row % 2, row // 2
        yield RowRange(0, start + plain + half * turned // 2 + pair, start + plain + row, 1)


def _queries(_parts: tuple[int, ...], model: Model) -> Iterator[RowRange]:
    for head in range(model.heads):
        yield from _pairs(model.plain, model.turned, head * (model.plain + model.turned))


def _keys(_parts: tuple[int, ...], model: Model) -> Iterator[RowRange]:
    yield from _pairs(model.kv_lora, model.turned, 0)


ORDERS = {
    "self_attention.linear_q_proj.weight": _queries,
    "self_attention.linear_q_up_proj.weight": _queries,
    "self_attention.linear_kv_down_proj.weight": _keys,
}
RULES = llama.decoder(
    *(replace(rule, row_order=ORDERS.get(rule.megatron, rule.row_order)) for rule in deepseek_v3.ATTENTION), *llama.MLP
)


def _scaled(megatron: str, huggingface: str, unit: Callable[[Config], float], *, default: float) -> Field:
    """Return the field of a number that is in units which depend on the model's sizes; null means that nothing is scaled."""

    def read(config: Config) -> dict[str, Any]:
        given = config.get(huggingface, default)
        return {megatron: 1.0 if given is None else number(huggingface, given) / unit(config)}

    def write(config: Config) -> dict[str, Any]:
        divisor = unit(config)
        given = number(megatron, config.get(megatron, 1.0))
        return {huggingface: undone(lambda there: there / divisor, lambda here: here * divisor, given)}

    return Field(read, write)


def _root_of_layers(config: Config) -> float:
    return sqrt(count(config, "num_layers" if "num_layers" in config else "num_hidden_layers"))


def _width(config: Config) -> float:
    return count(config, "hidden_size")


def _value_size(config: Config) -> int:
    return count(config, "hidden_size") // count(config, "num_attention_heads")


CONFIG = (
    *sizes(head_dim="", positions_default=32768, tied=True),
    field("init_method_std", "initializer_range", default=value(0.1)),
    *dropouts(),
    *rms_norm(default=1e-5),
    *mlp("silu", gated=True),
    field("v_head_dim", "v_head_dim", default=_value_size, null=_value_size),
    counts(value="v_head_dim"),
    *latent(q_lora=768, kv_lora=256, plain=64, turned=32),
    *llama.NO_BIAS,
    latent_rope("default", "longrope"),
    *multipliers(
        embedding=field("mup_embedding_mult", "scale_emb", default=value(12)),
        logits=_scaled("mup_output_mult", "dim_model_base", _width, default=256),
    ),
    _scaled("residual_multiplier", "scale_depth", _root_of_layers, default=1.4),
    only(attention_bias=False, mlp_bias=False),
)
SMALL = {
    **youtu.SMALL,
    "dim_model_base": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [1.0, 4.0, 8.0, 16.0],
        "original_max_position_embeddings": 256,
    },
}
PROVIDER = (*youtu.PROVIDER, "residual_multiplier", "rope_parameters", "exact_sequence_length")
