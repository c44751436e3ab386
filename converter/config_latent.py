"""CONFIG fields of latent attention (MLA): its sizes, and its rotary embeddings, for which megatron-core has other names."""

from __future__ import annotations

from math import log
from typing import Any, cast

from converter.config import Config, Field, Sizes, count, field, fixed, named, number, optional, positive, value
from converter.config_layers import layers_of
from converter.config_parts import dimension
from converter.config_rope import rope, rope_numbers, signed
from formats.errors import UserError, format_untrusted


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
    rank = optional("q_lora_rank", "q_lora_rank", default=default)

    def sizes(before: Sizes) -> dict[str, Any]:
        size = before.megatron.get("q_lora_rank")
        return {"q_lora": None if size is None else count(before.megatron, "q_lora_rank")}

    return Field(rank.to_megatron, rank.to_huggingface, sizes)


def indexer(*, heads: int, interleaved: bool) -> tuple[Field, ...]:
    """Return the fields of DeepSeek's sparse attention (DSA), whose indexer chooses the tokens that each token attends to, and
    its named sizes. `heads` is what `config.json` means where it has no `index_n_heads`; `interleaved` says which channels of the
    indexer the rotary embedding turns together.

    megatron-core may turn queries and keys of the indexer by a Hadamard matrix first, which changes no product of the two.
    """
    return (
        field("dsa_indexer_topk", "index_topk", default=value(2048)),
        *dimension("index_dim", "index_head_dim", megatron="dsa_indexer_head_dim", default=128),
        *dimension("index_heads", "index_n_heads", megatron="dsa_indexer_n_heads", default=heads),
        named(index_queries=lambda model: model.index_heads * model.index_dim),
        fixed(
            experimental_attention_variant="dsa",
            dsa_indexer_rope_interleaved=interleaved,
            dsa_indexer_rotate_activation=False,
            dsa_indexer_k_norm_epsilon=1e-6,
        ),
    )


def index_sharing() -> Field:
    """Return the field of layers whose indexer chooses tokens, which the layers after them without one take over.

    megatron-core has the first `dsa_indexer_skip_topk_offset` layers with one and then each n-th, `dsa_indexer_topk_freq`, as
    `index_topk_freq` says it of GLM-5. Models with another list of `indexer_types` are converted and not trained. Conditions know
    the layers with an indexer as the set `indexed`.
    """

    def read(config: Config) -> dict[str, Any]:
        types = _indexer_types(config)
        first = types.index(_SHARED) if _SHARED in types else 0
        each = (types.index(_OWN, first) if _OWN in types[first:] else len(types)) - first + 1 if first else 1
        known = types == _types_by_step(len(types), first, each)
        return {_STEP: each if known else 1, _FIRST: first if known else 0, _TYPES: None if known else types}

    def write(config: Config) -> dict[str, Any]:
        return {_TYPES: _types_in_megatron(config)}

    return Field(read, write, lambda before: {
        "indexed": frozenset(layer for layer, kind in enumerate(_types_in_megatron(before.megatron)) if kind == _OWN)
    })  # fmt: skip


_STEP, _FIRST, _TYPES, _OWN, _SHARED = "dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset", "indexer_types", "full", "shared"


def _types_by_step(layers: int, first: int, each: int) -> list[str]:
    return [_SHARED if max(layer - first + 1, 0) % each else _OWN for layer in range(layers)]


def _types_in_megatron(config: Config) -> list[str]:
    step, first = config.get(_STEP, 1), config.get(_FIRST, 0)
    return config.get(_TYPES) or _types_by_step(
        layers_of(config, "num_layers"), number(_FIRST, first), count({_STEP: step}, _STEP)
    )


def _indexer_types(config: Config) -> list[str]:
    """Return of each layer whether its indexer chooses tokens, as transformers reads it of a list, letters or two numbers."""
    layers, letters = layers_of(config), config.get("index_topk_pattern")
    step, first = config.get("index_topk_freq", 1), config.get("index_skip_topk_offset", 2)
    listed: Any = config.get(_TYPES)
    if listed is None and letters is not None:
        listed = [{"F": _OWN, "S": _SHARED}.get(kind) for kind in letters] if isinstance(letters, str) else letters
    if listed is None:
        listed = _types_by_step(
            layers, number("index_skip_topk_offset", first), count({"index_topk_freq": step}, "index_topk_freq")
        )
    types = cast("list[Any]", listed) if isinstance(listed, list) else []
    if len(types) != layers or any(kind not in (_OWN, _SHARED) for kind in types) or types[0] != _OWN:
        raise UserError(
            f"`{_TYPES}` is `{format_untrusted(listed)}`, "
            f"which should have `{_OWN}` or `{_SHARED}` for each layer, first `{_OWN}`"
        )
    return types


def latent_rope(*kinds: str) -> Field:
    """Return the field of rotary embeddings of latent attention, scaled in one of the given kinds.

    YaRN's `mscale_all_dim` scales the scores of attention too. Sources: `yarn_apply_mscale` of transformers' DeepSeek,
    `MultiLatentAttention` of megatron-core.
    """
    plain = rope(*kinds)

    def read(config: Config) -> dict[str, Any]:
        fields = plain.to_megatron(config)
        if fields["position_embedding_type"] != "yarn":
            return {**fields, "rope_type": "rope"}
        if not fields["yarn_correction_range_round_to_int"]:
            raise UserError("`truncate` is `False`, which megatron-core cannot do in latent attention")
        shared = {name: value for name, value in fields.items() if not name.startswith("yarn_")}
        numbers = {name: fields[theirs] for name, theirs in _YARN.items()}
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
    scale = 1.0 if given is None else given
    if scale > 0 and all_dim:
        return {"mscale": scale, "mscale_all_dim": all_dim}
    scores = {"mscale_all_dim": all_dim} if all_dim else {}
    if scale == 1.0:
        return scores
    return {**scores, "attention_factor": round(_scale(factor, scale) / _scale(factor, all_dim), 12)}
