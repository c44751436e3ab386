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
    return Field(
        _nothing, _nothing, lambda sizes: {name: count(sizes.megatron, field_name) for name, field_name in megatron.items()}
    )


def switches(**megatron: str) -> Field:
    """Return named switches that are fields of Megatron's: `switches(tied="share_embeddings_and_output_weights")`."""
    return Field(
        _nothing, _nothing, lambda sizes: {name: bool(sizes.megatron[field_name]) for name, field_name in megatron.items()}
    )


def named(**values: Any | Callable[[Model], Any]) -> Field:
    """Return named sizes that follow from others, or are the same in every model of the family.

    `named(stacked=False, mamba_inner=lambda model: model.mamba_heads * model.mamba_dim)`
    """

    def sizes(sizes: Sizes) -> dict[str, Any]:
        model = Model(**sizes.known)
        return {name: size(model) if callable(size) else size for name, size in values.items()}

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
        given = config[huggingface]
        return {megatron: null(config) if given is None and null else number(huggingface, given)}

    return Field(read, lambda config: {huggingface: number(megatron, config[megatron])} if megatron in config else {})


def optional(megatron: str, huggingface: str, *, default: Any = None) -> Field:
    """Return the field of a number that may be null, on both sides: without one, the model does not do it."""

    def read(config: Config) -> dict[str, Any]:
        given = config.get(huggingface, default)
        return {megatron: None if given is None else number(huggingface, given)}

    def write(config: Config) -> dict[str, Any]:
        given = config.get(megatron)
        return {huggingface: None if given is None else number(megatron, given)}

    return Field(read, write)


def number(name: str, given: Any) -> Any:
    """Return the value if it is a number from 0 to what single precision holds, or true or false; else raise UserError."""
    if not isinstance(given, (int, float)) or not 0 <= given < 1e38:
        raise UserError(f"`{name}` is `{format_untrusted(given)}`, which should be a number", hint="the configuration is damaged")
    return given


def positive(name: str, given: Any) -> Any:
    """Return the value if it is a number above 0 whose reciprocal single precision holds too; else raise UserError."""
    if number(name, given) < 1e-38:
        raise UserError(f"`{name}` is `{format_untrusted(given)}`, which should be above 0", hint="the configuration is damaged")
    return given


def object_of(config: Config, name: str) -> Config:
    """Return the object that a field of a configuration holds, empty where it has none; UserError for anything else."""
    given: Any = config.get(name) or {}
    if not isinstance(given, dict):
        raise UserError(f"`{name}` is `{format_untrusted(given)}`, which should be an object")
    return cast("Config", given)


def required(megatron: str, huggingface: str) -> Field:
    """Return the field of a positive whole number that has two names."""

    def read(config: Config) -> dict[str, Any]:
        return {megatron: count(config, huggingface)}

    def write(config: Config) -> dict[str, Any]:
        return {huggingface: count(config, megatron)}

    return Field(read, write)


def count(config: Config, name: str) -> int:
    """Return a positive whole number of a configuration; UserError where it has none of that name."""
    given = config.get(name)
    if not isinstance(given, int) or not is_size(given) or given < 1:
        raise UserError(
            f"the model's configuration has `{name}`: `{format_untrusted(given)}`, which should be a whole number above 0",
            hint="`config.json` is missing the field or damaged",
        )
    return given


def flag(megatron: str, *huggingface: str, default: bool = False) -> Field:
    """Return one switch in Megatron for several in Hugging Face: on if any is. Conditions know each by its name there.

    `default` is what a switch is that `config.json` does not have.
    """

    def read(config: Config) -> dict[str, Any]:
        return {megatron: any(bool(config.get(name, default)) for name in huggingface)}

    return Field(
        read,
        lambda config: dict.fromkeys(huggingface, bool(config.get(megatron))),
        lambda sizes: {name: bool(sizes.megatron[megatron] and sizes.config.get(name, default)) for name in huggingface},
    )


def fixed(**fields: Any) -> Field:
    """Return the field of what every model of the family has in Megatron; a configuration with other values is another family."""
    return Field(lambda _config: dict(fields), lambda config: agreeing(config, fields))


def agreeing(config: Config, fields: Config) -> dict[str, Any]:
    """Return nothing, for a configuration that has these values or none; else raise UserError."""
    for name, expected in fields.items():
        if config.get(name, expected) != expected:
            raise UserError(f"`{name}` is `{format_untrusted(config[name])}`, not `{expected}`")
    return {}


def one_of(fields: Mapping[str, Any]) -> Any:
    """Return the value that several fields of `config.json` should share; None if none is set, UserError if they differ."""
    given = {field: setting for field, setting in fields.items() if setting is not None}
    if not given:
        return None
    (first, value), *others = given.items()
    for field, other in others:
        if other != value:
            raise UserError(
                f"`config.json` says two things: {first} is `{format_untrusted(value)}`, {field} is `{format_untrusted(other)}`",
                hint="loaders differ in which they take: leave one out",
            )
    return value


ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "fast_gelu", "gelu_fast": "fast_gelu",
    "gelu_pytorch_tanh": "fast_gelu", "gelu_python_tanh": "fast_gelu", "quick_gelu": "quick_gelu", "relu": "relu",
    "relu2": "squared_relu", "xielu": "xielu",
}  # fmt: skip
"""What torch, megatron-core (`megatron.core.activations`) and the trainer call the functions of transformers
(`transformers.activations.ACT2CLS`). `fast_gelu` is GELU by tanh."""


def activation(*names: str, huggingface: str = "hidden_act") -> Field:
    """Return the activation functions that a family may have, as transformers calls them; the first is the default.

    Other names of the same functions are read too, and come back as these.
    """
    functions = {ACTIVATIONS[name] for name in names}
    spelled = {function: next(name for name in names if ACTIVATIONS[name] == function) for function in functions}

    def read(config: Config) -> dict[str, Any]:
        given = config.get(huggingface, names[0])
        function = ACTIVATIONS.get(given) if isinstance(given, str) else None
        if function not in functions:
            supported = " and ".join(f"`{name}`" for name in names)
            raise UserError(f"`{huggingface}` is `{format_untrusted(given)}`; only {supported} is supported for this family")
        return {"activation_func": function}

    def write(config: Config) -> dict[str, Any]:
        given = config.get("activation_func", ACTIVATIONS[names[0]])
        if not isinstance(given, str) or given not in spelled:
            raise UserError(f"`activation_func` is `{format_untrusted(given)}`, not {' or '.join(sorted(spelled))}")
        return {huggingface: spelled[given]}

    return Field(read, write)


def derived(
    megatron: str, huggingface: str, read: Callable[[Any], Any], write: Callable[[Any], Any], *, default: Any = None
) -> Field:
    """Return the field of a number above 0 that is another on each side: `read` computes Megatron's, `write` Hugging Face's.

    None, and the default where it is None, mean that neither side has one.
    """

    def there(config: Config) -> dict[str, Any]:
        given = config.get(huggingface, default)
        return {megatron: None if given is None else read(positive(huggingface, given))}

    def back(config: Config) -> dict[str, Any]:
        given = config.get(megatron)
        return {huggingface: None if given is None else undone(read, write, positive(megatron, given))}

    return Field(there, back)


def undone(read: Callable[[Any], Any], write: Callable[[Any], Any], number: Any) -> Any:
    """Return `write(number)`, without the last digits where these are rounding errors: √256 squared is 256."""
    exact = write(number)
    rounded = float(f"{exact:.14g}")
    rounded = int(rounded) if rounded.is_integer() else rounded
    return rounded if read(rounded) == number else exact


TEXT = "text_config"
"""The field of `config.json` that describes the language model, where other models are beside it."""


def language_model(config: Config) -> Config:
    """Return the part of a `config.json` that describes the language model: all of it, but for models with towers."""
    text = config.get(TEXT)
    return cast("Config", text) if isinstance(text, dict) else config


def to_megatron(fields: Iterable[Field], config: Config) -> dict[str, Any]:
    """Return Megatron's fields for a `config.json`; a later field wins over an earlier one."""
    megatron: dict[str, Any] = {}
    for item in fields:
        megatron |= item.to_megatron(config)
    return megatron


def to_huggingface(fields: Iterable[Field], config: Config) -> dict[str, Any]:
    """Return the `config.json` fields for Megatron's; UserError where the family has no such model."""
    huggingface: dict[str, Any] = {}
    for item in fields:
        huggingface |= item.to_huggingface(config)
    return huggingface


def sizes_of(fields: Iterable[Field], before: Sizes) -> dict[str, Any]:
    """Return the named sizes of fields beside those known before; of one name, the last field's."""
    sizes: dict[str, Any] = {}
    for item in fields:
        sizes |= item.sizes(before._replace(known={**before.known, **sizes}))
    return sizes


def make_model(fields: Iterable[Field], config: Config, *, vocab_multiple: int = 1) -> Model:
    """Return the sizes in a `config.json` by the names that the fields give them; of one name, the last field's.

    `vocab_multiple`: the padded vocabulary is the next multiple of it.
    """
    fields = tuple(fields)
    known = sizes_of(fields, Sizes(config, to_megatron(fields, config), {}))
    if known.get("heads", 0) % known.get("groups", 1):
        raise UserError(
            f"{known['heads']} attention heads are not divisible by {known['groups']} query groups",
            hint="`config.json` is damaged",
        )
    padded = -(-known["vocab"] // vocab_multiple) * vocab_multiple
    return Model(**{**known, "padded_vocab": padded})
