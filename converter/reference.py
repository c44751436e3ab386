"""Which `config.json` an export follows: the one given, the one that travelled, or one rebuilt from what the checkpoint
says of its model."""

from __future__ import annotations

from typing import Any

from converter import carried, families
from converter.carried import Reference
from converter.config import to_huggingface
from formats.errors import UserError
from formats.folder import FileIn, Folder
from formats.torch_dist import TorchDistReader


class UnknownModelError(UserError):
    """A checkpoint that says nothing about its model; one whose word is damaged or not understood is another error."""


def find(reader: TorchDistReader, given: Folder | None) -> Reference:
    """The reference for an export; UserError where there is none and none can be rebuilt."""
    if given:
        return carried.from_folder(given)
    return carried.unpack(reader.folder) or _rebuilt(reader)


def _rebuilt(reader: TorchDistReader) -> Reference:
    from converter import run_config  # noqa: PLC0415 - and YAML: a checkpoint that carries its `config.json` needs neither

    found = run_config.read(reader.folder, reader.args())
    if not found:
        raise UnknownModelError(
            f"`{reader.folder.label}` says nothing about its model: no `config.json`, no `{run_config.FILE}`, no `args`",
            hint="give a folder with the model's `config.json`: `--hf-config DIR`",
        )
    fields, origin = found
    tokenizer = reader.folder.below("tokenizer")
    files = {name: FileIn(tokenizer, name) for name in tokenizer.children() if tokenizer.has(name)}
    return Reference(rebuild_config(fields, origin), f"rebuilt from {origin}", files)


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
    raise UserError(
        f"{origin} describes a model of no supported family ({'; '.join(refused)})",
        hint="give a folder with the model's `config.json`: `--hf-config DIR`",
    )
