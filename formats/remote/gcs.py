"""Objects of Google Cloud Storage; credentials come from where Google's own tools find them.

Reading goes through the JSON API: by range, of the generation that was seen first. Writing goes through the XML API, whose
uploads in parts are S3's.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from mmap import mmap
from typing import Any
from urllib.parse import quote, urlencode

from formats.errors import UserError
from formats.remote.http import Body, Client, Response
from formats.remote.retry import RetryableError, RetryPolicy
from formats.remote.s3 import bucket_and_prefix
from formats.remote.store import Status, StoreBase, changed, optional_import, refused
from formats.remote.web import check_allowed, range_header, read_range
from formats.urls import without_secrets

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_LOGIN = "check the name and the credentials (`gcloud auth application-default login`, GOOGLE_APPLICATION_CREDENTIALS)"


class GoogleStorage(StoreBase):
    """The objects below `gs://bucket/prefix`. Without credentials, requests go unsigned, as public buckets allow."""

    def __init__(self, url: str, policy: RetryPolicy) -> None:
        self._bucket, self._start = bucket_and_prefix(url)
        self.label = without_secrets(url).rstrip("/")
        self._client = Client(silence=policy.silence)
        self._access = Access()

    def status(self, path: str) -> Status | None:
        resource = self._json(f"o/{quote(self._start + path, safe='')}", fields="size,generation")
        return _status(resource) if resource else None

    def fetch(self, path: str, status: Status, offset: int, out: memoryview) -> None:
        url = self._url(f"o/{quote(self._start + path, safe='')}", alt="media", ifGenerationMatch=status.tag)
        credentials = self._access.headers(url)
        with self._client.request("GET", url, range_header(offset, len(out)), credentials=credentials) as response:
            if response.status not in (404, 412):
                check_allowed(response, f"{self.label}/{path}", hint=_LOGIN)
                return read_range(response, path, status, offset, out)
        now = self.status(path)
        raise changed(path, status, now.tag if now else "gone")

    def children(self, prefix: str) -> list[str]:
        names: set[str] = set()
        for page in self._pages(prefix, delimiter="/"):
            names |= {str(item["name"]) for item in page.get("items", ())} | set(page.get("prefixes", ()))
        return sorted(name.removeprefix(self._start + prefix) for name in names if name != self._start + prefix)

    def files(self, prefix: str) -> Mapping[str, Status | None]:
        return {
            str(item["name"]).removeprefix(self._start): _status(item)
            for page in self._pages(prefix)
            for item in page.get("items", ())
            if not str(item["name"]).endswith("/")
        }

    def begin(self, path: str) -> str:
        """An upload in parts; its number."""
        match = re.search(rb"<UploadId>([^<]+)</UploadId>", self._write("POST", path, "?uploads"))
        if not match:
            raise UserError(f"`{self.label}` began no upload of `{path}`")
        return match[1].decode()

    def part(self, path: str, upload: str, number: int, data: mmap) -> str:
        """One part, counted from 1; its tag. The server checks it against its MD5."""
        query = f"?partNumber={number}&uploadId={quote(upload, safe='')}"
        with self._send("PUT", path, query, memoryview(data)) as response:
            self._check_written(response, path)
            return response.header("ETag")

    def finish(self, path: str, upload: str, tags: Sequence[str]) -> bool:
        """Make the object out of its parts; False if there is no such upload, because it was finished or dropped."""
        parts = (f"<Part><PartNumber>{number}</PartNumber><ETag>{tag}</ETag></Part>" for number, tag in enumerate(tags, 1))
        text = f"<CompleteMultipartUpload>{''.join(parts)}</CompleteMultipartUpload>".encode()
        return self._write("POST", path, f"?uploadId={quote(upload, safe='')}", text, gone=b"gone") != b"gone"

    def drop(self, path: str, upload: str) -> None:
        """Forget an upload and its parts."""
        self._write("DELETE", path, f"?uploadId={quote(upload, safe='')}", gone=b"")

    def put(self, path: str, data: bytes) -> None:
        self._write("PUT", path, "", data)

    def delete(self, path: str) -> None:
        self._write("DELETE", path, "", gone=b"")

    def close(self) -> None:
        self._client.close()
        self._access.close()

    def _write(self, method: str, path: str, query: str, data: bytes = b"", *, gone: bytes | None = None) -> bytes:
        """A call that changes something; its answer's body, or `gone` for what is not there any more."""
        with self._send(method, path, query, data) as response:
            if gone is not None and response.status == 404:
                return gone
            self._check_written(response, path)
            return response.body()

    def _send(self, method: str, path: str, query: str, data: Body) -> AbstractContextManager[Response]:
        url = f"{self._access.endpoint}/{self._bucket}/{quote(self._start + path)}{query}"
        checked = {"Content-MD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()} if data else {}
        return self._client.request(method, url, checked, credentials=self._access.headers(url), body=data)

    def _check_written(self, response: Response, path: str) -> None:
        if response.status not in (200, 201, 204):
            raise refused(response.status, f"{self.label}/{path}", hint=_LOGIN, doing="write")

    def _pages(self, prefix: str, **options: str) -> Iterator[Mapping[str, Any]]:
        fields = "items(name,size,generation),prefixes,nextPageToken"
        more: dict[str, str] = {}
        while True:
            page = self._json("o", prefix=self._start + prefix, fields=fields, **options, **more)
            if page is None:
                raise refused(404, self.label, hint=_LOGIN)
            yield page
            if not page.get("nextPageToken"):
                return
            more = {"pageToken": str(page["nextPageToken"])}

    def _json(self, what: str, **query: str) -> Mapping[str, Any] | None:
        url = self._url(what, **query)
        with self._client.request("GET", url, {}, credentials=self._access.headers(url)) as response:
            if response.status == 404:
                return None
            check_allowed(response, self.label, hint=_LOGIN)
            return _document(response)

    def _url(self, what: str, **query: str) -> str:
        return f"{self._access.endpoint}/storage/v1/b/{self._bucket}/{what}?{urlencode(query)}"


class Access:
    """Where the service is, and the headers that open it; an emulator is found by STORAGE_EMULATOR_HOST and wants none."""

    def __init__(self) -> None:
        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
        self.endpoint = emulator if "://" in emulator else f"http://{emulator}" if emulator else "https://storage.googleapis.com"
        self._lock = threading.Lock()
        self._credentials: Any = None if emulator else _credentials()
        self._session: Any = optional_import("requests").Session() if self._credentials else None
        self._request: Any = optional_import("google.auth.transport.requests").Request(self._session) if self._session else None

    def headers(self, url: str) -> dict[str, str]:
        """The headers for a request, with a token that is renewed when it must be."""
        if self._credentials is None:
            return {}
        added: dict[str, str] = {}
        try:
            with self._lock:
                self._credentials.before_request(self._request, "GET", url, added)
        except optional_import("google.auth.exceptions").TransportError:
            raise RetryableError("Google's token service did not answer") from None
        except optional_import("google.auth.exceptions").GoogleAuthError:
            raise UserError("Google does not accept the credentials", hint=_LOGIN) from None
        return added

    def close(self) -> None:
        if self._session:
            self._session.close()


def _document(response: Response) -> Mapping[str, Any]:
    """Return the JSON object of an answer. One whose headers were cut off says no length, and has no whole body."""
    try:
        return json.loads(response.body())
    except ValueError:
        raise RetryableError("the answer is not a whole JSON document") from None


def _credentials() -> Any:
    """The credentials there are; None if there are none."""
    try:
        return optional_import("google.auth").default(scopes=[_SCOPE])[0]
    except optional_import("google.auth.exceptions").DefaultCredentialsError:
        return None


def _status(resource: Mapping[str, Any]) -> Status:
    return Status(int(resource["size"]), str(resource["generation"]), "generation")
