"""Read files of an ordinary web server by range.

A web server lists no directory. Files are found by names: those in the safetensors index, in a Megatron tracker and in
`integrity.json`, the usual names of a format, and the caller's `probe` list. Each is requested.
"""

from __future__ import annotations

import json
import netrc
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, cast
from urllib.parse import quote, urlsplit

from formats import integrity
from formats.dcp_index import METADATA
from formats.errors import UserError
from formats.iterations import COMMON, FORMAT, TRACKER, TRAIN_STATE, TRAIN_STATE_TRACKER, iteration_folder
from formats.relative_names import stays_below
from formats.remote.http import Client, Response, basic, split_url
from formats.remote.retry import RetryableError, RetryPolicy, retry
from formats.remote.store import Status, StoreBase, changed, file_name, refused, resized
from formats.shard_files import INDEX, USUAL_FILES
from formats.urls import without_secrets

_ROOT_FILES = (TRACKER, TRAIN_STATE_TRACKER)
_ITERATION_FILES = (METADATA, FORMAT, COMMON, TRAIN_STATE, integrity.FILE)
_AT_ONCE = 8
_QUOTED = "/%:@!$&'()*+,;=~"  # characters that need no escape in a path
_NO_RANGES = "use a server that answers `Range: bytes=…` with 206, or fetch the directory first"


class Web(StoreBase):
    """A folder by its URL. A user and password in it, or of `~/.netrc`, go to its server and no other; a query (which
    signs some URLs) goes with every file."""

    def __init__(self, url: str, policy: RetryPolicy, *, probe: Sequence[str] = ()) -> None:
        """`probe`: names of files that an iteration may have besides those of its format."""
        parts = split_url(url)
        self._root = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{quote(parts.path, safe=_QUOTED).rstrip('/')}/"
        self.label = without_secrets(self._root).rstrip("/")
        self._query = f"?{parts.query}" if parts.query else ""
        self._policy, self._probe_names = policy, probe
        self._credentials = _credentials(url)
        self._client = Client(silence=policy.silence)
        self._known: dict[str, Status] | None = None
        self._lock = threading.Lock()

    def status(self, path: str) -> Status | None:
        """Request the status by HEAD, or by the first byte if the server does not support that."""
        with self._request("HEAD", path, {}) as response:
            if response.status == 200 and response.header("Content-Length").isdigit():
                return Status(int(response.header("Content-Length")), *tag_of(response))
            if response.status in (404, 410):
                return None
        with self._request("GET", path, {"Range": "bytes=0-0"}) as response:
            if response.status in (404, 410):
                return None
            self._check_allowed(response, path)
            size = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", response.header("Content-Range"))
            if not size and response.status == 206:
                raise RetryableError("the answer was cut off")
            if not size:
                raise UserError(f"the server of `{self.label}` does not answer by byte range", hint=_NO_RANGES)
            return Status(int(size[1]), *tag_of(response))

    def fetch(self, path: str, status: Status, offset: int, out: memoryview) -> None:
        with self._request("GET", path, {**range_header(offset, len(out)), **_version_condition(status)}) as response:
            self._check_allowed(response, path)
            read_range(response, path, status, offset, out)

    def children(self, prefix: str) -> list[str]:
        below = (path.removeprefix(prefix).partition("/") for path in self.files(prefix))
        return sorted({first + slash for first, slash, _ in below})

    def files(self, prefix: str) -> Mapping[str, Status | None]:
        """Return the known names that exist."""
        with self._lock:
            if self._known is None:
                self._known = self._probe(self._candidates(""))
        below = {path: status for path, status in self._known.items() if path.startswith(prefix)}
        return below if below or not prefix else self._probe(self._candidates(prefix))

    def close(self) -> None:
        self._client.close()

    def _probe(self, paths: Iterable[str]) -> dict[str, Status]:
        asked = sorted(set(paths))
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="probe") as pool:
            statuses = zip(asked, pool.map(self._status_retried, asked), strict=True)
            return {path: status for path, status in statuses if status}

    def _candidates(self, prefix: str) -> Iterator[str]:
        """Yield paths of files that may exist: of an iteration, of a root with its latest iteration, or of a model."""
        tracked = (self._read_small(prefix + TRACKER) or b"").decode(errors="replace").strip()
        if re.fullmatch(r"\d{1,18}|release", tracked):
            yield from (prefix + name for name in _ROOT_FILES)
            yield from self._of_iteration(prefix + (tracked if tracked == "release" else iteration_folder(int(tracked))) + "/")
        elif self._status_retried(prefix + METADATA):
            yield from self._of_iteration(prefix)
        else:
            names = cast("Any", self._document(prefix + INDEX).get("weight_map"))
            listed = cast("dict[str, Any]", names).values() if isinstance(names, dict) else ()
            yield from (prefix + name for name in (*USUAL_FILES, *listed) if stays_below(name))

    def _of_iteration(self, prefix: str) -> Iterator[str]:
        listed = self._document(prefix + integrity.FILE).get("files")
        names = cast("dict[str, Any]", listed) if isinstance(listed, dict) else {}
        yield from (prefix + name for name in (*_ITERATION_FILES, *self._probe_names, *names) if stays_below(name))

    def _document(self, path: str) -> dict[str, Any]:
        """Read a JSON object, empty if it is missing or invalid: readers report an invalid one."""
        try:
            document = json.loads(self._read_small(path) or b"{}")
        except (ValueError, RecursionError):
            return {}
        return cast("dict[str, Any]", document) if isinstance(document, dict) else {}

    def _read_small(self, path: str) -> bytes | None:
        status = self._status_retried(path)
        if status is None:
            return None
        out = bytearray(status.size)
        if out:
            retry(lambda: self.fetch(path, status, 0, memoryview(out)), self._policy, doing=f"reading `{file_name(path)}`")
        return bytes(out)

    def _status_retried(self, path: str) -> Status | None:
        return retry(lambda: self.status(path), self._policy, doing=f"looking at `{file_name(path)}`")

    def _request(self, method: str, path: str, headers: Mapping[str, str]) -> AbstractContextManager[Response]:
        url = self._root + quote(path) + self._query
        return self._client.request(method, url, headers, credentials=self._credentials)

    def _check_allowed(self, response: Response, path: str) -> None:
        check_allowed(response, f"{self.label}/{path}", hint="give credentials in `~/.netrc`, or a signed URL")


def check_allowed(response: Response, label: str, *, hint: str) -> None:
    """Raise UserError for status codes other than success and those of range requests."""
    if response.status not in (200, 206, 412, 416):
        raise refused(response.status, label, hint=hint if response.status in (401, 403) else "check the URL")


def range_header(offset: int, length: int) -> dict[str, str]:
    return {"Range": f"bytes={offset}-{offset + length - 1}"}


def tag_of(response: Response) -> tuple[str, str]:
    """Return a value that changes with the file, and its name."""
    etag = response.header("ETag")
    return (etag, "ETag") if etag else (response.header("Last-Modified"), "last change")


def read_range(response: Response, path: str, status: Status, offset: int, out: memoryview) -> None:
    """Read the body of a response to `range_header` into `out`. Raises UserError unless it is that range of that version."""
    tag, tag_name = tag_of(response)
    if response.status in (206, 412) and status.tag_name == tag_name and tag and tag != status.tag:
        raise changed(path, status, tag)
    if response.status == 412:
        raise changed(path, status, "another")
    part = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", response.header("Content-Range"))
    if part and part[3] not in ("*", str(status.size)):
        raise resized(path, status, part[3])
    if response.status == 416:
        raise resized(path, status, "less")
    if response.status == 200:
        _check_whole(response, path, status, offset, len(out))
    elif not part or (part[1], part[2]) != (str(offset), str(offset + len(out) - 1)):
        raise RetryableError("the server answered with another range than it was asked for")
    response.read_into(out)


def _check_whole(response: Response, path: str, status: Status, offset: int, length: int) -> None:
    """Accept a response that ignores the range, if the complete file was requested."""
    if response.header("Content-Length") not in ("", str(status.size)):
        raise resized(path, status, response.header("Content-Length"))
    if offset or length != status.size:
        raise UserError(f"the server of `{file_name(path)}` does not answer by byte range", hint=_NO_RANGES)
    if tag_of(response)[0] not in ("", status.tag):
        raise changed(path, status, tag_of(response)[0])


def _version_condition(status: Status) -> dict[str, str]:
    """Return headers that request this version only. Weak ETags never match, so they are compared in the response."""
    if status.tag_name == "ETag":
        return {} if status.tag.startswith("W/") else {"If-Match": status.tag}
    return {"If-Unmodified-Since": status.tag} if status.tag else {}


def _credentials(url: str) -> dict[str, str]:
    parts = urlsplit(url)
    if parts.username:
        return {"Authorization": basic(parts.username, parts.password or "")}
    try:
        login = netrc.netrc(os.environ.get("NETRC")).authenticators(parts.hostname or "")
    except (OSError, netrc.NetrcParseError):
        return {}
    return {"Authorization": basic(quote(login[0]), quote(login[2]))} if login else {}
