"""Open a directory by its path or URL.

The clients for URLs are imported when the first URL is opened: a conversion between local directories needs neither HTTP nor a
client of an object store.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from formats.folder import Folder, LocalFolder
from formats.urls import is_remote

if TYPE_CHECKING:
    from formats.remote.retry import RetryPolicy


def open_folder(source: str | Path, *, policy: RetryPolicy | None = None, probe: Sequence[str] = ()) -> Folder:
    """Open the folder of a path or URL. A missing folder is noticed on first use; for a Hub id the server is asked at once,
    because its commit is fixed then.

    `probe`: names of files, relative to an iteration's folder, that are looked for on web servers, which list no directory,
    besides those of the formats. Raises UserError for a malformed URL and for a missing package.
    """
    if not is_remote(source):
        return LocalFolder(Path(source))
    from formats.remote.folder import open_remote  # noqa: PLC0415 - the clients of every protocol

    return open_remote(str(source), policy=policy, probe=probe)
