"""Fields of `config.json` that have other names beside them, or are in objects inside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from converter.config import (
    TEXT,
    Config,
    Field,
    Sizes,
    language_model,
    object_of,
    one_of,
    sizes_of,
    to_huggingface,
    to_megatron,
)
from formats.errors import UserError, format_untrusted


def renamed(fields: Iterable[Field], **names: str) -> Field:
    """Return fields whose names in `config.json` have others beside them: `renamed(SIZES, num_layers="num_hidden_layers")`.

    Either is read; both are written. UserError where both are there and differ.
    """
    fields = tuple(fields)

    def plain(config: Config) -> Config:
        values = {other: one_of({f"`{key}`": config.get(key) for key in (name, other)}) for name, other in names.items()}
        return {**config, **{name: value for name, value in values.items() if value is not None}}

    def write(config: Config) -> dict[str, Any]:
        written = to_huggingface(fields, config)
        return {**written, **{name: written[other] for name, other in names.items() if other in written}}

    return Field(
        lambda config: to_megatron(fields, plain(config)),
        write,
        lambda sizes: sizes_of(fields, sizes._replace(config=plain(sizes.config))),
    )


def flattened(objects: Iterable[str], fields: Iterable[Field]) -> Field:
    """Return fields of which some are in objects of `config.json`, where their names are `object.name`."""
    objects, fields = tuple(objects), tuple(fields)

    def flat(config: Config) -> Config:
        inside = {f"{parent}.{name}": value for parent in objects for name, value in object_of(config, parent).items()}
        return {**{name: value for name, value in config.items() if name not in objects}, **inside}

    def write(config: Config) -> dict[str, Any]:
        written: dict[str, Any] = {}
        for name, value in to_huggingface(fields, config).items():
            parent, dot, inner = name.partition(".")
            if dot:
                written.setdefault(parent, {})[inner] = value
            else:
                written[name] = value
        return written

    return Field(
        lambda config: to_megatron(fields, flat(config)),
        write,
        lambda sizes: sizes_of(fields, sizes._replace(config=flat(sizes.config))),
    )


_TIED = "tie_word_embeddings"


def text_config(families: Mapping[str, Iterable[Field]], defaults: Config | None = None) -> Field:
    """Return the field of a language model beside other models: `config.json` describes it in `text_config`.

    `families` are the fields of each `model_type` that it may have there; the first is meant where it has none. `defaults` is
    what holds where `text_config` does not say it.
    """
    kinds = {name: tuple(fields) for name, fields in families.items()}

    def inside(config: Config) -> tuple[tuple[Field, ...], Config]:
        text = _text_of(config)
        kind = text.get("model_type", next(iter(kinds)))
        if kind not in kinds:
            raise UserError(
                f"`model_type` in `{TEXT}` is `{format_untrusted(kind)}`", hint=f"models of this family have {', '.join(kinds)}"
            )
        return kinds[kind], {**(defaults or {}), **text}

    def write(config: Config) -> dict[str, Any]:
        name, text = _first_that_fits(kinds, config)
        return {TEXT: {"model_type": name, **text}, _TIED: text.get(_TIED)}

    def sizes(before: Sizes) -> dict[str, Any]:
        fields, text = inside(before.config)
        return sizes_of(fields, before._replace(config=text))

    return Field(lambda config: to_megatron(*inside(config)), write, sizes)


def _text_of(config: Config) -> dict[str, Any]:
    """Return `text_config`. Whether output and input embeddings are tied is set beside it, inside it, or in both."""
    text = language_model(config)
    if text is config:
        raise UserError(f"`config.json` has no object `{TEXT}`", hint="which describes the language model of this family")
    outside, within = config.get(_TIED), text.get(_TIED)
    if outside is False and within:  # the other way round is what transformers 5 writes, and weights show what is meant
        one_of({f"`{_TIED}`": outside, f"`{_TIED}` in `{TEXT}`": within})
    return {**text, **({} if outside is None else {_TIED: outside})}


def _first_that_fits(kinds: Mapping[str, Iterable[Field]], config: Config) -> tuple[str, dict[str, Any]]:
    """Return the name and the fields of the first kind of model that these fields of Megatron's may be of."""
    refused: list[UserError] = []
    for name, fields in kinds.items():
        try:
            return name, to_huggingface(fields, config)
        except UserError as error:
            refused.append(error)
    raise refused[-1]
