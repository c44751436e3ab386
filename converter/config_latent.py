"""CONFIG fields of latent attention (MLA): its sizes, and its rotary embeddings, for which megatron-core has other names."""

from __future__ import annotations

from math import log
from typing import Any

from converter.config import Config, Field, Sizes, count, fixed, named, number, optional, positive
from converter.config_parts import dimension
from converter.config_rope import rope, rope_numbers, signed
from formats.errors import UserError


def latent(*, q_lora: int | None, kv_lora: int, plain: int, turned: int) -> tuple[Field, ...]:
    """Return the fields of latent attention, and its named sizes; the numbers are what `config.json` means where it has none.

    Queries are projected from `q_lora` channels; where `q_lora_rank` is null, from all.
    """
    return (
        _query_rank(q_lora),
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
        fixed(multi_latent_attention=True, latent_layernorm_epsilon=1e-6, add_qkv_bias=False, qk_layernorm=True),
    )


def _query_rank(default: int | None) -> Field:
    one = optional("q_lora_rank", "q_lora_rank", default=default)

    def sizes(before: Sizes) -> dict[str, Any]:
        found = before.megatron.get("q_lora_rank")
        return {"q_lora": None if found is None else count(before.megatron, "q_lora_rank")}

    return Field(one.to_megatron, one.to_huggingface, sizes)


def latent_rope(*kinds: str) -> Field:
    """Return the field of rotary embeddings of latent attention, scaled in one of the given kinds.

    YaRN's `mscale_all_dim` scales the scores of attention too. Sources: `yarn_apply_mscale` of transformers' DeepSeek,
    `MultiLatentAttention` of megatron-core.
    """
    plain = rope(*kinds)

    def read(config: Config) -> dict[str, Any]:
        found = plain.to_megatron(config)
        if found["position_embedding_type"] != "yarn":
            return {**found, "rope_type": "rope"}
        if not found["yarn_correction_range_round_to_int"]:
            raise UserError("`truncate` is `False`, which megatron-core cannot do in latent attention")
        shared = {name: one for name, one in found.items() if not name.startswith("yarn_")}
        numbers = {name: found[theirs] for name, theirs in _YARN.items()}
        scales = _read_scales(rope_numbers(config), numbers["rotary_scaling_factor"])
        return {**shared, "position_embedding_type": "rope", "rope_type": "yarn", **numbers, **scales}

    def write(config: Config) -> dict[str, Any]:
        if config.get("rope_type", "rope") != "yarn":
            return plain.to_huggingface(config)
        numbers = {theirs: config.get(name) for name, theirs in _YARN.items()}
        written = plain.to_huggingface({**config, "position_embedding_type": "yarn", **numbers})
        return {**written, "rope_scaling": {**written["rope_scaling"], **_written_scales(config)}}

    return Field(read, write)


_YARN = {
    "rotary_scaling_factor": "yarn_rotary_scaling_factor",
    "original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
"""What megatron-core calls YaRN's numbers in latent attention, and elsewhere."""


def _scale(factor: float, mscale: float) -> float:
    """Return YaRN's scale for a factor of the length, as megatron-core and transformers compute it."""
    return 0.1 * mscale * log(factor) + 1 if factor > 1 else 1.0


def _read_scales(numbers: Config, factor: float) -> dict[str, Any]:
    """Return `mscale` and `mscale_all_dim`: megatron-core multiplies positions by the ratio of their scales, and scores by the
    square of the second's. transformers takes `attention_factor` for the ratio where it is given, and 1 for `mscale` where one of
    the two is missing."""
    given, attention = (numbers.get(name) for name in ("mscale", "attention_factor"))
    all_dim = number("mscale_all_dim", numbers.get("mscale_all_dim") or 0.0)
    if attention is None and given and all_dim:
        return {"mscale": number("mscale", given), "mscale_all_dim": all_dim}
    if factor <= 1 or (attention is None and not all_dim):
        return {"mscale": 1.0, "mscale_all_dim": all_dim}
    ratio = _scale(factor, 1.0) if attention is None else number("attention_factor", attention)
    return {"mscale": (ratio * _scale(factor, all_dim) - 1) / (0.1 * log(factor)), "mscale_all_dim": all_dim}


def _written_scales(config: Config) -> dict[str, Any]:
    factor = positive("rotary_scaling_factor", config.get("rotary_scaling_factor"))
    given, all_dim = signed("mscale", config.get("mscale")), number("mscale_all_dim", config.get("mscale_all_dim") or 0.0)
    one = 1.0 if given is None else given
    if one > 0 and all_dim:
        return {"mscale": one, "mscale_all_dim": all_dim}
    scores = {"mscale_all_dim": all_dim} if all_dim else {}
    if one == 1.0:
        return scores
    return {**scores, "attention_factor": round(_scale(factor, one) / _scale(factor, all_dim), 12)}
