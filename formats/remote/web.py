"""Files of an ordinary web server, read by range.

A web server has no listing. Which files there are is known only as far as something names them: the safetensors index, a
Megatron tracker, `integrity.json`, and the names that such files usually have, each of which is asked for.
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
from formats.location import without_secrets
from formats.relative_names import stays_below
from formats.remote.http import Client, Response, basic, split_url
from formats.remote.retry import RetryableError, RetryPolicy, retry
from formats.remote.store import Status, StoreBase, changed, file_name, refused, resized
from formats.shard_files import INDEX, USUAL_FILES

_ROOT_FILES = (TRACKER, TRAIN_STATE_TRACKER)
_ITERATION_FILES = (METADATA, FORMAT, COMMON, TRAIN_STATE, integrity.FILE)
_AT_ONCE = 8
_QUOTED = "/%:@!$&'()*+,;=~"  # what may stand in a path as it is
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
        """By HEAD; by the first byte where a server does not answer that."""
        with self._ask("HEAD", path, {}) as answer:
            if answer.status == 200 and answer.header("Content-Length").isdigit():
                return Status(int(answer.header("Content-Length")), *tag_of(answer))
            if answer.status in (404, 410):
                return None
        with self._ask("GET", path, {"Range": "bytes=0-0"}) as answer:
            if answer.status in (404, 410):
                return None
            self._check_allowed(answer, path)
            size = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", answer.header("Content-Range"))
            if not size:
                raise UserError(f"the server of `{self.label}` does not answer by byte range", hint=_NO_RANGES)
            return Status(int(size[1]), *tag_of(answer))

    def fetch(self, path: str, status: Status, offset: int, out: memoryview) -> None:
        with self._ask("GET", path, {**range_header(offset, len(out)), **_only_if(status)}) as answer:
            self._check_allowed(answer, path)
            read_range(answer, path, status, offset, out)

    def children(self, prefix: str) -> list[str]:
        below = (path.removeprefix(prefix).partition("/") for path in self.files(prefix))
        return sorted({first + slash for first, slash, _ in below})

    def files(self, prefix: str) -> Mapping[str, Status | None]:
        """What is named and there."""
        with self._lock:
            if self._known is None:
                self._known = self._probe(self._named(""))
        below = {path: status for path, status in self._known.items() if path.startswith(prefix)}
        return below if below or not prefix else self._probe(self._named(prefix))

    def close(self) -> None:
        self._client.close()

    def _probe(self, paths: Iterable[str]) -> dict[str, Status]:
        asked = sorted(set(paths))
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="probe") as pool:
            found = zip(asked, pool.map(self._patiently, asked), strict=True)
            return {path: status for path, status in found if status}

    def _named(self, prefix: str) -> Iterator[str]:
        """Paths of files that may be there: of an iteration, of a root with its newest iteration, or of a model."""
        tracked = (self._small(prefix + TRACKER) or b"").decode(errors="replace").strip()
        if re.fullmatch(r"\d{1,18}|release", tracked):
            yield from (prefix + name for name in _ROOT_FILES)
            yield from self._of_iteration(prefix + (tracked if tracked == "release" else iteration_folder(int(tracked))) + "/")
        elif self._patiently(prefix + METADATA):
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
        """A JSON object for its names; readers complain about a broken one."""
        try:
            found = json.loads(self._small(path) or b"{}")
        except (ValueError, RecursionError):
            return {}
        return cast("dict[str, Any]", found) if isinstance(found, dict) else {}

    def _small(self, path: str) -> bytes | None:
        status = self._patiently(path)
        if status is None:
            return None
        out = bytearray(status.size)
        if out:
            retry(lambda: self.fetch(path, status, 0, memoryview(out)), self._policy, doing=f"reading `{file_name(path)}`")
        return bytes(out)

    def _patiently(self, path: str) -> Status | None:
        return retry(lambda: self.status(path), self._policy, doing=f"looking at `{file_name(path)}`")

    def _ask(self, method: str, path: str, headers: Mapping[str, str]) -> AbstractContextManager[Response]:
        url = self._root + quote(path) + self._query
        return self._client.request(method, url, headers, credentials=self._credentials)

    def _check_allowed(self, answer: Response, path: str) -> None:
        check_allowed(answer, f"{self.label}/{path}", hint="give credentials in `~/.netrc`, or a signed URL")


def check_allowed(answer: Response, label: str, *, hint: str) -> None:
    """UserError for answers that have nothing to do with ranges and are not what was asked for."""
    if answer.status not in (200, 206, 412, 416):
        raise refused(answer.status, label, hint=hint if answer.status in (401, 403) else "check the URL")


def range_header(offset: int, length: int) -> dict[str, str]:
    return {"Range": f"bytes={offset}-{offset + length - 1}"}


def tag_of(answer: Response) -> tuple[str, str]:
    """What changes with the file, and what it is called."""
    etag = answer.header("ETag")
    return (etag, "ETag") if etag else (answer.header("Last-Modified"), "last change")


def read_range(answer: Response, path: str, status: Status, offset: int, out: memoryview) -> None:
    """Fill `out` with the body of an answer to `range_header`, if it is that part of that version of the file."""
    found, tag_name = tag_of(answer)
    if answer.status in (206, 412) and status.tag_name == tag_name and found and found != status.tag:
        raise changed(path, status, found)
    if answer.status == 412:
        raise changed(path, status, "another")
    part = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", answer.header("Content-Range"))
    if part and part[3] not in ("*", str(status.size)):
        raise resized(path, status, part[3])
    if answer.status == 416:
        raise resized(path, status, "less")
    if answer.status == 200:
        _check_whole(answer, path, status, offset, len(out))
    elif not part or (part[1], part[2]) != (str(offset), str(offset + len(out) - 1)):
        raise RetryableError("the server answered with another range than it was asked for")
    answer.read_into(out)


def _check_whole(answer: Response, path: str, status: Status, offset: int, length: int) -> None:
    """A server may ignore a range; that is good enough for a file that is wanted whole."""
    if answer.header("Content-Length") not in ("", str(status.size)):
        raise resized(path, status, answer.header("Content-Length"))
    if offset or length != status.size:
        raise UserError(f"the server of `{file_name(path)}` does not answer by byte range", hint=_NO_RANGES)
    if tag_of(answer)[0] not in ("", status.tag):
        raise changed(path, status, tag_of(answer)[0])


def _only_if(status: Status) -> dict[str, str]:
    """Ask for this version and no other. Weak ETags never match, so they are compared in the answer alone."""
    if status.tag_name == "ETag":
        return {} if status.tag.startswith("W/") else {"If-Match": status.tag}
    return {"If-Unmodified-Since": status.tag} if status.tag else {}


def _credentials(url: str) -> dict[str, str]:
    parts = urlsplit(url)
    if parts.username:
        return {"Authorization": basic(parts.username, parts.password or "")}
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(parts.hostname or "")
    except (OSError, netrc.NetrcParseError):
        return {}
    return {"Authorization": basic(quote(found[0]), quote(found[2]))} if found else {}
