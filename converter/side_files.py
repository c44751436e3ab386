"""Store a Hugging Face model's side files in a Megatron checkpoint, so that an export needs nothing else.

Beside the weights, the iteration directory holds `huggingface/`: the source's side files untouched, the raw header of each
of its safetensors files (which fixes names, order and shard boundaries), and the tensors that no Megatron model has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from converter.plan import as_stored, pieces
from converter.run import PIECE_BYTES, PieceBuffers
from formats.arrays import as_bytes
from formats.content import LARGEST_POINTER, refuse_pointer
from formats.errors import UserError, format_untrusted
from formats.folder import FileRef, Folder
from formats.huggingface import HuggingFaceReader, Shard, parse_shard, shard_of, side_files
from formats.json_objects import read_json
from formats.shard_files import INDEX
from formats.spec import Reader

FOLDER = "huggingface"
FILES = f"{FOLDER}/files"
HEADERS = f"{FOLDER}/headers"
EXTRAS = f"{FOLDER}/extras.safetensors"
CONFIG = "config.json"

TOKENIZER = "tokenizer"
_BESIDE = (FOLDER, TOKENIZER)
"""The folders of an iteration that hold no weights."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "tekken.json",
)  # fmt: skip


class SideFiles(NamedTuple):
    """What an import adds to the iteration directory, by relative names."""

    documents: Mapping[str, bytes]
    """Small files, with their bytes."""

    copies: Mapping[str, FileRef]
    """Files that are copied as they are."""

    extras: Shard | None = None
    """The file of the tensors that no Megatron model has, which may be large: their data is moved as that of weights is."""


def collect(reader: HuggingFaceReader, extras: tuple[str, ...]) -> SideFiles:
    """Return everything of a Hugging Face directory but its weights, and the tensors `extras`."""
    reference, _ = of_model(reader)
    return collect_model(reference, reader, extras)


def collect_model(reference: HFReference, reader: Reader, extras: tuple[str, ...]) -> SideFiles:
    """Return the side files and shard map of a model that was opened, and the tensors `extras`."""
    files = collect_again(reference)
    documents = {**files.documents, **{f"{HEADERS}/{name}": shard.raw for name, shard in reference.shards.items()}}
    shard = shard_of(reader.specs[name] for name in extras) if extras else None
    return SideFiles(documents, files.copies, shard)


def blocks_of(extras: Shard, reader: Reader) -> Iterator[bytes | memoryview]:
    """Yield the bytes of the file of `extras`, a piece at a time; each is valid until the next one."""
    yield extras.raw
    buffers = PieceBuffers()
    for piece in pieces(as_stored(extras.tensors).values(), limit=PIECE_BYTES):
        yield as_bytes(buffers.make(piece, reader))


def collect_again(origin: HFReference) -> SideFiles:
    """Return the side files alone, without shard map and extras: for an adapter's checkpoint, which has no weights."""
    config = {} if CONFIG in origin.files else {f"{FILES}/{CONFIG}": (json.dumps(origin.config, indent=2) + "\n").encode()}
    return SideFiles(config, _copies(origin.files))


def _copies(files: Mapping[str, FileRef]) -> dict[str, FileRef]:
    """Return side files by their new names; those of the tokenizer twice, as Megatron-Bridge looks in `tokenizer/`."""
    tokenizer = {f"{TOKENIZER}/{name}": file for name, file in files.items() if name in TOKENIZER_FILES}
    return {**{f"{FILES}/{name}": file for name, file in files.items()}, **tokenizer}


def stored(iteration: Folder) -> dict[str, FileRef]:
    """Return the side files of an iteration, by their names there, without the extras."""
    folders = {name: iteration.below(name) for name in _BESIDE}
    files = {f"{name}/{file}": FileRef(folder, file) for name, folder in folders.items() for file in folder.files()}
    return {name: file for name, file in files.items() if name != EXTRAS and not name.endswith("/")}


@dataclass(frozen=True, slots=True)
class HFReference:
    """What an export knows of the Hugging Face model: `config.json`, side files, and the shard map if there is one."""

    config: Mapping[str, Any]
    origin: str
    """Where `config.json` is from, in words."""

    files: Mapping[str, FileRef] = field(default_factory=dict[str, FileRef])
    shards: Mapping[str, Shard] = field(default_factory=dict[str, Shard])
    extras: FileRef | None = None
    notes: tuple[str, ...] = ()
    """What a user should know of its origin."""


def load(iteration: Folder) -> HFReference | None:
    """Return what an import stored in an iteration; None if it has no `config.json`."""
    files, headers = iteration.below(FILES), iteration.below(HEADERS)
    if not files.has(CONFIG):
        return None
    shards = {name: parse_shard(headers.get(name), source=f"{HEADERS}/{name}", any_dtype=True) for name in headers.files()}
    _check_once(shards)
    return HFReference(
        read_json(files, CONFIG),
        "the checkpoint's own",
        {name: FileRef(files, name) for name in files.files()},
        shards,
        FileRef(iteration, EXTRAS) if iteration.has(EXTRAS) else None,
    )


def _check_once(shards: Mapping[str, Shard]) -> None:
    """Raise UserError if two stored headers hold the same tensor."""
    seen: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in seen:
                raise UserError(f"`{name}` is in two headers under `{HEADERS}`: `{seen[name]}` and `{file}`")
            seen[name] = file


def of_model(reader: HuggingFaceReader) -> tuple[HFReference, list[str]]:
    """Return what a Hugging Face directory says of its own weights, and the files in it that are not part of the model."""
    folder, elsewhere = reader.beside, reader.beside is not reader.folder
    names, left_out = side_files(folder, () if elsewhere else reader.files, indexed=reader.indexed)
    files = {name: FileRef(folder, name) for name in names}
    for name in names:
        if name in TOKENIZER_FILES and folder.size(name) <= LARGEST_POINTER:
            refuse_pointer(folder, name)
    config = config_of(reader)
    _check_weights_file(config, reader)
    return HFReference(config, f"`{folder.label}`'s", files, reader.shards), [] if elsewhere else left_out


def config_of(reader: HuggingFaceReader) -> dict[str, Any]:
    """Return the `config.json` of a model. Raises UserError if it has none."""
    if not reader.beside.has(CONFIG):
        raise UserError(
            f"`{reader.folder.label}` has no `{CONFIG}`, which says what model its tensors are of",
            hint=f"put the model's `{CONFIG}` beside them; `hf-to-mcore`, `merge`, `average` and `extend-vocab` also take "
            "the folder that has it: `--hf-config DIR`",
        )
    return read_json(reader.beside, CONFIG)


def _check_weights_file(config: Mapping[str, Any], reader: HuggingFaceReader) -> None:
    """Raise UserError if `config.json` makes transformers read other files than were opened here."""
    wanted = config.get("transformers_weights")
    if wanted is not None and reader.shards and wanted not in (INDEX, *reader.shards):
        raise UserError(
            f"`transformers_weights` in `{CONFIG}` is `{format_untrusted(wanted)}`, but the weights here are in "
            f"`{min(reader.shards)}`",
            hint="transformers would load that file: remove the field, or the other files",
        )


def from_folder(folder: Folder) -> HFReference:
    """Return the reference of a Hugging Face directory, or of one with a `config.json` alone. Its weights are not read."""
    if not folder.has(CONFIG):
        raise UserError(f"`{folder.label}` has no `{CONFIG}`", hint="`--hf-config` takes a folder with a `config.json`")
    config = read_json(folder, CONFIG)
    names, _ = side_files(folder, (), indexed=True)
    return HFReference(config, f"`{folder.label}`'s", {name: FileRef(folder, name) for name in names if name != INDEX})
