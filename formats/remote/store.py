"""The protocol of remote storage, and what all kinds share: versions, errors, names without secrets."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from formats.errors import UserError


@dataclass(frozen=True, slots=True)
class Status:
    """The version of a file when it was first requested. `tag` changes with the content; empty if the server gives none."""

    size: int
    tag: str
    tag_name: str = "ETag"
    sha256: str | None = None

    def __str__(self) -> str:
        return f"{self.size} bytes, {self.tag_name} {self.tag}" if self.tag else f"{self.size} bytes"


class Store(Protocol):
    """Files by their full path. Each call is one attempt.

    Calls raise RetryableError where a retry may help, else UserError. They may come from several threads.
    """

    @property
    def label(self) -> str:
        """The URL without secrets."""
        ...

    @property
    def name(self) -> str:
        """The last component of the URL."""
        ...

    @property
    def origin(self) -> Mapping[str, str]:
        """A permanent name of the content, if there is one."""
        ...

    def status(self, path: str) -> Status | None:
        """Return a file's status; None if it does not exist."""
        ...

    def fetch(self, path: str, status: Status, offset: int, out: memoryview) -> None:
        """Read into `out` from `offset` of that version of the file. RetryableError gives the number of bytes received."""
        ...

    def children(self, prefix: str) -> list[str]:
        """Return the names directly below a prefix, which is empty or ends in a slash; folders end in a slash."""
        ...

    def files(self, prefix: str) -> Mapping[str, Status | None]:
        """Return all paths below a prefix, with the status if the listing has it."""
        ...

    def close(self) -> None:
        """Close connections."""
        ...


class StoreBase:
    """Base of stores that have only their URL as name."""

    label: str

    @property
    def name(self) -> str:
        return file_name(self.label)

    @property
    def origin(self) -> dict[str, str]:
        return {}


def file_name(path: str) -> str:
    return path.rpartition("/")[2]


def changed(path: str, status: Status, actual: str, *, what: str = "") -> UserError:
    """Return the error for a file whose version has changed since it was opened."""
    return UserError(
        f"`{file_name(path)}` changed while it was being read: {what or status.tag_name} was `{status.tag}`, is `{actual}`",
        hint="run it again once nothing is writing to it",
    )


def resized(path: str, status: Status, actual: str) -> UserError:
    """Return the error for a file whose size has changed since it was opened."""
    return UserError(
        f"`{file_name(path)}` changed while it was being read: it had {status.size} bytes, now it has {actual}",
        hint="run it again once nothing is writing to it",
    )


def refused(status: int, label: str, *, hint: str, code: str = "", doing: str = "read") -> UserError:
    """Return the error for a refused request; `code` is the server's reason."""
    meaning = {401: "the server wants credentials", 403: "the server does not allow it", 404: "not found"}.get(
        status, "the server refuses"
    )
    named = f"HTTP {status}" if code in ("", str(status)) else f"HTTP {status}, {code}"
    return UserError(f"cannot {doing} `{label}`: {meaning} ({named})", hint=hint)


def optional_import(module: str) -> Any:
    """Import a module of the extra `remote` on first use. Raises UserError if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(
            f"this needs the package `{package}`, which is not installed", hint="pip install 'mbtools[remote]'"
        ) from None
