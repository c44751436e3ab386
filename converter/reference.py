"""Which `config.json` an export follows: the one given, the one that travelled, or one rebuilt from what the checkpoint
says of its model. Whatever else the checkpoint says must agree with it: tensors do not show it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from converter import consistency, families, megatron_settings, run_config, side_files
from converter.config import to_huggingface
from converter.padded_vocab import rows_of, tokens
from converter.run_config import ModelSettings, UnknownModelError
from converter.side_files import HFReference
from formats.errors import UserError
from formats.folder import FileRef, Folder
from formats.torch_dist import TorchDistReader


def find(reader: TorchDistReader, given: Folder | None, *, any_settings: bool = False, vocab: int | None = None) -> HFReference:
    """Return the reference for an export; UserError where there is none and none can be rebuilt, where two places say different
    things of the model, and for settings that no `config.json` can say.

    `any_settings`: those settings are the caller's business, who compares them. `vocab`: how many tokens there are, where the
    checkpoint knows its padded vocabulary alone.
    """
    said = run_config.read_all(reader.folder, reader.args())
    own = side_files.load(reader.folder)
    notes = () if any_settings else _check_settings(said, sure=given is not None or own is not None)
    origin = side_files.from_folder(given) if given else own or _rebuilt(reader, said, vocab)
    others = [own] if given and own else []
    rows = consistency.embedding_rows(reader.specs)
    consistency.check(origin, others, said, rows=rows)
    return replace(origin, notes=(*origin.notes, *notes, *_rows_left_out(origin, said, rows or 0)))


def _rows_left_out(origin: HFReference, said: Sequence[ModelSettings], rows: int) -> Iterator[str]:
    """Tell of rows after the vocabulary that are more, or fewer, than its padding: they may be tokens that were added."""
    size = origin.config["vocab_size"]
    for one in said:
        expected = rows_of(size, one.settings)
        if "make_vocab_size_divisible_by" in one.settings and size < rows != expected:
            yield (
                f"{one.origin} pad {size} tokens to {expected} rows, but the embedding has {rows}: those after {size} are left "
                f"out; where tokens were added, `vocab_size` in the `config.json` of `--hf-config` has to count them"
            )


def _check_settings(said: Sequence[ModelSettings], *, sure: bool) -> tuple[str, ...]:
    """Raise UserError for a setting that no `config.json` can say. One that is unknown here is only noted where somebody is
    `sure` which model it is."""
    found = [
        (one, place.origin)
        for place in said
        for one in megatron_settings.find_unsupported(place.settings, only_model_words=place.origin == run_config.ARGS)
    ]
    for one, origin in sorted(found, key=lambda each: not each[0].known):
        if one.known or not sure:
            raise megatron_settings.unsupported_error(one, origin)
    return tuple(f"{origin} has `{one.name}`, which is not known here: it is taken not to matter" for one, origin in found)


def _rebuilt(reader: TorchDistReader, said: Sequence[ModelSettings], vocab: int | None) -> HFReference:
    if not said:
        raise UnknownModelError(
            f"`{reader.folder.label}` says nothing about its model: no `config.json`, no `{run_config.FILE}`, no `args`",
            hint="give a folder with the model's `config.json`: `--hf-config DIR`",
        )
    first = said[0]
    tokenizer = reader.folder.below("tokenizer")
    files = {name: FileRef(tokenizer, name) for name in tokenizer.children() if tokenizer.has(name)}
    fields, note = {name: value for name, value in first.complete.items() if value is not None}, ""
    if "vocab_size" not in fields:
        fields["vocab_size"], note = (vocab, "") if vocab else tokens(first.settings, tokenizer, origin=first.origin)
    config = rebuild_config(fields, first.origin)
    return HFReference(config, f"rebuilt from {first.origin}", files, notes=(note,) if note else ())


def rebuild_config(fields: dict[str, Any], origin: str) -> dict[str, Any]:
    """A `config.json` for Megatron's fields, in the first family that can say them."""
    refused: list[str] = []
    for name in families.names():
        family = families.find(name)
        try:
            config = to_huggingface(family.CONFIG, fields)
        except UserError as error:
            refused.append(f"{name}: {error.args[0]}")
            continue
        return {"architectures": [family.ARCHITECTURE], "model_type": name, **config}
    raise UnknownModelError(
        f"{origin} describes a model of no supported family ({'; '.join(refused)})",
        hint="give a folder with the model's `config.json`: `--hf-config DIR`",
    )
