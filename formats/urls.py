"""Recognize URLs, and write them without what must not be shown. Opening them is left to formats/location.py."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit


def is_remote(source: str | Path) -> bool:
    """Return whether `source` is a URL.

    >>> [is_remote(source) for source in ("s3://bucket/model", "org/name", "/data/model")]
    [True, False, False]
    """
    return isinstance(source, str) and bool(re.match(r"[A-Za-z][\w+.-]*://", source))


def without_secrets(url: str) -> str:
    """Return a URL for messages, without user, password, query (which signs some URLs) and fragment.

    >>> without_secrets("https://me:secret@host/model?signature=1#part")
    'https://host/model'
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return f"{url.partition('://')[0]}://…"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
