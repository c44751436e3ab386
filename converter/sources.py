"""What a user names as a source: a directory, a URL read by byte range, or a Hub id fetched into the Hub's own cache; and what
is known of the model there, once it was opened."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.probe import PROBED
from converter.side_files import HFReference
from converter.workers import count_workers
from formats.detect import refuse_file
from formats.errors import UserError
from formats.faults import fault
from formats.folder import FileRef, Folder, LocalFolder
from formats.home import expanded
from formats.location import is_remote, open_folder
from formats.machine import check_machine
from formats.spec import Reader

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_LEFT = ["original/*", "*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot"]


@dataclass(frozen=True, slots=True)
class Source:
    """A model to convert: its tensors, and what is known beside them."""

    label: str
    reader: Reader
    reference: HFReference
    """Its `config.json`, its side files, and its shard map if there is one."""

    files: Mapping[str, FileRef]
    """Those that its tensors are read from."""

    told: Mapping[str, Any]
    """What `conversion.json` says of it."""

    left_out: Sequence[str] = ()
    """Files that lie there and are not part of the model."""

    adapter: Mapping[str, Any] | None = None
    """The adapter that was merged into its tensors, as `conversion.json` tells of it; None if they are as they lie there."""

    memory: int = 0
    """Bytes that reading it holds at most, beside what is read."""

    def command(self, otherwise: str) -> str:
        """The command that a conversion of it is told as."""
        return "merge" if self.adapter else otherwise

    def merged(self) -> dict[str, Any]:
        """The adapter, where options and facts are listed."""
        return {"adapter": dict(self.adapter)} if self.adapter else {}


def open_source(source: str | Path, *, or_hub: bool = False) -> Folder:
    """The folder of a source. With `or_hub`, one that is no directory may be `org/name` or `org/name@revision` on the Hub.

    Raises UserError if it is nothing of that, and on a machine where nothing can be converted: every command begins here.
    """
    check_machine()
    source = expanded(source) if isinstance(source, str) else Path(expanded(source))
    path = Path(source)
    if is_remote(source) or path.is_dir():
        return open_folder(source, probe=PROBED)
    if path.exists():
        refuse_file(str(source))
    if or_hub and isinstance(source, str) and "/" in source and _HUB_ID.fullmatch(source):
        return _fetch(source)
    hub = ", or a Hub id such as `org/name`" if or_hub else ""
    if not or_hub and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(source)) and not path.parent.exists():
        raise UserError(
            f"`{source}` is not there", hint=f"a model on the Hub is `hf://{source}`; others are a directory or a URL"
        )
    raise UserError(f"`{source}` is not there", hint=f"give a directory, a URL (hf://, s3://, gs://, https://){hub}")


def changes(sources: Iterable[Folder]) -> str:
    """What was changed in the sources while they were read, of the first file that was; nothing if none was."""
    return next((found for source in sources if (found := source.changed())), "")


def check_unchanged(sources: Iterable[Folder]) -> None:
    """Raise UserError if what was read is a mixture: a file that was changed, replaced or removed meanwhile."""
    if found := changes(sources):
        raise sources_changed(found)


def sources_changed(what: str) -> UserError:
    """The error for a source that changed while it was read."""
    return UserError(what, hint="run it again once nothing writes to it")


def workers_for(workers: int | None, sources: Iterable[Folder], target: str | Path = "") -> int:
    """The number of threads for work from `sources` to `target`, as `count_workers` answers it."""
    remote = is_remote(target) or not all(isinstance(source, LocalFolder) for source in sources)
    return count_workers(workers, remote=remote)


def _fetch(source: str) -> Folder:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 # pyright: ignore[reportUnknownVariableType] - slow, seldom needed

    name, _, revision = source.partition("@")
    try:
        return LocalFolder(Path(snapshot_download(name, revision=revision or None, ignore_patterns=_LEFT)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot fetch `{source}` from the Hub, and there is no such directory here: {_hub_fault(error)}",
            hint="check the name, the network and, for gated models, `hf auth login`",
        ) from error


def _hub_fault(error: Exception) -> str:
    """Why the Hub gave nothing: the HTTP status where there is one, else the kind of error."""
    response: Any = getattr(error, "response", None)
    status: Any = getattr(response, "status_code", None)
    return f"the Hub answered HTTP {status}" if isinstance(status, int) else fault(error)
