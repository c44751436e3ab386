"""A source that is no directory: a Hugging Face Hub id, fetched into the Hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from formats.errors import UserError
from formats.folder import LocalFolder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_LEFT = ["original/*", "*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot"]


def resolve(source: str | Path) -> LocalFolder:
    """A local directory for a source: itself, or the Hub snapshot `org/name` or `org/name@revision`.

    Raises UserError if it is neither.
    """
    path = Path(source)
    if path.is_dir():
        return LocalFolder(path)
    if path.exists():
        raise UserError(f"`{source}` is a file", hint="point at the directory it lies in")
    if isinstance(source, Path) or "/" not in source or not _HUB_ID.fullmatch(source):
        raise UserError(f"`{source}` is not there", hint="give a model directory, or a Hub id such as `org/name`")
    return _fetch(source)


def _fetch(source: str) -> LocalFolder:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 # pyright: ignore[reportUnknownVariableType] - slow, seldom needed

    name, _, revision = source.partition("@")
    try:
        return LocalFolder(Path(snapshot_download(name, revision=revision or None, ignore_patterns=_LEFT)))
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"cannot fetch `{source}` from the Hub, and there is no such directory here: {first}",
            hint="check the name, the network and, for gated models, `hf auth login`",
        ) from error
