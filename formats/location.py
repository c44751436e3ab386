"""What a user names: a path, or the URL of a remote directory.

What reads and writes URLs is imported when the first URL is opened: a conversion between local directories needs neither
HTTP nor a client of an object store.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from formats.folder import Folder, LocalFolder

if TYPE_CHECKING:
    from formats.remote.retry import RetryPolicy


def is_remote(source: str | Path) -> bool:
    """Does that name a URL rather than a path?"""
    return isinstance(source, str) and bool(re.match(r"[A-Za-z][\w+.-]*://", source))


def open_folder(source: str | Path, *, policy: RetryPolicy | None = None) -> Folder:
    """The folder of a path or URL. Whether it is there shows when something is asked of it; a Hub id is asked for at once,
    because its commit is fixed then.

    Raises UserError for URLs that cannot be understood, and where a package is missing.
    """
    if not is_remote(source):
        return LocalFolder(Path(source))
    from formats.remote.folder import open_remote  # noqa: PLC0415 - the clients of every protocol

    return open_remote(str(source), policy=policy)


def without_secrets(url: str) -> str:
    """A URL for messages: no user, no password, no query (which signs some URLs), no fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return f"{url.partition('://')[0]}://…"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
