"""What every kind of remote storage answers, and what they have in common: versions, refusals, names without secrets.

Knows no protocol.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from formats.errors import UserError


@dataclass(frozen=True, slots=True)
class Status:
    """A file as it was when it was first looked at. `tag` changes when the content does; it is empty where nothing tells."""

    size: int
    tag: str
    tag_name: str = "ETag"
    sha256: str | None = None

    def __str__(self) -> str:
        return f"{self.size} bytes, {self.tag_name} {self.tag}" if self.tag else f"{self.size} bytes"


class Store(Protocol):
    """Files by their whole path, each call one attempt.

    Calls raise BrokenError where trying again may help, UserError where it does not. They come from several threads.
    """

    @property
    def label(self) -> str:
        """A URL without anything secret."""
        ...

    @property
    def name(self) -> str:
        """The last part of it."""
        ...

    @property
    def origin(self) -> Mapping[str, str]:
        """A name of the content that does not change, if there is one."""
        ...

    def status(self, path: str) -> Status | None:
        """A file's status; None if it is not there."""
        ...

    def fetch(self, path: str, status: Status, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` of the file that has that status. BrokenError tells how many bytes came."""
        ...

    def children(self, prefix: str) -> list[str]:
        """Names right below a prefix that is empty or ends in a slash; folders end in a slash."""
        ...

    def files(self, prefix: str) -> Mapping[str, Status | None]:
        """All paths below a prefix, with what the listing says of them."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class StoreBase:
    """What a store says of itself that knows no more than its URL without secrets."""

    label: str

    @property
    def name(self) -> str:
        return file_name(self.label)

    @property
    def origin(self) -> dict[str, str]:
        return {}


def file_name(path: str) -> str:
    return path.rpartition("/")[2]


def changed(path: str, status: Status, found: str, *, what: str = "") -> UserError:
    """The file is not what it was when it was opened."""
    return UserError(
        f"`{file_name(path)}` changed while it was being read: {what or status.tag_name} was `{status.tag}`, is `{found}`",
        hint="run it again once nobody writes there",
    )


def resized(path: str, status: Status, found: str) -> UserError:
    """The same, as its size tells."""
    return UserError(
        f"`{file_name(path)}` changed while it was being read: it had {status.size} bytes, now it has {found}",
        hint="run it again once nobody writes there",
    )


def refused(status: int, label: str, *, hint: str, code: str = "", doing: str = "read") -> UserError:
    """The other side knows what we want and does not do it; `code` is its own word for why."""
    meaning = {401: "wants credentials", 403: "does not allow it", 404: "has nothing there"}.get(status, "refuses")
    named = f"HTTP {status}" if code in ("", str(status)) else f"HTTP {status}, {code}"
    return UserError(f"cannot {doing} `{label}`: the server {meaning} ({named})", hint=hint)


def optional_import(module: str) -> Any:
    """A module of the extra `remote`, imported on first use."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(
            f"this needs the package `{package}`, which is not installed", hint="pip install 'mbtools[remote]'"
        ) from None
