"""Read a model on the Hugging Face Hub: its commit is fixed on opening, its files are read by range after the Hub's redirect.

Three calls of the Hub's API are used: a model's revision, the tree of a commit, and `resolve`.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast
from urllib.parse import quote

from formats.errors import UserError
from formats.remote.http import Client, Response
from formats.remote.retry import RetryableError, RetryPolicy, retry
from formats.remote.store import Status, changed, file_name, optional_import, refused
from formats.remote.web import check_allowed, range_header, read_range

_URL = re.compile(
    r"hf://(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(@(?P<revision>refs/[\w.-]+/[\w.-]+|[\w.-]+))?(?P<folder>(/[^/@?#]+)*)/?"
)
_TAG = "linked ETag"  # the server of the bytes has another ETag
_LOGIN = "check the name; for gated and private models, `hf auth login` or HF_TOKEN"


class Hub:
    """The files of `hf://org/name[@revision][/folder]`. The token comes from where huggingface_hub finds it.

    `commit` is what the revision points to on opening. It is read even if the revision moves later.
    """

    def __init__(self, url: str, policy: RetryPolicy) -> None:
        match = _URL.fullmatch(url)
        if not match:
            raise UserError("that is not a model on the Hub", hint="it should look like `hf://org/name@revision`")
        self.label = url.rstrip("/")
        self._name, self._folder = match["name"], match["folder"].strip("/")
        self.name = file_name(self._folder or self._name)
        self._endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self._client = Client(silence=policy.silence)
        self._credentials = _headers()
        self._resolved_urls: dict[str, str] = {}
        self._lock = threading.Lock()
        try:
            self.commit = self._resolve_commit(match["revision"], policy)
            self._files = self._tree(policy)
        except BaseException:
            self.close()
            raise

    @property
    def origin(self) -> dict[str, str]:
        """The id, and the commit that was fixed on opening."""
        source = {"id": self._name, "revision": self.commit}
        return {**source, "folder": self._folder} if self._folder else source

    def status(self, path: str) -> Status | None:
        return self._files.get(path)

    def fetch(self, path: str, status: Status, offset: int, out: memoryview) -> None:
        known = self._resolved_urls.get(path)
        url = known or self._resolve_file(path, status)
        with self._request("GET", url, range_header(offset, len(out))) as response:
            if known and response.status in (400, 401, 403, 404, 410):
                with self._lock:
                    self._resolved_urls.pop(path, None)
                raise RetryableError(f"the Hub's link had expired (HTTP {response.status})")
            check_allowed(response, f"{self.label}/{path}", hint=_LOGIN)
            read_range(response, path, status, offset, out)

    def children(self, prefix: str) -> list[str]:
        below = (path.removeprefix(prefix).partition("/") for path in self.files(prefix))
        return sorted({first + slash for first, slash, _ in below})

    def files(self, prefix: str) -> Mapping[str, Status]:
        return {path: status for path, status in self._files.items() if path.startswith(prefix)}

    def close(self) -> None:
        self._client.close()

    def _resolve_commit(self, revision: str | None, policy: RetryPolicy) -> str:
        wanted = f"/revision/{quote(revision, safe='')}" if revision else ""
        reply, _ = self._json(f"{self._endpoint}/api/models/{self._name}{wanted}", policy)
        match reply:
            case {"sha": str(sha)} if re.fullmatch(r"[0-9a-f]{40,64}", sha):
                return sha
            case _:
                raise UserError(f"the Hub names no commit of `{self.label}`")

    def _tree(self, policy: RetryPolicy) -> dict[str, Status]:
        folder = f"/{quote(self._folder)}" if self._folder else ""
        url = f"{self._endpoint}/api/models/{self._name}/tree/{self.commit}{folder}?recursive=true&expand=false"
        files: dict[str, Status] = {}
        while url:
            entries, url = self._json(url, policy)
            files |= dict(_statuses(entries))
        start = f"{self._folder}/" if self._folder else ""
        return {path.removeprefix(start): status for path, status in files.items()}

    def _json(self, url: str, policy: RetryPolicy) -> tuple[Any, str]:
        """Return a JSON answer of the Hub, and the URL of the next page."""

        def attempt() -> tuple[Any, str]:
            with self._request("GET", url, {}) as response:
                if response.status != 200:
                    raise refused(response.status, self.label, hint=_LOGIN)
                more = re.search(r'<([^>]+)>;\s*rel="next"', response.header("Link"))
                return _parsed(response.body(), self.label), more[1] if more else ""

        return retry(attempt, policy, doing=f"asking the Hub for `{self.label}`")

    def _resolve_file(self, path: str, status: Status) -> str:
        """Return the URL of a file's bytes, which is valid for some time, often about an hour."""
        whole = f"{self._folder}/{path}" if self._folder else path
        url = f"{self._endpoint}/{self._name}/resolve/{self.commit}/{quote(whole)}"
        with self._request("HEAD", url, {}, stay=True) as response:
            url = response.redirect or response.url
            if not response.redirect:
                check_allowed(response, f"{self.label}/{path}", hint=_LOGIN)
            etag = (response.header("X-Linked-ETag") or response.header("ETag")).removeprefix("W/").strip('"')
            if etag and etag != status.tag:
                raise changed(path, status, etag)
        with self._lock:
            self._resolved_urls[path] = url
        return url

    def _request(
        self, method: str, url: str, headers: Mapping[str, str], *, stay: bool = False
    ) -> AbstractContextManager[Response]:
        ours = url.startswith(f"{self._endpoint}/")
        return self._client.request(method, url, headers, credentials=self._credentials if ours else None, stay=stay)


def _statuses(listed: Any) -> Iterator[tuple[str, Status]]:
    for item in cast("list[Any]", listed if isinstance(listed, list) else []):
        match item:
            case {"type": "file", "path": str(path), "lfs": {"oid": str(sha256), "size": int(size)}}:
                yield path, Status(size, sha256, _TAG, sha256)
            case {"type": "file", "path": str(path), "size": int(size), "oid": str(blob)}:
                yield path, Status(size, blob, _TAG)
            case _:
                pass


def _parsed(body: bytes, label: str) -> Any:
    if not body:
        raise RetryableError("the answer is empty")
    try:
        return json.loads(body)
    except ValueError:
        raise UserError(f"the Hub's answer about `{label}` is not JSON", hint="check HF_ENDPOINT") from None


def _headers() -> dict[str, str]:
    """Return the user agent and, if there is a token, the authorization that huggingface_hub sends."""
    if optional_import("huggingface_hub.constants").HF_HUB_OFFLINE:
        raise UserError("the Hub may not be asked: HF_HUB_OFFLINE is set", hint="unset it, or give a directory")
    return dict(optional_import("huggingface_hub.utils").build_hf_headers(library_name="mbtools"))
