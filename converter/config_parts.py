"""Parts of a family's CONFIG that several families have: sizes, norms, feed-forward layers, experts, layers that differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from converter.config import (
    Config,
    Field,
    activation,
    count,
    counts,
    field,
    fixed,
    number,
    object_of,
    optional,
    required,
    switches,
    value,
)
from formats.errors import UserError, format_untrusted


def sizes(
    *,
    layers: str = "num_hidden_layers",
    hidden: str = "hidden_size",
    heads: str = "num_attention_heads",
    groups: str = "num_key_value_heads",
    groups_default: int | None = None,
    head_dim: str = "head_dim",
    head_dim_default: int | None = None,
    ffn: str = "intermediate_size",
    ffn_default: Callable[[Config], int] | None = None,
    positions: str = "max_position_embeddings",
    positions_default: int = 2048,
    vocab: str = "vocab_size",
    tied: bool = False,
) -> tuple[Field, ...]:
    """Return the fields of a decoder's sizes, by their names in `config.json`, and the named sizes of them.

    `groups` and `head_dim` may be empty for families without such a field: one group per head, hidden size / heads, which null
    means too, and absence if there is no default. `tied` is `tie_word_embeddings` where it is absent, and `ffn_default` the size
    of the feed-forward layer.
    """

    def all_heads(config: Config) -> int:
        return count(config, heads)

    def even_heads(config: Config) -> int:
        return count({head_dim or "head_dim": count(config, hidden) // count(config, heads)}, head_dim or "head_dim")

    return (
        required("num_layers", layers),
        required("hidden_size", hidden),
        required("num_attention_heads", heads),
        field("ffn_hidden_size", ffn, default=ffn_default, null=ffn_default) if ffn_default else required("ffn_hidden_size", ffn),
        _derived("num_query_groups", groups, default=groups_default, derive=all_heads),
        _derived("kv_channels", head_dim, default=head_dim_default, derive=even_heads),
        required("vocab_size", vocab),
        field("seq_length", positions, default=value(positions_default)),
        field("init_method_std", "initializer_range", default=value(0.02)),
        field("share_embeddings_and_output_weights", "tie_word_embeddings", default=value(tied)),
        counts(layers="num_layers", hidden="hidden_size", heads="num_attention_heads", groups="num_query_groups",
               head_dim="kv_channels", ffn="ffn_hidden_size", vocab="vocab_size"),
        switches(tied="share_embeddings_and_output_weights"),
    )  # fmt: skip


def _derived(megatron: str, huggingface: str, *, default: int | None, derive: Callable[[Config], int]) -> Field:
    """Return a field whose number follows from others where it is null, where it is absent without a default, and in families
    that have no such field, for which `huggingface` is empty."""
    if not huggingface:
        return Field(lambda config: {megatron: derive(config)}, lambda _config: {})
    return field(megatron, huggingface, default=value(default) if default else derive, null=derive)


def dropouts(
    *,
    attention: str = "attention_dropout",
    hidden: str = "",
    embedding: str = "",
    default: float = 0.0,
    attention_default: float | None = None,
    elsewhere: tuple[str, ...] = (),
) -> tuple[Field, ...]:
    """Return the fields of dropout: of attention's weights, of what each branch adds, and of embeddings; without a name there is
    none.

    megatron-core has one number for branches and embeddings, `hidden_dropout`; `embedding_dropout` is the trainer's, where that
    of embeddings is another. `elsewhere` are other dropouts, with which a model is not trained.
    """
    of_attention = default if attention_default is None else attention_default
    both = tuple(
        field(megatron, name, default=value(absent)) if name else fixed(**{megatron: 0.0})
        for megatron, name, absent in (("attention_dropout", attention, of_attention), ("hidden_dropout", hidden, default))
    )
    return (*both, _embedding_dropout(hidden, embedding, default), *((_other_dropouts(elsewhere),) if elsewhere else ()))


def _embedding_dropout(hidden: str, embedding: str, default: float) -> Field:
    def dropout(config: Config, name: str) -> Any:
        return number(name, config.get(name, default)) if name else 0.0

    def read(config: Config) -> dict[str, Any]:
        of_embeddings = dropout(config, embedding)
        return {"embedding_dropout": None if of_embeddings == dropout(config, hidden) else of_embeddings}

    def write(config: Config) -> dict[str, Any]:
        probability = config.get("embedding_dropout")
        probability = config.get("hidden_dropout", default) if probability is None else probability
        return {embedding: probability} if embedding and embedding != hidden else {}

    return Field(read, write)


def _other_dropouts(names: tuple[str, ...]) -> Field:
    def write(config: Config) -> dict[str, Any]:
        probabilities = object_of(config, "dropouts")
        return {name: number(name, probabilities.get(name, 0.0)) for name in names}

    return Field(lambda config: {"dropouts": {name: config[name] for name in names if config.get(name)} or None}, write)


def rms_norm(name: str = "rms_norm_eps", *, default: float = 1e-6, zero_centered: bool = False) -> tuple[Field, ...]:
    """Return the fields of RMSNorm; `zero_centered` where a norm multiplies by 1 + its weight."""
    return _norm("RMSNorm", name, default, zero_centered)


def layer_norm(name: str = "layer_norm_eps", *, default: float = 1e-5, zero_centered: bool = False) -> tuple[Field, ...]:
    """Return the fields of LayerNorm, which has a bias in Megatron."""
    return _norm("LayerNorm", name, default, zero_centered)


def _norm(kind: str, name: str, default: float, zero_centered: bool) -> tuple[Field, ...]:
    centered = (fixed(layernorm_zero_centered_gamma=True),) if zero_centered else ()
    return field("layernorm_epsilon", name, default=value(default)), fixed(normalization=kind), *centered


def mlp(*activations: str, gated: bool, huggingface: str = "hidden_act") -> tuple[Field, ...]:
    """Return the fields of a dense feed-forward layer: its activations, as transformers calls them, and whether it has a gate."""
    return activation(*activations, huggingface=huggingface), fixed(gated_linear_unit=gated, num_moe_experts=None)


def multipliers(*, embedding: Field | None = None, logits: Field | None = None) -> tuple[Field, ...]:
    """Return the fields of numbers that embeddings and logits are multiplied by: `mup_embedding_mult` and `mup_output_mult`.

    megatron-core's muP switches them on; with the base width equal to the width, and a softmax scale of its own, it changes
    nothing else.
    """
    return (
        *((embedding,) if embedding else ()),
        *((logits,) if logits else ()),
        Field(lambda _config: {"use_mup": True, "mup_attn_scale_power": 0.5}, lambda _config: {}),
    )


def routed(*, experts: str, topk: str, ffn: str, renormalized: str = "", absent: bool = True) -> tuple[Field, ...]:
    """Return the fields of a mixture of experts, and its sizes `experts` and `moe_ffn`, by their names in `config.json`.

    `renormalized` names the switch that says whether the weights of the chosen experts are made to sum to 1, and `absent` is what
    it is where there is none. Without a name they are (megatron-core: `moe_router_pre_softmax` is not set).
    """
    fields = (
        required("num_moe_experts", experts),
        _chosen(topk, experts),
        required("moe_ffn_hidden_size", ffn),
        counts(experts="num_moe_experts", moe_ffn="moe_ffn_hidden_size"),
    )
    return (*fields, inverted("moe_router_pre_softmax", renormalized, absent=absent)) if renormalized else fields


def _chosen(topk: str, experts: str) -> Field:
    """Return the field of how many experts are chosen for a token."""
    chosen = required("moe_router_topk", topk)

    def read(config: Config) -> dict[str, Any]:
        if count(config, topk) > count(config, experts):
            raise UserError(
                f"`{topk}` is {config[topk]}, and `{experts}` only {config[experts]}", hint="the configuration is damaged"
            )
        return chosen.to_megatron(config)

    return replace(chosen, to_megatron=read)


def shared_experts(ffn: str) -> tuple[Field, ...]:
    """Return the fields of experts that every token goes through, and their size `shared_ffn`: the sum of all."""
    megatron = "moe_shared_expert_intermediate_size"
    return required(megatron, ffn), counts(shared_ffn=megatron)


def inverted(megatron: str, huggingface: str, *, absent: bool = True) -> Field:
    """Return a switch that is on in Megatron where it is off in Hugging Face, where it may be absent."""
    return Field(
        lambda config: {megatron: not config.get(huggingface, absent)},
        lambda config: {huggingface: not config.get(megatron, False)},
    )


def by_layer(
    megatron: str, huggingface: str, marks: dict[str, int], *, size: str, default: Callable[[Config], Sequence[str]] | None = None
) -> Field:
    """Return a list of numbers in Megatron, one for each layer, that `config.json` says in words (`layer_types`).

    Conditions know the layers marked 1 as the set `size`. `default` returns the words where `config.json` has none.
    """
    words = {mark: word for word, mark in marks.items()}

    def read(config: Config) -> dict[str, Any]:
        types: Any = config.get(huggingface)
        types = list(default(config)) if types is None and default else types
        if not isinstance(types, list) or len(cast("list[Any]", types)) != config.get("num_hidden_layers"):
            raise UserError(f"`{huggingface}` is `{format_untrusted(types)}`, which should have a word for each layer")
        unknown = next((word for word in cast("list[Any]", types) if not isinstance(word, str) or word not in marks), None)
        if unknown is not None:
            raise UserError(
                f"`{huggingface}` has `{format_untrusted(unknown)}`", hint=f"models of this family have {', '.join(marks)}"
            )
        return {megatron: [marks[word] for word in cast("list[str]", types)]}

    def write(config: Config) -> dict[str, Any]:
        if megatron not in config:
            return {}
        return {huggingface: [words[mark] for mark in _known_marks(config, megatron, words)]}

    return Field(
        read,
        write,
        lambda sizes: {size: frozenset(layer for layer, mark in enumerate(sizes.megatron[megatron]) if mark)},
    )


def _known_marks(config: Config, name: str, words: Mapping[int, str]) -> list[int]:
    """Return the marks of layers; UserError for what is no list of those that have a word."""
    marks = config[name]
    if not isinstance(marks, list) or not all(isinstance(mark, int) and mark in words for mark in cast("list[Any]", marks)):
        raise UserError(f"`{name}` is `{format_untrusted(marks)}`", hint=f"each layer has one of {', '.join(map(str, words))}")
    return cast("list[int]", marks)


def dimension(size: str, huggingface: str, *, megatron: str = "", default: int | None = None) -> tuple[Field, ...]:
    """Return a named size that `config.json` says, under the name that Megatron has for it."""
    name = megatron or huggingface
    size_field = required(name, huggingface) if default is None else field(name, huggingface, default=value(default))
    return size_field, counts(**{size: name})


def only(**huggingface: Any) -> Field:
    """Return fields of `config.json` that models of the family have with these values alone, or not at all: weights with others
    have other names or shapes. Where they have not, it is `trained_with`."""

    def read(config: Config) -> dict[str, Any]:
        for name, expected in huggingface.items():
            if config.get(name, expected) != expected:
                raise UserError(f"`{name}` is `{format_untrusted(config[name])}`; only `{expected}` is supported for this family")
        return {}

    return Field(read, lambda _config: dict(huggingface))


def trained_with(**huggingface: Any) -> Field:
    """Return fields of `config.json` with whose values alone, or without them, models of the family are trained; others'
    weights are converted. A family has one such field."""

    def read(config: Config) -> dict[str, Any]:
        others = {name: config[name] for name, usual in huggingface.items() if config.get(name, usual) != usual}
        return {OTHERS: others} if others else {}

    return Field(read, lambda config: {**huggingface, **object_of(config, OTHERS)})


OTHERS = "other_values"
"""The field of what `config.json` says otherwise than all published models of a family."""

NOT_COMPUTED = {
    "alibi_bias_max": "transformers takes 8 whatever it says, MPT's own code what it says",
    "dropouts": "transformers drops other numbers than megatron-core's layers do",
    "indexer_types": "layers take over tokens that others chose, in an order for which megatron-core has no numbers",
    "moe_normalize_expert_weights": "weights of chosen experts are divided by their norm, which is the sum in routers here",
    "moe_jitter_eps": "training multiplies what experts read by random numbers, which no layer here does",
    "input_jitter_noise": "training multiplies what experts read by random numbers, which no layer here does",
    "moe_topk": "tokens have other numbers of experts in other layers, and megatron-core has one number for all",
    "norm_topk_prob": "this family's routers here make the weights of chosen experts sum to 1, or do not, whatever it says",
    "normalized_output_layer": "Baichuan 2 normalizes the rows of its output layer at each step, which no layer here does",
    OTHERS: "published models of this family have another value, and layers here compute that alone",
    "router_jitter_noise": "training multiplies what experts read by random numbers, which no layer here does",
    "rope_ratio": "ChatGLM 2 divides positions by it and ChatGLM 3 multiplies the base by it; `config.json` is the same for both",
    "scale_attn_by_inverse_layer_idx": "scores of attention are divided by the number of their layer, which no layer here does",
    "time_step_limit": "time steps are kept within it, and megatron-core's Mamba layers take any",
}
"""Fields of models whose weights are converted, and which neither megatron-core nor `mbtrain` computes."""


def described(name: str, given: Any, *, verb: str = "") -> str:
    """Return a field with its value, or each field that it holds, for messages; `verb` stands between the two."""
    fields: Config = cast("Config", given) if isinstance(given, dict) else {name: given}
    return " and ".join(f"`{key}`{verb} `{format_untrusted(value)}`" for key, value in fields.items())


def not_computed(name: str, *, huggingface: str = "", off: float | None = None) -> Field:
    """Return a field of `NOT_COMPUTED`, under its name in `config.json`, or the name `huggingface`; null, or `off`, where the
    model does not have it."""
    assert name in NOT_COMPUTED
    key = huggingface or name
    plain = optional(name, key, default=off)
    return Field(
        lambda config: {name: None} if config.get(key, off) == off else plain.to_megatron(config),
        lambda config: {key: off} if config.get(name) is None else plain.to_huggingface(config),
    )
