"""Servers on loopback that speak as the real ones do, and break when they are told to. They end with their block."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

HOST = "127.0.0.1"


@dataclass
class Fault:
    """What the next answers are: a status, a body that ends early, or silence for some seconds."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body_ends_after: int | None = None
    silence: float = 0


class Handler(BaseHTTPRequestHandler):
    """One connection; what is answered is the server's business."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    lost = False
    """The request is carried out, and its answer does not arrive."""

    def log_message(self, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        with suppress(ConnectionError):
            super().handle_one_request()
            return
        self.close_connection = True

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        self.server.log.append((self.command, self.path, dict(self.headers)))
        fault = self.server.next_fault(self)
        if fault and fault.silence:
            time.sleep(fault.silence)
        if fault and fault.status:
            return self.answer(fault.status, b"broken", fault.headers)
        self.cut = fault.body_ends_after if fault else None
        self.lost = self.server.after(self)
        return self.server.answer(self)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 - the standard library's names

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        if self.lost:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = getattr(self, "cut", None)
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def answer_file(self, data: bytes, headers: dict[str, str]) -> None:
        """A file, or the range of it that is asked for, under conditions if there are any."""
        etag, wanted = headers.get("ETag", ""), self.headers.get("If-Match", "")
        if wanted and wanted != etag:
            return self.answer(412, headers=headers)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not match:
            return self.answer(200, data, headers)
        start, end = int(match[1]), min(int(match[2]) + 1, len(data))
        if start >= len(data):
            return self.answer(416, headers={**headers, "Content-Range": f"bytes */{len(data)}"})
        return self.answer(206, data[start:end], {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})


class Server(ThreadingHTTPServer):
    """What all of them share: files by path, faults to come, and a log of requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__((HOST, 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.faulty: Callable[[Handler], bool] = lambda handler: handler.command == "GET"
        self.after: Callable[[Handler], bool] = lambda handler: False
        """Whether the answer to a request gets lost."""
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self._lock = threading.Lock()

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def next_fault(self, handler: Handler) -> Fault | None:
        with self._lock:
            return self.faults.pop(0) if self.faults and self.faulty(handler) else None

    def answer(self, handler: Handler) -> None:
        raise NotImplementedError

    def handle_error(self, *args: object) -> None:
        """Clients that hang up are part of the tests."""

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


class WebServer(Server):
    """An ordinary one, with ranges and ETags."""

    secret = ""
    ranges = True
    heads = True
    etag: Callable[[bytes], str] = staticmethod(lambda data: f'"{hashlib.md5(data).hexdigest()}"')

    def answer(self, handler: Handler) -> None:
        if self.secret and self.secret not in (handler.headers.get("Authorization", ""), urlsplit(handler.path).query):
            return handler.answer(401)
        data = self.files.get(unquote(urlsplit(handler.path).path).lstrip("/"))
        if data is None:
            return handler.answer(404)
        if handler.command == "HEAD" and not self.heads:
            return handler.answer(405)
        if not self.ranges:
            return handler.answer(200, data)
        etag = self.etag(data)
        return handler.answer_file(data, {"ETag": etag} if etag else {})


class HubServer(Server):
    """The Hub: revisions, trees in pages, and files that it sends elsewhere for if they are large."""

    commit = "c0ffee" + "0" * 34
    large = 1000
    page = 3
    secret = ""
    signature = "X-Signature=very-secret-signature"

    def __init__(self, name: str, elsewhere: WebServer) -> None:
        super().__init__()
        self.name, self.elsewhere, self.far = name, elsewhere, elsewhere.url

    def answer(self, handler: Handler) -> None:
        if self.secret and handler.headers.get("Authorization") != f"Bearer {self.secret}":
            return handler.answer(401, headers={"X-Error-Code": "GatedRepo"})
        parts = urlsplit(handler.path)
        api, path = f"/api/models/{self.name}", unquote(parts.path)
        if path in (api, f"{api}/revision/main", f"{api}/revision/v1"):
            return handler.answer(200, json.dumps({"id": self.name, "sha": self.commit}).encode())
        if path == f"{api}/tree/{self.commit}":
            return self._tree(handler, parse_qs(parts.query))
        if path.startswith(f"/{self.name}/resolve/{self.commit}/"):
            return self._file(handler, path.split(f"/{self.commit}/")[1])
        return handler.answer(404, headers={"X-Error-Code": "RepoNotFound"})

    def _tree(self, handler: Handler, query: dict[str, list[str]]) -> None:
        start = int(query.get("cursor", ["0"])[0])
        items = [self._item(name, data) for name, data in sorted(self.files.items())]
        follows = f"{self.url}{urlsplit(handler.path).path}?recursive=true&cursor={start + self.page}"
        more = {"Link": f'<{follows}>; rel="next"'} if start + self.page < len(items) else {}
        handler.answer(200, json.dumps(items[start : start + self.page]).encode(), more)

    def _item(self, name: str, data: bytes) -> dict[str, object]:
        item: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
        if len(data) >= self.large:
            item["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return item

    def _file(self, handler: Handler, name: str) -> None:
        data = self.files.get(name)
        if data is None:
            return handler.answer(404, headers={"X-Error-Code": "EntryNotFound"})
        commit = {"X-Repo-Commit": self.commit}
        if len(data) < self.large:
            return handler.answer_file(data, {**commit, "ETag": f'"{_blob(data)}"'})
        sha256 = hashlib.sha256(data).hexdigest()
        self.elsewhere.files[sha256] = data
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256}"'}
        return handler.answer(302, headers={**commit, **linked, "Location": f"{self.far}/{sha256}?{self.signature}"})


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class GoogleServer(Server):
    """The calls of Google Cloud Storage that we use: objects and listings (JSON), uploads in parts (XML)."""

    forgets = False
    """Parts are thrown away, so that they take no memory here."""

    def __init__(self, bucket: str) -> None:
        super().__init__()
        self.bucket = bucket
        self.generations: dict[str, int] = {}
        self.uploads: dict[str, tuple[str, dict[int, bytes]]] = {}

    def put(self, name: str, data: bytes) -> None:
        self.files[name] = data
        self.generations[name] = self.generations.get(name, 1000) + 1

    def answer(self, handler: Handler) -> None:
        parts = urlsplit(handler.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        objects = f"/storage/v1/b/{self.bucket}/o"
        if parts.path == objects:
            return self._list(handler, query)
        if parts.path.startswith(f"{objects}/"):
            return self._object(handler, unquote(parts.path.removeprefix(f"{objects}/")), query)
        if parts.path.startswith(f"/{self.bucket}/"):
            return self._xml(handler, unquote(parts.path.removeprefix(f"/{self.bucket}/")), query)
        return handler.answer(404)

    def _list(self, handler: Handler, query: dict[str, str]) -> None:
        prefix, delimiter = query["prefix"], query.get("delimiter")
        names = sorted(name for name in self.files if name.startswith(prefix))
        folders: set[str] = set()
        if delimiter:
            below = {name: name.removeprefix(prefix).partition(delimiter) for name in names}
            folders = {prefix + first + slash for first, slash, _ in below.values() if slash}
            names = [name for name in names if not below[name][1]]
        start = int(query.get("pageToken", 0))
        page = {"items": [self._resource(name) for name in names[start : start + 3]], "prefixes": sorted(folders)}
        more = {"nextPageToken": str(start + 3)} if start + 3 < len(names) else {}
        handler.answer(200, json.dumps({**page, **more}).encode())

    def _resource(self, name: str) -> dict[str, str]:
        return {"name": name, "size": str(len(self.files[name])), "generation": str(self.generations[name])}

    def _object(self, handler: Handler, name: str, query: dict[str, str]) -> None:
        if name not in self.files:
            return handler.answer(404)
        if query.get("ifGenerationMatch", str(self.generations[name])) != str(self.generations[name]):
            return handler.answer(412)
        if query.get("alt") != "media":
            return handler.answer(200, json.dumps(self._resource(name)).encode())
        return handler.answer_file(self.files[name], {"ETag": f'"{base64.b64encode(name.encode()).decode()}"'})

    def _xml(self, handler: Handler, name: str, query: dict[str, str]) -> None:
        if "uploads" in query:
            number = f"upload-{len(self.log)}"
            self.uploads[number] = name, {}
            return handler.answer(200, f"<X><UploadId>{number}</UploadId></X>".encode())
        if "uploadId" in query:
            return self._upload(handler, query["uploadId"], int(query.get("partNumber", 0)))
        if handler.command == "DELETE":
            return handler.answer(204 if self.files.pop(name, None) is not None else 404)
        self.put(name, handler.body)
        return handler.answer(200)

    def _upload(self, handler: Handler, number: str, part: int) -> None:
        if number not in self.uploads:
            return handler.answer(404, b"<Error><Code>NoSuchUpload</Code></Error>")
        if part:
            self.uploads[number][1][part] = b"" if self.forgets else handler.body
            return handler.answer(200, headers={"ETag": f'"{hashlib.md5(handler.body).hexdigest()}"'})
        name, parts = self.uploads.pop(number)
        if handler.command == "DELETE":
            return handler.answer(204)
        listed = [int(part) for part in re.findall(rb"<PartNumber>(\d+)</PartNumber>", handler.body)]
        self.put(name, b"".join(parts[part] for part in listed))
        return handler.answer(200, b"<CompleteMultipartUploadResult/>")


class Cutter:
    """A relay to a server on loopback that hangs up in the middle of answers when told to."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._left = 0
        self._after = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]

    def cut(self, times: int, *, after: int) -> None:
        """Let the next answers end after so many bytes, headers included."""
        with self._lock:
            self._left, self._after = times, after

    @property
    def left(self) -> int:
        return self._left

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._accept)
        thread.start()
        try:
            yield
        finally:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection((HOST, self._to))
            for source, target, cuts in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._pump, args=(source, target, cuts), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, cuts: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    cut = cuts and self._left > 0
                    self._left -= cut
                target.sendall(data[: self._after] if cut else data)
                if cut:
                    break
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        if cuts:
            source.close()
            target.close()
