"""What travels with a Megatron checkpoint so that the way back needs nothing else.

Beside the weights, the iteration directory holds `huggingface/`: the source's side files untouched, the raw header of each
of its safetensors files (which fix names, order and shard boundaries), and the tensors no Megatron model has.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from formats.disk import as_bytes
from formats.errors import UserError
from formats.huggingface import (
    INDEX,
    HuggingFaceReader,
    Shard,
    files_below,
    make_header,
    parse_shard,
    side_files,
)
from formats.json_objects import read_json

FOLDER = "huggingface"
FILES = f"{FOLDER}/files"
HEADERS = f"{FOLDER}/headers"
EXTRAS = f"{FOLDER}/extras.safetensors"
CONFIG = "config.json"

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "tekken.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Luggage:
    """What an import adds to the iteration directory: small documents by their bytes, other files by where they are."""

    documents: Mapping[str, bytes]
    copies: Mapping[str, Path]
    left_out: list[str]


def pack(reader: HuggingFaceReader, extras: tuple[str, ...]) -> Luggage:
    """Everything of a Hugging Face directory but the weights themselves."""
    travels, left_out = side_files(reader.directory, reader.shards)
    copies = {f"{FILES}/{name}": reader.directory / name for name in travels}
    copies |= {f"tokenizer/{name}": reader.directory / name for name in travels if name in _TOKENIZER_FILES}
    documents = {f"{HEADERS}/{name}": shard.raw for name, shard in reader.shards.items()}
    if extras:
        documents[EXTRAS] = _extras_file(reader, extras)
    return Luggage(documents, copies, left_out)


def _extras_file(reader: HuggingFaceReader, names: tuple[str, ...]) -> bytes:
    data = [make_header(reader.specs[name] for name in names)]
    for name in names:
        spec = reader.specs[name]
        values = np.empty(spec.shape, spec.dtype)
        reader.read(name, spec.whole, values)
        data.append(bytes(as_bytes(values)))
    return b"".join(data)


@dataclass(frozen=True, slots=True)
class Reference:
    """What an export knows of the Hugging Face side: its `config.json`, its side files, and its shard map if there is one."""

    config: Mapping[str, Any]
    origin: str
    files: Mapping[str, Path] = field(default_factory=dict[str, Path])
    shards: Mapping[str, Shard] = field(default_factory=dict[str, Shard])
    extras: Path | None = None


def unpack(iteration: Path) -> Reference | None:
    """What an import put there; None if this checkpoint carries no `config.json`."""
    files = iteration / FILES
    if not (files / CONFIG).is_file():
        return None
    headers = files_below(iteration / HEADERS)
    shards = {name: parse_shard((iteration / HEADERS / name).read_bytes(), source=f"{HEADERS}/{name}") for name in headers}
    _check_once(shards)
    extras = iteration / EXTRAS
    return Reference(
        read_json(files / CONFIG),
        "the checkpoint's own",
        {name: files / name for name in files_below(files)},
        shards,
        extras if extras.is_file() else None,
    )


def _check_once(shards: Mapping[str, Shard]) -> None:
    """Raise UserError if two carried headers hold one tensor."""
    seen: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in seen:
                raise UserError(f"`{name}` is in two headers under `{HEADERS}`: `{seen[name]}` and `{file}`")
            seen[name] = file


def from_directory(directory: Path) -> Reference:
    """A Hugging Face directory, or one with a `config.json` alone, given as reference. Its weights are not looked at."""
    if not directory.is_dir():
        raise UserError(f"`{directory}` is not a directory", hint="`--hf-config` takes a folder with a `config.json`")
    config = read_json(directory / CONFIG)
    travels, _ = side_files(directory, ())
    return Reference(config, f"`{directory}`'s", {name: directory / name for name in travels if name != INDEX})


def copy_file(source: Path, target: Path) -> None:
    """The bytes of one file, links followed; times and owners stay behind."""
    shutil.copyfile(source, target)
    os.chmod(target, 0o644)  # noqa: PTH101
