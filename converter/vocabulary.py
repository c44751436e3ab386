"""What depends on the number of a model's tokens: the tensors with a row for each, by its family's rules, and its settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from converter.config import TEXT, language_model, make_model, to_megatron
from converter.families import Family
from converter.model import Model
from converter.plan import list_names
from converter.rules import Rule, at, fill, tied_names
from formats.errors import UserError
from formats.spec import TensorSpec, is_size

_FIELDS = ("vocab_size", "padded_vocab_size")
"""The fields of a `config.json` that count tokens."""

_OF_TOKEN = ("_token_id", "_token_index")
"""How the names of fields end that hold the number of a token, or a list of some."""


def _rules(family: Family) -> Iterator[Rule]:
    """Yield the rules of tensors with a row for each token: those that Megatron pads."""
    return (rule for rule in family.RULES if rule.padded)


def huggingface_names(family: Family, model: Model, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Return the Hugging Face tensors with a row for each token, each with the one that it is tied to, or itself."""
    indices = at(model, model.layers)
    own = {name: name for rule in _rules(family) for name in rule.names(indices)[1] if name in specs}
    return own | {name: other for name, other in tied_names(family.RULES, model).items() if name in specs and other in own}


def megatron_names(family: Family, model: Model, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Return the Megatron tensors with a row for each token, each with its Hugging Face name."""
    indices = at(model, model.layers)
    both = (
        (fill(template, indices), rule.names(indices)[1][0])
        for rule in _rules(family)
        for template in (rule.megatron, rule.alias)
    )
    return {name: other for name, other in both if name in specs}


def refuse_unknown(passing: Iterable[TensorSpec], model: Model) -> None:
    """Raise UserError for tensors that pass through untouched and may have a row for each token."""
    if names := [spec.name for spec in passing if model.vocab in spec.stored_shape]:
        raise UserError(
            f"{list_names(names)} may have a row for each of the {model.vocab} tokens: the rules of this family do not say",
            hint="a model with other rows there and in its embedding would not load: remove these tensors first",
        )


def resized_config(family: Family, config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return a `config.json` with another number of tokens. Raises UserError where that would change more of the model."""
    tokens = make_model(family.CONFIG, config).vocab
    changed = _with_size(config, tokens, size)
    text = config.get(TEXT)
    if isinstance(text, dict):
        changed[TEXT] = _with_size(cast("dict[str, Any]", text), tokens, size)
    counted = dict(language_model(changed))
    if not counted.keys() & set(_FIELDS):  # the default of the family's class
        counted["vocab_size"] = size
        changed = {**changed, TEXT: counted} if isinstance(text, dict) else counted
    _check_the_rest(family, config, changed, size)
    return changed


def _with_size(fields: Mapping[str, Any], tokens: int, size: int) -> dict[str, Any]:
    return {name: size if name in _FIELDS and value == tokens else value for name, value in fields.items()}


def _check_the_rest(family: Family, before: Mapping[str, Any], after: Mapping[str, Any], size: int) -> None:
    """Raise UserError if two `config.json` differ in more than the number of tokens, or the second has another one."""
    one, other = (to_megatron(family.CONFIG, config) for config in (before, after))
    unlike = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name) and name not in _FIELDS]
    if unlike or make_model(family.CONFIG, after).vocab != size:
        why = f"would change {list_names(sorted(unlike))} too" if unlike else "is not how its `config.json` counts them"
        raise UserError(
            f"{size} tokens {why} in a model of this family ({family.MODELS})",
            hint="code of this family's tells its models apart by the number of tokens",
        )


def refuse_lost_tokens(documents: Mapping[str, Mapping[str, Any]], size: int) -> None:
    """Raise UserError for documents that name tokens which are not among the first `size`."""
    for file, document in documents.items():
        text = document.get(TEXT)
        fields = {**document, **(cast("dict[str, Any]", text) if isinstance(text, dict) else {})}
        lost = [f"`{name}` {number}" for name, value in fields.items() for number in _numbers(name, value) if number >= size]
        if lost:
            raise UserError(
                f"`{file}` names tokens that {size} rows do not hold: {', '.join(lost)}",
                hint="choose a larger size, or change these numbers first",
            )


def _numbers(name: str, value: Any) -> Iterator[int]:
    """Yield the numbers of tokens that a field holds."""
    if name.endswith(_OF_TOKEN):
        yield from (number for number in (cast("list[Any]", value) if isinstance(value, list) else [value]) if is_size(number))
