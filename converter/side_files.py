"""What travels with a Megatron checkpoint so that the way back needs nothing else.

Beside the weights, the iteration directory holds `huggingface/`: the source's side files untouched, the raw header of each
of its safetensors files (which fix names, order and shard boundaries), and the tensors no Megatron model has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from blake3 import blake3

from formats.arrays import as_bytes
from formats.content import LARGEST_POINTER, refuse_pointer
from formats.errors import UserError, format_untrusted
from formats.folder import FileRef, Folder
from formats.huggingface import HuggingFaceReader, Shard, make_header, parse_shard, side_files
from formats.json_objects import read_json
from formats.shard_files import INDEX
from formats.spec import Reader

FOLDER = "huggingface"
FILES = f"{FOLDER}/files"
HEADERS = f"{FOLDER}/headers"
EXTRAS = f"{FOLDER}/extras.safetensors"
CONFIG = "config.json"

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "tekken.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SideFiles:
    """What an import adds to the iteration directory: small documents by their bytes, other files by where they are;
    `hashes` are those of the tensors that no Megatron model has."""

    documents: Mapping[str, bytes]
    hashes: Mapping[str, str]
    copies: Mapping[str, FileRef]


def collect(reader: HuggingFaceReader, extras: tuple[str, ...]) -> SideFiles:
    """Everything of a Hugging Face directory but the weights themselves."""
    reference, _ = of_model(reader)
    return collect_model(reference, reader, extras)


def collect_model(reference: HFReference, reader: Reader, extras: tuple[str, ...]) -> SideFiles:
    """The same of a model that was opened: its side files and its shard map, and the `extras`."""
    beside = collect_again(reference)
    documents = {**beside.documents, **{f"{HEADERS}/{name}": shard.raw for name, shard in reference.shards.items()}}
    data = {name: _bytes_of(reader, name) for name in extras}
    if extras:
        documents[EXTRAS] = make_header(reader.specs[name] for name in extras) + b"".join(data.values())
    hashes = {name: blake3(value).hexdigest() for name, value in data.items()}
    return SideFiles(documents, hashes, beside.copies)


def collect_again(origin: HFReference) -> SideFiles:
    """The side files of a model that is known already: for a checkpoint without its weights, an adapter's, nothing else."""
    config = {} if CONFIG in origin.files else {f"{FILES}/{CONFIG}": (json.dumps(origin.config, indent=2) + "\n").encode()}
    return SideFiles(config, {}, _copies(origin.files))


def _copies(files: Mapping[str, FileRef]) -> dict[str, FileRef]:
    """Where side files go; those of the tokenizer a second time, where Megatron-Bridge looks for them."""
    tokenizer = {f"tokenizer/{name}": file for name, file in files.items() if name in TOKENIZER_FILES}
    return {**{f"{FILES}/{name}": file for name, file in files.items()}, **tokenizer}


def _bytes_of(reader: Reader, name: str) -> bytes:
    spec = reader.specs[name]
    values = np.empty(spec.shape, spec.dtype)
    reader.read(name, spec.full_region, values)
    return bytes(as_bytes(values))


@dataclass(frozen=True, slots=True)
class HFReference:
    """What an export knows of the Hugging Face side: its `config.json`, its side files, and its shard map if there is one."""

    config: Mapping[str, Any]
    origin: str
    files: Mapping[str, FileRef] = field(default_factory=dict[str, FileRef])
    shards: Mapping[str, Shard] = field(default_factory=dict[str, Shard])
    extras: FileRef | None = None
    notes: tuple[str, ...] = ()
    """What a user should know of where it is from."""


def load(iteration: Folder) -> HFReference | None:
    """What an import put there; None if this checkpoint carries no `config.json`."""
    files, headers = iteration.below(FILES), iteration.below(HEADERS)
    if not files.has(CONFIG):
        return None
    shards = {name: parse_shard(headers.get(name), source=f"{HEADERS}/{name}") for name in headers.files()}
    _check_once(shards)
    return HFReference(
        read_json(files, CONFIG),
        "the checkpoint's own",
        {name: FileRef(files, name) for name in files.files()},
        shards,
        FileRef(iteration, EXTRAS) if iteration.has(EXTRAS) else None,
    )


def _check_once(shards: Mapping[str, Shard]) -> None:
    """Raise UserError if two carried headers hold one tensor."""
    seen: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in seen:
                raise UserError(f"`{name}` is in two headers under `{HEADERS}`: `{seen[name]}` and `{file}`")
            seen[name] = file


def of_model(reader: HuggingFaceReader) -> tuple[HFReference, list[str]]:
    """What a Hugging Face directory says of its own weights; and the files in it that do not travel."""
    travels, left_out = side_files(reader.folder, reader.shards, indexed=reader.indexed)
    files = {name: FileRef(reader.folder, name) for name in travels}
    for name in travels:
        if name in TOKENIZER_FILES and reader.folder.size(name) <= LARGEST_POINTER:
            refuse_pointer(reader.folder, name)
    config = read_json(reader.folder, CONFIG)
    _check_weights_file(config, reader)
    return HFReference(config, f"`{reader.folder.label}`'s", files, reader.shards), left_out


def _check_weights_file(config: Mapping[str, Any], reader: HuggingFaceReader) -> None:
    """Raise UserError where `config.json` says that transformers reads other files than were opened here."""
    wanted = config.get("transformers_weights")
    if wanted is not None and wanted not in (INDEX, *reader.shards):
        raise UserError(
            f"`transformers_weights` in `{CONFIG}` is `{format_untrusted(wanted)}`, but the weights here are in "
            f"`{min(reader.shards)}`",
            hint="transformers would load that file: remove the field, or the other files",
        )


def from_folder(folder: Folder) -> HFReference:
    """A Hugging Face directory, or one with a `config.json` alone, given as reference. Its weights are not looked at."""
    if not folder.has(CONFIG):
        raise UserError(f"`{folder.label}` has no `{CONFIG}`", hint="`--hf-config` takes a folder with a `config.json`")
    config = read_json(folder, CONFIG)
    travels, _ = side_files(folder, (), indexed=True)
    return HFReference(config, f"`{folder.label}`'s", {name: FileRef(folder, name) for name in travels if name != INDEX})
