"""Places on loopback to read a directory from, and buckets to upload one to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from formats.folder import Folder
from formats.location import open_folder
from formats.remote.retry import RetryPolicy
from formats.remote.s3 import open_client
from tests.conftest import SECRET
from tests.servers import HOST, Cutter, GoogleServer, HubServer, Server, WebServer

KINDS = ("http", "hf", "s3", "gs")
HURRIED = RetryPolicy(attempts=6, first=0.002, longest=0.01, silence=60)
BIG = "model-00001-of-00002.safetensors"


@dataclass
class Place:
    """Somewhere to read `files` from, and ways to harm it."""

    url: str
    put: Callable[[str, bytes], None]
    cutter: Cutter

    def open(self, policy: RetryPolicy = HURRIED) -> Folder:
        return open_folder(self.url, policy=policy)


@contextmanager
def opened(url: str, policy: RetryPolicy = HURRIED) -> Iterator[Folder]:
    """Open a folder for a while."""
    folder = open_folder(url, policy=policy)
    try:
        yield folder
    finally:
        folder.close()


@contextmanager
def served(kind: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, port: int) -> Iterator[Place]:
    with ExitStack() as stack:
        if kind == "s3":
            yield _s3(files, monkeypatch, stack, port)
        else:
            yield {"http": web_place, "hf": _hub, "gs": _google}[kind](files, monkeypatch, stack)


def _run(stack: ExitStack, server: Server) -> Cutter:
    stack.enter_context(server.running())
    return _cutter(stack, server.port)


def _cutter(stack: ExitStack, port: int) -> Cutter:
    cutter = Cutter(port)
    stack.enter_context(cutter.running())
    return cutter


def web_place(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> Place:
    server = WebServer()
    server.files.update({f"models/tiny one/{name}": data for name, data in files.items()})
    cutter = _run(stack, server)
    url = f"http://{HOST}:{cutter.port}/models/tiny%20one"
    return Place(url, lambda name, data: server.files.update({f"models/tiny one/{name}": data}), cutter)


def _hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> Place:
    far = WebServer()
    cutter = _run(stack, far)
    server = HubServer("org/tiny", far)
    server.far = f"http://{HOST}:{cutter.port}"
    server.secret = SECRET
    server.files.update(files)
    stack.enter_context(server.running())
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    return Place("hf://org/tiny@v1", lambda name, data: server.files.update({name: data}), cutter)


def _google(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> Place:
    server = GoogleServer("bucket")
    for name, data in files.items():
        server.put(f"models/tiny one/{name}", data)
    cutter = _run(stack, server)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{HOST}:{cutter.port}")
    return Place("gs://bucket/models/tiny one", lambda name, data: server.put(f"models/tiny one/{name}", data), cutter)


def _s3(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, stack: ExitStack, port: int) -> Place:
    cutter = _cutter(stack, port)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{HOST}:{cutter.port}")
    client = open_client(HURRIED)
    bucket = f"bucket-{cutter.port}"
    client.create_bucket(Bucket=bucket)

    def put(name: str, data: bytes) -> None:
        extra = {"ChecksumAlgorithm": "SHA256"} if name == BIG else {}
        client.put_object(Bucket=bucket, Key=f"models/tiny one/{name}", Body=data, **extra)

    for name, data in files.items():
        put(name, data)
    stack.callback(client.close)
    return Place(f"s3://{bucket}/models/tiny one", put, cutter)


@dataclass
class Store:
    """A bucket to upload to, and what is in it."""

    url: str
    cutter: Cutter
    objects: Callable[[], dict[str, bytes]]
    unfinished: Callable[[], int]
    put: Callable[[str, bytes], None]


def s3_store(stack: ExitStack, monkeypatch: pytest.MonkeyPatch, port: int) -> Store:
    cutter = Cutter(port)
    stack.enter_context(cutter.running())
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{HOST}:{cutter.port}")
    client, bucket = open_client(HURRIED), f"uploads-{cutter.port}"
    client.create_bucket(Bucket=bucket)
    stack.callback(client.close)

    def objects() -> dict[str, bytes]:
        keys = [item["Key"] for item in client.list_objects_v2(Bucket=bucket).get("Contents", ())]
        return {key.removeprefix("out/"): client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}

    def unfinished() -> int:
        return len(client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()))

    def put(name: str, data: bytes) -> None:
        client.put_object(Bucket=bucket, Key=f"out/{name}", Body=data)

    return Store(f"s3://{bucket}/out", cutter, objects, unfinished, put)


def google_store(server: GoogleServer, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> Store:
    stack.enter_context(server.running())
    cutter = Cutter(server.port)
    stack.enter_context(cutter.running())
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{HOST}:{cutter.port}")
    return Store(
        "gs://bucket/out",
        cutter,
        lambda: {name.removeprefix("out/"): data for name, data in server.files.items()},
        lambda: len(server.uploads),
        lambda name, data: server.put(f"out/{name}", data),
    )
