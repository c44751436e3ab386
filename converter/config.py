"""How `config.json` maps to megatron-core's TransformerConfig and GPTModel, field by field, and back.

A family lists fields; reading them from left to right gives Megatron's configuration, from right to left the
Hugging Face one. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from converter.model import Model
from formats.errors import UserError, shown
from formats.spec import whole_number

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Field:
    """One correspondence: what a Hugging Face config says, in Megatron's fields, and the way back."""

    to_megatron: Callable[[Config], dict[str, Any]]
    to_huggingface: Callable[[Config], dict[str, Any]]


def value(constant: Any) -> Callable[[Config], Any]:
    """A default that does not depend on the rest."""
    return lambda _config: constant


def field(megatron: str, huggingface: str, *, default: Callable[[Config], Any]) -> Field:
    """The same number under two names; absent or null on the Hugging Face side means the default."""

    def read(config: Config) -> dict[str, Any]:
        found = config.get(huggingface)
        return {megatron: default(config) if found is None else _number(huggingface, found)}

    return Field(read, lambda config: {huggingface: _number(megatron, config[megatron])} if megatron in config else {})


def _number(name: str, found: Any) -> Any:
    """A number that means something: not negative, no larger than single precision holds; true and false too."""
    if not isinstance(found, (int, float)) or not 0 <= found < 1e38:
        raise UserError(f"`{name}` is `{shown(found)}`, which should be a number", hint="the configuration is damaged")
    return found


def required(megatron: str, huggingface: str) -> Field:
    """The same positive whole number under two names."""

    def read(config: Config) -> dict[str, Any]:
        return {megatron: _count(config, huggingface)}

    def write(config: Config) -> dict[str, Any]:
        return {huggingface: _count(config, megatron)}

    return Field(read, write)


def _count(config: Config, name: str) -> int:
    found = config.get(name)
    if not isinstance(found, int) or not whole_number(found) or found < 1:
        raise UserError(
            f"the model's configuration has `{name}`: `{shown(found)}`, which should be a whole number above 0",
            hint="`config.json` is missing the field or damaged",
        )
    return found


def flag(megatron: str, *huggingface: str) -> Field:
    """One switch in Megatron for several in Hugging Face: on if any is."""

    def read(config: Config) -> dict[str, Any]:
        return {megatron: any(bool(config.get(name)) for name in huggingface)}

    return Field(read, lambda config: dict.fromkeys(huggingface, bool(config.get(megatron))))


def fixed(**fields: Any) -> Field:
    """What every model of the family has on Megatron's side; a configuration that says otherwise is another family."""
    return Field(lambda _config: dict(fields), lambda config: _agreeing(config, fields))


def _agreeing(config: Config, fields: Config) -> dict[str, Any]:
    for name, expected in fields.items():
        if config.get(name, expected) != expected:
            raise UserError(f"`{name}` is `{shown(config[name])}`, not `{expected}`")
    return {}


def activation(name: str) -> Field:
    """The only activation function the family's Megatron model has."""

    def read(config: Config) -> dict[str, Any]:
        found = config.get("hidden_act", name)
        if found != name:
            raise UserError(f"`hidden_act` is `{shown(found)}`; only `{name}` is supported for this family")
        return {"activation_func": name}

    return Field(read, lambda config: {**_agreeing(config, {"activation_func": name}), "hidden_act": name})


def window(megatron: str, huggingface: str, *, default: int | None) -> Field:
    """Sliding attention: Hugging Face counts the tokens seen, the current one included; Megatron how many before it."""

    def read(config: Config) -> dict[str, Any]:
        tokens = config.get(huggingface, default)
        return {megatron: None if tokens is None else [_count({huggingface: tokens}, huggingface) - 1, 0]}

    def write(config: Config) -> dict[str, Any]:
        match config.get(megatron):
            case None:
                return {huggingface: None}
            case [int(before), 0] | (int(before), 0):
                return {huggingface: before + 1}
            case _:
                raise UserError(f"`{megatron}` is not a window over what comes before a token")

    return Field(read, write)


BUILT_IN_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What megatron-core's GPTModel fixes for Llama-3.1's scaling (`RotaryEmbedding._apply_scaling`)."""


def rope_numbers(config: Config) -> dict[str, Any]:
    """Rotary embedding parameters of a `config.json`, as transformers 5 writes them (`rope_parameters`) or as 4 did
    (`rope_theta` and `rope_scaling`)."""
    scaling: Any = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"`rope_scaling` is `{shown(scaling)}`, which should be an object")
    numbers = dict(cast("Config", scaling))
    numbers["rope_type"] = numbers.get("rope_type") or numbers.pop("type", None) or "default"
    numbers["rope_theta"] = _number("rope_theta", numbers.get("rope_theta") or config.get("rope_theta") or 10000.0)
    return numbers


def rope(*kinds: str) -> Field:
    """Rotary embeddings, scaled in one of the given kinds."""

    def read(config: Config) -> dict[str, Any]:
        numbers = rope_numbers(config)
        kind = numbers["rope_type"]
        if kind not in kinds:
            raise UserError(
                f"`config.json` has rope type `{shown(kind)}`, which megatron-core cannot do for this family",
                hint=f"supported are: {', '.join(kinds)}",
            )
        found: dict[str, Any] = {"rotary_base": numbers["rope_theta"], "rope_scaling": kind == "llama3"}
        if kind == "llama3":
            found["rope_scaling_factor"] = _number("factor", numbers.get("factor", 8.0))
        if kind == "linear":
            found["seq_len_interpolation_factor"] = _number("factor", numbers.get("factor"))
        return found

    return Field(read, _write_rope)


def _write_rope(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_theta": _number("rotary_base", config.get("rotary_base", 10000.0)), "rope_scaling": None}
    if config.get("rope_scaling"):
        factor = _number("rope_scaling_factor", config.get("rope_scaling_factor", 8.0))
        found["rope_scaling"] = {"rope_type": "llama3", "factor": factor, **BUILT_IN_ROPE}
    elif config.get("seq_len_interpolation_factor"):
        found["rope_scaling"] = {"rope_type": "linear", "factor": config["seq_len_interpolation_factor"]}
    return found


def to_megatron(fields: Iterable[Field], config: Config) -> dict[str, Any]:
    """Megatron's fields for a `config.json`; a later field wins over an earlier one."""
    found: dict[str, Any] = {}
    for one in fields:
        found |= one.to_megatron(config)
    return found


def to_huggingface(fields: Iterable[Field], config: Config) -> dict[str, Any]:
    """The `config.json` fields for Megatron's; UserError where the family cannot say them."""
    found: dict[str, Any] = {}
    for one in fields:
        found |= one.to_huggingface(config)
    return found


def make_model(fields: Iterable[Field], config: Config, *, vocab_multiple: int = 1) -> Model:
    """The sizes in a `config.json`. `vocab_multiple`: the padded vocabulary is the next multiple of it."""
    megatron = to_megatron(fields, config)
    count = {name: _count(megatron, name) for name in _COUNTS}
    if count["num_attention_heads"] % count["num_query_groups"]:
        raise UserError(
            f"{count['num_attention_heads']} attention heads do not divide into {count['num_query_groups']} query groups",
            hint="`config.json` is damaged",
        )
    return Model(
        layers=count["num_layers"],
        hidden=count["hidden_size"],
        heads=count["num_attention_heads"],
        groups=count["num_query_groups"],
        head_dim=count["kv_channels"],
        ffn=count["ffn_hidden_size"],
        vocab=count["vocab_size"],
        padded_vocab=-(-count["vocab_size"] // vocab_multiple) * vocab_multiple,
        tied=bool(megatron["share_embeddings_and_output_weights"]),
        attention_bias=bool(megatron["add_bias_linear"]) and bool(config.get("attention_bias")),
        mlp_bias=bool(megatron["add_bias_linear"]) and bool(config.get("mlp_bias")),
    )


_COUNTS = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size", "vocab_size",
)  # fmt: skip
