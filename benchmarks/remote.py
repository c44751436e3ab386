"""Which client reads byte ranges best? Four threads read 4 MiB ranges from a server on loopback, each client in its own process.

    python benchmarks/remote.py [--runs 3] [--size 400] [CLIENT …]

Prints medians, measured in turns. Clients whose packages are missing are left out
(`pip install fsspec s3fs aiohttp tensorstore urllib3 httpx`).
"""

# ruff: noqa: ARG001 - each client is imported where its process measures it, and all are called alike

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryFile
from urllib.parse import urlsplit

STEP = 4 << 20
THREADS = 4
type Read = Callable[[int, memoryview], None]


class Handler(BaseHTTPRequestHandler):
    """One file under every path that ends in `/big`; good enough for clients of S3."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    file: int
    size: int

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(byte_range[1]), int(byte_range[2]) + 1) if byte_range else (0, self.size)
        exists = urlsplit(self.path).path.endswith("/big")
        self.send_response((206 if byte_range else 200) if exists else 404)
        self.send_header("Content-Length", str(end - start if exists else 0))
        self.send_header("ETag", '"one"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        if byte_range:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{self.size}")
        self.end_headers()
        while exists and self.command == "GET" and start < end:
            start += os.sendfile(self.connection.fileno(), self.file, start, end - start)

    do_HEAD = do_GET  # noqa: N815 - the standard library's names


def range_of(offset: int, out: memoryview) -> dict[str, str]:
    return {"Range": f"bytes={offset}-{offset + len(out) - 1}"}


def fill(out: memoryview, readinto: Callable[[memoryview], int]) -> None:
    filled = 0
    while filled < len(out):
        filled += readinto(out[filled:])


def standard_library(url: str) -> Read:
    local = threading.local()

    def read(offset: int, out: memoryview) -> None:
        if not hasattr(local, "connection"):
            local.connection = HTTPConnection(urlsplit(url).netloc)
        local.connection.request("GET", "/bucket/big", headers=range_of(offset, out))
        fill(out, local.connection.getresponse().readinto)

    return read


def urllib3(url: str) -> Read:
    import urllib3

    pool = urllib3.PoolManager(maxsize=THREADS)

    def read(offset: int, out: memoryview) -> None:
        answer = pool.request("GET", f"{url}/bucket/big", headers=range_of(offset, out), preload_content=False)
        fill(out, answer.readinto)
        answer.release_conn()

    return read


def httpx(url: str) -> Read:
    from huggingface_hub import get_session

    client = get_session()

    def read(offset: int, out: memoryview) -> None:
        done = 0
        with client.stream("GET", f"{url}/bucket/big", headers=range_of(offset, out)) as answer:
            for piece in answer.iter_raw():
                out[done : done + len(piece)] = piece
                done += len(piece)

    return read


def botocore(url: str) -> Read:
    from botocore.session import get_session

    client = get_session().create_client("s3", endpoint_url=url)

    def read(offset: int, out: memoryview) -> None:
        answer = client.get_object(Bucket="bucket", Key="big", IfMatch='"one"', **range_of(offset, out))
        fill(out, answer["Body"].readinto)

    return read


def fsspec_http(url: str) -> Read:
    import fsspec

    system = fsspec.filesystem("http")
    return lambda offset, out: _copy(out, system.cat_file(f"{url}/bucket/big", offset, offset + len(out)))


def s3fs(url: str) -> Read:
    import s3fs

    system = s3fs.S3FileSystem()
    return lambda offset, out: _copy(out, system.cat_file("bucket/big", offset, offset + len(out)))


def s3fs_opened(url: str) -> Read:
    import s3fs

    system, local = s3fs.S3FileSystem(), threading.local()

    def read(offset: int, out: memoryview) -> None:
        if not hasattr(local, "file"):
            local.file = system.open("bucket/big", "rb", cache_type="none")
        local.file.seek(offset)
        fill(out, local.file.readinto)

    return read


def tensorstore_http(url: str) -> Read:
    return _tensorstore(f"{url}/bucket/")


def tensorstore_s3(url: str) -> Read:
    return _tensorstore({"driver": "s3", "bucket": "bucket", "endpoint": url, "aws_region": "us-east-1"})


def _tensorstore(spec: object) -> Read:
    import tensorstore

    store = tensorstore.KvStore.open(spec).result()
    return lambda offset, out: _copy(out, store.read("big", byte_range=slice(offset, offset + len(out))).result().value)


def ours_http(url: str) -> Read:
    return _ours(f"{url}/bucket")


def ours_s3(url: str) -> Read:
    return _ours("s3://bucket")


def _ours(url: str) -> Read:
    from formats.location import open_folder

    folder = open_folder(url)
    folder.size("big")
    return lambda offset, out: folder.read_into("big", offset, out)


def _copy(out: memoryview, data: bytes) -> None:
    out[:] = data


CLIENTS: dict[str, Callable[[str], Read]] = {
    made.__name__.replace("_", "-"): made
    for made in (
        standard_library, urllib3, httpx, fsspec_http, tensorstore_http, ours_http,
        botocore, s3fs, s3fs_opened, tensorstore_s3, ours_s3,
    )
}  # fmt: skip


def measure(client: str, url: str, size: int) -> dict[str, float]:
    """What one client takes, in this process, which does nothing else."""
    begun = time.perf_counter()
    read = CLIENTS[client](url)
    opened, memory = time.perf_counter() - begun, _peak()
    offsets = iter(range(0, size, STEP))
    lock = threading.Lock()

    def work() -> None:
        out = memoryview(bytearray(STEP))
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            read(offset, out)
            assert out[:8] == offset.to_bytes(8, "little")

    begun, busy = time.perf_counter(), time.process_time()
    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begun
    return {"MB/s": size / 1e6 / took, "cpu s": time.process_time() - busy, "open s": opened, "MiB": memory, "peak MiB": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def served(size: int) -> Iterator[str]:
    with TemporaryFile() as file:
        for offset in range(0, size, STEP):
            file.write(offset.to_bytes(8, "little").ljust(STEP, b"\0"))
        file.flush()
        Handler.file, Handler.size = file.fileno(), size
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        server.server_close()


def in_own_process(client: str, url: str, size: int) -> dict[str, float] | None:
    nobody = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
    settings = {**os.environ, **nobody, "AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true", "PYTHONPATH": "."}
    arguments = [sys.executable, __file__, client, "--at", url, "--size", str(size)]
    completed = subprocess.run(
        arguments, env=settings, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120, check=False
    )
    return json.loads(completed.stdout) if completed.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(CLIENTS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", type=int, default=400, help="MB")
    parser.add_argument("--at", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.at:
        print(json.dumps(measure(options.clients[0], options.at, options.size)), flush=True)
        os._exit(0)  # some clients' threads do not end
    size = options.size * 1_000_000 // STEP * STEP
    with served(size) as url:
        rounds = [{name: in_own_process(name, url, size) for name in options.clients or CLIENTS} for _ in range(options.runs)]
    for name in rounds[0]:
        measured = [measurement[name] for measurement in rounds if measurement[name]]
        medians = (
            {figure: statistics.median(measurement[figure] for measurement in measured) for figure in measured[0]}
            if measured
            else {}
        )
        print(
            f"{name:17}",
            "  ".join(f"{figure} {value:8.2f}" for figure, value in medians.items()) or "not installed, or it failed",
        )


if __name__ == "__main__":
    main()
