"""Which `config.json` an export follows: the one given, the one that travelled, or one rebuilt from what the checkpoint
says of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converter import carried, families, run_config
from converter.carried import Reference
from converter.config import to_huggingface
from formats.errors import UserError
from formats.torch_dist import TorchDistReader


def find(reader: TorchDistReader, given: Path | None) -> Reference:
    """The reference for an export; UserError where there is none and none can be rebuilt."""
    if given:
        return carried.from_directory(given)
    return carried.unpack(reader.directory) or _rebuilt(reader)


def _rebuilt(reader: TorchDistReader) -> Reference:
    found = run_config.read(reader.directory, reader.args())
    if not found:
        raise UserError(
            f"`{reader.directory}` says nothing about its model: no `config.json`, no `{run_config.FILE}`, no `args`",
            hint="give a folder with the model's `config.json`: `--hf-config DIR`",
        )
    fields, origin = found
    tokenizer = reader.directory / "tokenizer"
    files = {path.name: path for path in sorted(tokenizer.glob("*")) if path.is_file()}
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
