"""Find the `config.json` that an export follows: the one given, the checkpoint's own, or one rebuilt from its settings.

Everything else that the checkpoint says of its model must agree with it, as tensors do not show all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from converter import consistency, families, megatron_settings, run_config, side_files
from converter.config import TEXT, to_huggingface, to_megatron
from converter.config_mamba import MAMBA
from converter.hybrid import GPT, HYBRID, PATTERN, layout_of
from converter.nemo_config import settings_of
from converter.padded_vocab import rows_of, tokens
from converter.run_config import ModelSettings, UnknownModelError
from converter.side_files import HFReference
from formats.errors import UserError, format_untrusted
from formats.folder import FileRef, Folder
from formats.megatron_reader import MegatronReader


def find(
    reader: MegatronReader,
    given: Folder | None,
    *,
    any_settings: bool = False,
    vocab: int | None = None,
    layout: str | None = None,
) -> HFReference:
    """Return the reference for an export, which follows `given` if it is not None.

    `any_settings`: accept settings that no `config.json` can say; the caller compares them. `vocab`: the number of tokens, for
    a checkpoint that knows its padded vocabulary alone. `layout`: that of the model, for one that does not hold all of it. Raises
    UserError if there is no reference and none can be rebuilt, if two descriptions of the model disagree, and for settings that
    no `config.json` can say.
    """
    descriptions, layout = settings_of(reader), layout or layout_of(reader.specs)
    own = side_files.load(reader.folder)
    known = side_files.from_folder(given) if given else own
    origin = known
    if not known and not any_settings and any(MAMBA in str(description.fields.get(PATTERN)) for description in descriptions):
        origin = _with_mamba(reader, descriptions, vocab, layout)
    notes = () if any_settings else _check_settings(descriptions, origin, layout, rebuilt=not known)
    origin = origin or _rebuilt(reader, descriptions, vocab, layout)
    others = [own] if given and own else []
    rows = consistency.embedding_rows(reader.specs)
    consistency.check(origin, others, descriptions, rows=rows, layout=layout)
    return replace(origin, notes=(*origin.notes, *notes, *_rows_left_out(origin, descriptions, rows or 0)))


def _rows_left_out(origin: HFReference, descriptions: Sequence[ModelSettings], rows: int) -> Iterator[str]:
    """Yield a note if the rows after the vocabulary are not just its padding: they may be tokens that were added."""
    size = to_megatron(families.find(origin.config.get("model_type")).CONFIG, origin.config)["vocab_size"]
    for description in descriptions:
        expected = rows_of(size, description.settings)
        if "make_vocab_size_divisible_by" in description.settings and size < rows != expected:
            yield (
                f"{description.origin} pad {size} tokens to {expected} rows, but the embedding has {rows}: those after {size} "
                f"are left out; where tokens were added, `vocab_size` in the `config.json` of `--hf-config` has to count them"
            )


def _check_settings(
    descriptions: Sequence[ModelSettings], reference: HFReference | None, layout: str, *, rebuilt: bool
) -> tuple[str, ...]:
    """Raise UserError for a setting that no `config.json` can say; return notes on unknown ones if a `reference` that is not
    `rebuilt` says which model the checkpoint holds, else they are refused too. Those that its family says are compared with it
    elsewhere."""
    known = families.find(reference.config.get("model_type"), layout) if reference else None
    compared = to_megatron(known.CONFIG, reference.config) if reference and known else dict.fromkeys(_OF_LAYOUT[layout])
    foreign = [
        (setting, description.origin)
        for description in descriptions
        for setting in megatron_settings.find_unsupported(
            description.settings, only_model_words=description.origin == run_config.ARGS
        )
        if setting.name not in compared
    ]
    for setting, origin in sorted(foreign, key=lambda item: not item[0].known):
        if setting.known or rebuilt:
            raise megatron_settings.unsupported_error(setting, origin)
    return tuple(
        f"{origin} has `{setting.name}`, which is not known here: it is taken not to matter" for setting, origin in foreign
    )


_OF_LAYOUT = {GPT: (), HYBRID: (PATTERN, "is_hybrid_model")}
"""Settings that each layout says of its layers, whatever the family."""


def _with_mamba(
    reader: MegatronReader, descriptions: Sequence[ModelSettings], vocab: int | None, layout: str
) -> HFReference | None:
    """Return the reference that is rebuilt for a model with Mamba layers, of which no family is a plain one: the family has to
    say all settings that change what a model computes. None where none does, so that the settings are refused by name."""
    unsupported = megatron_settings.find_unsupported(descriptions[0].settings, only_model_words=True)
    try:
        return _rebuilt(reader, descriptions, vocab, layout, settings=[setting.name for setting in unsupported if setting.known])
    except UnknownModelError:
        return None


def _rebuilt(
    reader: MegatronReader, descriptions: Sequence[ModelSettings], vocab: int | None, layout: str, *, settings: Sequence[str] = ()
) -> HFReference:
    if not descriptions:
        raise UnknownModelError(
            f"`{reader.folder.label}` says nothing about its model: no `config.json`, no `{run_config.FILE}`, no `args`",
            hint="give a folder with the model's `config.json`: `--hf-config DIR`",
        )
    first = descriptions[0]
    tokenizer = reader.folder.below("tokenizer")
    files = {name: FileRef(tokenizer, name) for name in tokenizer.children() if tokenizer.has(name)}
    fields, note = {name: value for name, value in first.complete.items() if value is not None}, ""
    if "vocab_size" not in fields:
        fields["vocab_size"], note = (vocab, "") if vocab else tokens(first.settings, tokenizer, origin=first.origin)
    config = rebuild_config(fields, first.origin, layout, recorded=first.complete, settings=settings)
    return HFReference(config, f"rebuilt from {first.origin}", files, notes=(note,) if note else ())


def rebuild_config(
    fields: dict[str, Any],
    origin: str,
    layout: str = GPT,
    *,
    recorded: Mapping[str, Any] = MappingProxyType({}),
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a `config.json` for Megatron's fields of a layout, in the first family whose model has all of them and no others,
    none of which is `recorded` as null. `settings`: fields that the family has to say, as they change what a model computes."""
    refused: list[str] = []
    for name in dict.fromkeys((*_PLAINEST, *families.names())):
        if layout not in families.find(name).LAYOUTS:
            continue
        family = families.find(name, layout)
        try:
            config = to_huggingface(family.CONFIG, fields)
            described = to_megatron(family.CONFIG, config)
        except UserError as error:
            refused.append(f"{name}: {error.args[0]}")
            continue
        if TEXT in config:
            continue  # nothing describes the models beside it
        others = _others(described, {**recorded, **fields})
        others += [name for name in settings if name not in described]
        if not others:
            return {"architectures": [family.ARCHITECTURE], "model_type": name, **config}
        refused.append(f"{name}: `{others[0]}` is `{format_untrusted(described.get(others[0]))}` there")
    shown = [text for text in refused if text.startswith(_PLAINEST)]
    raise UnknownModelError(
        f"{origin} describes a model of no supported family ({'; '.join(shown)}; …)",
        hint="give a folder with the model's `config.json`: `--hf-config DIR`",
    )


_PLAINEST = ("llama", "mistral", "qwen2", "qwen3")
"""The families that are tried first: several may have the same model."""


def _others(described: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """Return the fields by which a family's model is another than the recorded one: a field that is not recorded is off."""
    silent = [name for name in described if name not in fields and name in megatron_settings.NEUTRAL]
    return [
        *consistency.differing(described, fields, rows=None),
        *(name for name in silent if not megatron_settings.is_neutral(name, described[name], described)),
    ]
