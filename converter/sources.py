"""What a user names as a source: a directory, a URL read by byte range, or a Hub id fetched into the Hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from formats.errors import UserError
from formats.folder import Folder, LocalFolder
from formats.remote.folder import is_remote, open_folder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_LEFT = ["original/*", "*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot"]


def open_source(source: str | Path, *, or_hub: bool = False) -> Folder:
    """The folder of a source. With `or_hub`, one that is no directory may be `org/name` or `org/name@revision` on the Hub.

    Raises UserError if it is nothing of that.
    """
    path = Path(source)
    if is_remote(source) or path.is_dir():
        return open_folder(source)
    if path.exists():
        raise UserError(f"`{source}` is a file", hint="point at the directory it lies in")
    if or_hub and isinstance(source, str) and "/" in source and _HUB_ID.fullmatch(source):
        return _fetch(source)
    hub = ", or a Hub id such as `org/name`" if or_hub else ""
    raise UserError(f"`{source}` is not there", hint=f"give a directory, a URL (hf://, s3://, gs://, https://){hub}")


def _fetch(source: str) -> Folder:
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
