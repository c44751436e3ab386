"""How `config.json` maps to megatron-core's TransformerConfig and GPTModel, field by field, and back.

A family lists fields; reading them from left to right gives Megatron's configuration, from right to left the
Hugging Face one. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from converter.model import Model
from formats.errors import UserError, format_untrusted
from formats.spec import is_size

Config = Mapping[str, Any]


def _nothing(_config: Config) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Field:
    """One correspondence: what a Hugging Face config says, in Megatron's fields, and the way back; and what it says of the
    model's sizes."""

    to_megatron: Callable[[Config], dict[str, Any]]
    to_huggingface: Callable[[Config], dict[str, Any]]
    sizes: Callable[[Sizes], dict[str, Any]] = lambda _sizes: {}
    """The named sizes that a `Model` has of it."""


class Sizes(NamedTuple):
    """What named sizes follow from: both configurations, and the sizes of the fields before."""

    config: Config
    megatron: Config
    known: Mapping[str, Any]


def counts(**megatron: str) -> Field:
    """Return named sizes that are positive whole numbers of Megatron's fields: `counts(hidden="hidden_size")`."""
    return Field(_nothing, _nothing, lambda sizes: {name: _count(sizes.megatron, one) for name, one in megatron.items()})


def switches(**megatron: str) -> Field:
    """Return named switches that are fields of Megatron's: `switches(tied="share_embeddings_and_output_weights")`."""
    return Field(_nothing, _nothing, lambda sizes: {name: bool(sizes.megatron[one]) for name, one in megatron.items()})


def named(**values: Any | Callable[[Model], Any]) -> Field:
    """Return named sizes that follow from others, or are the same in every model of the family.

    `named(stacked=False, mamba_inner=lambda model: model.mamba_heads * model.mamba_dim)`
    """

    def sizes(sizes: Sizes) -> dict[str, Any]:
        model = Model(**sizes.known)
        return {name: one(model) if callable(one) else one for name, one in values.items()}

    return Field(_nothing, _nothing, sizes)


def value(constant: Any) -> Callable[[Config], Any]:
    """Return a default that does not depend on the rest."""
    return lambda _config: constant


def field(
    megatron: str, huggingface: str, *, default: Callable[[Config], Any], null: Callable[[Config], Any] | None = None
) -> Field:
    """Return the field of a number that has two names. Absent on the Hugging Face side means the default, and null what `null`
    says; without it null is refused, as by transformers."""

    def read(config: Config) -> dict[str, Any]:
        if huggingface not in config:
            return {megatron: default(config)}
        found = config[huggingface]
        return {megatron: null(config) if found is None and null else _number(huggingface, found)}

    return Field(read, lambda config: {huggingface: _number(megatron, config[megatron])} if megatron in config else {})


def _number(name: str, found: Any) -> Any:
    """Return the value if it is a number from 0 to what single precision holds, or true or false; else raise UserError."""
    if not isinstance(found, (int, float)) or not 0 <= found < 1e38:
        raise UserError(f"`{name}` is `{format_untrusted(found)}`, which should be a number", hint="the configuration is damaged")
    return found


def required(megatron: str, huggingface: str) -> Field:
    """Return the field of a positive whole number that has two names."""

    def read(config: Config) -> dict[str, Any]:
        return {megatron: _count(config, huggingface)}

    def write(config: Config) -> dict[str, Any]:
        return {huggingface: _count(config, megatron)}

    return Field(read, write)


def _count(config: Config, name: str) -> int:
    found = config.get(name)
    if not isinstance(found, int) or not is_size(found) or found < 1:
        raise UserError(
            f"the model's configuration has `{name}`: `{format_untrusted(found)}`, which should be a whole number above 0",
            hint="`config.json` is missing the field or damaged",
        )
    return found


def flag(megatron: str, *huggingface: str) -> Field:
    """Return one switch in Megatron for several in Hugging Face: on if any is. Conditions know each by its name there."""

    def read(config: Config) -> dict[str, Any]:
        return {megatron: any(bool(config.get(name)) for name in huggingface)}

    return Field(
        read,
        lambda config: dict.fromkeys(huggingface, bool(config.get(megatron))),
        lambda sizes: {name: bool(sizes.megatron[megatron]) and bool(sizes.config.get(name)) for name in huggingface},
    )


def fixed(**fields: Any) -> Field:
    """Return the field of what every model of the family has in Megatron; a configuration with other values is another family."""
    return Field(lambda _config: dict(fields), lambda config: _agreeing(config, fields))


def _agreeing(config: Config, fields: Config) -> dict[str, Any]:
    for name, expected in fields.items():
        if config.get(name, expected) != expected:
            raise UserError(f"`{name}` is `{format_untrusted(config[name])}`, not `{expected}`")
    return {}


_SPELLINGS = {"silu": ("silu", "swish"), "squared_relu": ("relu2",)}
"""What transformers calls a function of torch or megatron-core, where it has other names (`transformers.activations.ACT2CLS`)."""


def activation(*names: str, huggingface: str = "hidden_act") -> Field:
    """Return the activation functions that a family's Megatron model may have, as torch or megatron-core calls them; the first is
    the default."""
    spelled = {word: name for name in names for word in _SPELLINGS.get(name, (name,))}

    def read(config: Config) -> dict[str, Any]:
        found = config.get(huggingface, names[0])
        if found not in spelled:
            supported = " and ".join(f"`{name}`" for name in names)
            raise UserError(f"`{huggingface}` is `{format_untrusted(found)}`; only {supported} is supported for this family")
        return {"activation_func": spelled[found]}

    def write(config: Config) -> dict[str, Any]:
        found = config.get("activation_func", names[0])
        if found not in names:
            raise UserError(f"`activation_func` is `{format_untrusted(found)}`, not `{names[0]}`")
        return {huggingface: _SPELLINGS.get(found, (found,))[0]}

    return Field(read, write)


def window(megatron: str, huggingface: str, *, default: int | None) -> Field:
    """Return the field of sliding attention: Hugging Face counts the tokens seen, the current one included; Megatron those before
    it."""

    def read(config: Config) -> dict[str, Any]:
        tokens = config.get(huggingface, default)
        _check_sliding(config, huggingface, tokens)
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


def no_window(megatron: str) -> Field:
    """Return the field of attention over all tokens before one, in every layer."""

    def read(config: Config) -> dict[str, Any]:
        _check_layers(config, "full_attention")
        return {megatron: None}

    return Field(read, lambda config: _agreeing(config, {megatron: None}))


def _check_sliding(config: Config, name: str, tokens: Any) -> None:
    if tokens is not None and config.get("use_sliding_window") is False:
        raise UserError(
            f"`config.json` says two things: `use_sliding_window` is `False`, `{name}` is `{format_untrusted(tokens)}`",
            hint=f"transformers' models of this family look at `{name}` alone: set it to null if there is no window",
        )
    _check_layers(config, "full_attention" if tokens is None else "sliding_attention")


def _check_layers(config: Config, expected: str) -> None:
    """Raise UserError for layers that attend in another way than the rest of `config.json` says."""
    found = config.get("layer_types")
    other = next((one for one in cast("list[Any]", found) if one != expected), None) if isinstance(found, list) else None
    if other is not None:
        raise UserError(
            f"`layer_types` has `{format_untrusted(other)}`, but models of this family have `{expected}` in all layers",
            hint="is `model_type` right?",
        )


BUILT_IN_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What megatron-core's GPTModel fixes for Llama-3.1's scaling (`RotaryEmbedding._apply_scaling`)."""


_ROPE_FIELDS = ("rope_parameters", "rope_scaling")
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""What each kind of rotary embedding is computed from, beside `rope_theta`."""


def rope_numbers(config: Config) -> dict[str, Any]:
    """Return the rotary embedding parameters of a `config.json`, as transformers 5 writes them (`rope_parameters`) or as 4 did
    (`rope_theta` and `rope_scaling`). UserError where both are there and say different things."""
    objects = {name: found for name in _ROPE_FIELDS if (found := _rope_object(config, name))}
    read = {name: _numbers_of(found, config, name) for name, found in objects.items()}
    if not read:
        return _numbers_of({}, config, "rope_scaling")
    new, *old = read.values()
    for key in _computed_from(new) if old else ():
        if new.get(key) != old[0].get(key):
            raise UserError(
                f"`config.json` has `rope_parameters`, by which `{key}` is `{format_untrusted(new.get(key))}`, and "
                "`rope_scaling`, by "
                f"which it is `{format_untrusted(old[0].get(key))}`",
                hint="the first is of transformers 5, the second, with `rope_theta` beside it, of 4: leave one out",
            )
    return new


def _rope_object(config: Config, name: str) -> Config:
    found: Any = config.get(name) or {}
    if not isinstance(found, dict):
        raise UserError(f"`{name}` is `{format_untrusted(found)}`, which should be an object")
    return cast("Config", found)


def _computed_from(numbers: Config) -> Iterable[str]:
    return "rope_type", "rope_theta", *_ROPE_KEYS.get(numbers["rope_type"], sorted(numbers))


def _numbers_of(said: Config, config: Config, field: str) -> dict[str, Any]:
    """Return the parameters in one field of `config.json`, with those outside it that belong to them."""
    nested = next((key for key, found in said.items() if isinstance(found, dict)), None)
    if nested is not None:
        raise UserError(
            f"`{field}` has parameters of their own for `{format_untrusted(nested)}` layers, which megatron-core cannot "
            "do for this family"
        )
    numbers = dict(said)
    numbers["rope_type"] = _one_of({f"`type` in `{field}`": numbers.pop("type", None), "`rope_type`": said.get("rope_type")})
    numbers["rope_type"] = numbers["rope_type"] or "default"
    theta = _one_of({f"`rope_theta` in `{field}`": said.get("rope_theta"), "`rope_theta`": config.get("rope_theta")})
    numbers["rope_theta"] = _number("rope_theta", 10000.0 if theta is None else theta)
    _check_partial(said, config)
    if numbers["rope_type"] == "llama3":
        numbers["original_max_position_embeddings"] = _original_length(said, config, field)
    return numbers


def _original_length(said: Config, config: Config, field: str) -> Any:
    """Return the length of sequences before the scaling: as transformers, the present one where there is none."""
    name = "original_max_position_embeddings"
    length = _one_of({f"`{name}` in `{field}`": said.get(name), f"`{name}`": config.get(name)})
    return _number(name, config.get("max_position_embeddings", 2048) if length is None else length)


def _check_partial(said: Config, config: Config) -> None:
    part = _one_of({"`partial_rotary_factor` of the rope": said.get("partial_rotary_factor"),
                    "`partial_rotary_factor`": config.get("partial_rotary_factor")})  # fmt: skip
    if part not in (None, 1):
        raise UserError(f"`partial_rotary_factor` is `{format_untrusted(part)}`, but models of this family turn whole heads")


def _one_of(places: Mapping[str, Any]) -> Any:
    """Return the value that several fields of `config.json` should share; None if none is set, UserError if they differ."""
    said = {place: found for place, found in places.items() if found is not None}
    if not said:
        return None
    (first, value), *others = said.items()
    for place, other in others:
        if other != value:
            raise UserError(
                f"`config.json` says two things: {first} is `{format_untrusted(value)}`, {place} is `{format_untrusted(other)}`",
                hint="loaders differ in which they take: leave one out",
            )
    return value


def rope(*kinds: str) -> Field:
    """Return the field of rotary embeddings, scaled in one of the given kinds."""

    def read(config: Config) -> dict[str, Any]:
        numbers = rope_numbers(config)
        kind = numbers["rope_type"]
        if kind not in kinds:
            raise UserError(
                f"`config.json` has rope type `{format_untrusted(kind)}`, which megatron-core cannot do for this family",
                hint=f"supported are: {', '.join(kinds)}",
            )
        found: dict[str, Any] = {"rotary_base": numbers["rope_theta"], "rope_scaling": kind == "llama3"}
        for name in _ROPE_KEYS.get(kind, ()):
            _factor(numbers, name)
        if kind == "llama3":
            found["rope_scaling_factor"] = numbers["factor"]
        if kind == "linear":
            found["seq_len_interpolation_factor"] = numbers["factor"]
        return found

    return Field(read, _write_rope)


def _factor(numbers: Config, name: str) -> Any:
    """Return a number above 0 that a scaling needs, as transformers does; else raise UserError."""
    if name not in numbers:
        raise UserError(
            f"`config.json` has rope type `{numbers['rope_type']}` without `{name}`",
            hint="transformers refuses that too: take the scaling's numbers from the original model",
        )
    if not _number(name, numbers[name]):
        raise UserError(
            f"`{name}` is `{format_untrusted(numbers[name])}`, which should be above 0", hint="the configuration is damaged"
        )
    return numbers[name]


def _write_rope(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_theta": _number("rotary_base", config.get("rotary_base", 10000.0)), "rope_scaling": None}
    if config.get("rope_scaling"):
        factor = _number("rope_scaling_factor", config.get("rope_scaling_factor", 8.0))
        found["rope_scaling"] = {"rope_type": "llama3", "factor": factor, **BUILT_IN_ROPE}
    elif config.get("seq_len_interpolation_factor"):
        found["rope_scaling"] = {"rope_type": "linear", "factor": config["seq_len_interpolation_factor"]}
    return found


def to_megatron(fields: Iterable[Field], config: Config) -> dict[str, Any]:
    """Return Megatron's fields for a `config.json`; a later field wins over an earlier one."""
    found: dict[str, Any] = {}
    for one in fields:
        found |= one.to_megatron(config)
    return found


def to_huggingface(fields: Iterable[Field], config: Config) -> dict[str, Any]:
    """Return the `config.json` fields for Megatron's; UserError where the family has no such model."""
    found: dict[str, Any] = {}
    for one in fields:
        found |= one.to_huggingface(config)
    return found


def make_model(fields: Iterable[Field], config: Config, *, vocab_multiple: int = 1) -> Model:
    """Return the sizes in a `config.json` by the names that the fields give them; of one name, the last field's.

    `vocab_multiple`: the padded vocabulary is the next multiple of it.
    """
    fields = tuple(fields)
    megatron, known = to_megatron(fields, config), dict[str, Any]()
    for one in fields:
        known |= one.sizes(Sizes(config, megatron, known))
    if known.get("heads", 0) % known.get("groups", 1):
        raise UserError(
            f"{known['heads']} attention heads do not divide into {known['groups']} query groups", hint="`config.json` is damaged"
        )
    padded = -(-known["vocab"] // vocab_multiple) * vocab_multiple
    return Model(**{**known, "padded_vocab": padded})
