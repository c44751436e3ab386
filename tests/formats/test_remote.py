"""Folders read over real protocols, from servers on loopback that drop connections, lie about versions and refuse."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from formats.errors import UserError
from formats.folder import Folder, LocalFolder
from formats.location import open_folder
from formats.remote.retry import RetryPolicy
from tests.conftest import SECRET
from tests.locations import BIG, HURRIED, KINDS, Place, opened, served
from tests.servers import HOST, Fault, WebServer


@pytest.fixture(params=KINDS)
def server(request, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, moto: int) -> Iterator[Place]:
    with served(request.param, files, monkeypatch, moto) as server:
        yield server


def read(folder: Folder, name: str, offset: int = 0, length: int | None = None) -> bytes:
    out = bytearray(folder.size(name) - offset if length is None else length)
    folder.read_into(name, offset, memoryview(out))
    return bytes(out)


def test_a_remote_folder_equals_the_local_one(server: Place, files: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    remote, local = server.open(), LocalFolder(tmp_path)
    assert remote.files() == local.files()
    assert remote.children() == local.children()
    assert {name: remote.get(name) for name in files} == files
    assert {name: remote.size(name) for name in files} == {name: len(data) for name, data in files.items()}
    assert read(remote, BIG, 1000, 70_000) == files[BIG][1000:71_000]
    assert [read(remote, BIG, at, 7) for at in (0, 65_533, 299_993)] == [files[BIG][at : at + 7] for at in (0, 65_533, 299_993)]
    assert remote.has("config.json")
    assert not remote.has("absent.json")
    with pytest.raises(UserError, match=r"has no `absent\.json`"):
        remote.size("absent.json")
    remote.close()


def test_folders_below_are_folders(server: Place) -> None:
    for name in ("iter_0000000/.metadata", "iter_0000000/__0_0.distcp", ".cache/huggingface/x.lock"):
        server.put(name, b"data of " + name.encode())
    server.put("latest_checkpointed_iteration.txt", b"0")
    folder = server.open()
    assert "iter_0000000/" in folder.children()
    assert folder.below("iter_0000000").get("__0_0.distcp") == b"data of iter_0000000/__0_0.distcp"
    assert folder.below("iter_0000000").name == "iter_0000000"
    assert folder.below("iter_0000000").label == f"{folder.label}/iter_0000000"
    assert "iter_0000000/.metadata" in folder.files()
    assert ".cache/huggingface/x.lock" not in folder.files()
    folder.close()


def test_dropped_connections_are_taken_up_where_they_broke(server: Place, files: dict[str, bytes]) -> None:
    folder = server.open()
    folder.size(BIG)
    server.cutter.cut(4, after=5000)
    assert read(folder, BIG, 11, 200_000) == files[BIG][11:200_011]
    assert server.cutter.left == 0
    folder.close()


@pytest.mark.parametrize("after", [20, 100, 200])
def test_lists_and_sizes_that_are_cut_off_in_the_headers_are_asked_for_again(
    server: Place, files: dict[str, bytes], after: int
) -> None:
    folder = server.open()
    server.cutter.cut(2, after=after)
    assert BIG in folder.files()
    later = server.open()
    server.cutter.cut(2, after=after)
    assert later.size(BIG) == len(files[BIG])
    assert later.get("config.json") == files["config.json"]
    folder.close()
    later.close()


def test_connections_that_never_hold_are_an_error_that_names_file_and_range(server: Place) -> None:
    folder = server.open(RetryPolicy(attempts=3, first=0.001, longest=0.001, silence=60))
    folder.size(BIG)
    server.cutter.cut(100, after=400)
    with pytest.raises(UserError, match=rf"reading `{BIG}` from byte 100 to 200100 failed 3 times; the last time: ") as caught:
        read(folder, BIG, 100, 200_000)
    server.cutter.cut(0, after=0)
    assert SECRET not in str(caught.value)
    folder.close()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hf"])
def test_another_version_is_an_error(kind: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, moto: int) -> None:
    with served(kind, files, monkeypatch, moto) as server:
        folder = server.open()
        before = folder.version(BIG)
        read(folder, BIG, 0, 100_000)
        server.put(BIG, os.urandom(len(files[BIG])))
        with pytest.raises(UserError, match=rf"`{BIG}` changed while it was being read: (ETag|generation) was `.+`, is `.+`"):
            read(folder, BIG, 100_000, 100_000)
        later = server.open()
        assert later.version(BIG) != before
        folder.close()
        later.close()


def test_four_threads_read_at_once(server: Place, files: dict[str, bytes]) -> None:
    folder = server.open()
    spans = [(at, min(20_000, 300_000 - at)) for at in range(0, 300_000, 20_000)]
    server.cutter.cut(3, after=2000)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda span: read(folder, BIG, *span), spans))
    assert b"".join(parts) == files[BIG]
    folder.close()


def test_reading_past_the_end_is_an_error(server: Place) -> None:
    folder = server.open()
    with pytest.raises(UserError, match="ends at byte 300000, but its header promises data up to 300001"):
        read(folder, BIG, 299_000, 1001)
    folder.close()


def test_secrets_stand_in_no_label(server: Place) -> None:
    folder = server.open()
    assert SECRET not in folder.label + folder.version(BIG) + folder.name
    folder.close()


@pytest.mark.parametrize("kind", ["hf", "s3"])
def test_hashes_are_told_where_they_are_known(kind: str, files, monkeypatch: pytest.MonkeyPatch, moto: int) -> None:
    with served(kind, files, monkeypatch, moto) as server:
        folder = server.open()
        folder.files()
        assert folder.sha256(BIG) == hashlib.sha256(files[BIG]).hexdigest()
        assert folder.sha256("config.json") is None
        folder.close()


@pytest.fixture
def web(files: dict[str, bytes]) -> Iterator[WebServer]:
    server = WebServer()
    server.files.update(files)
    with server.running():
        yield server


@pytest.mark.parametrize(
    "fault",
    [
        Fault(500),
        Fault(503, {"Retry-After": "0"}),
        Fault(429, {"Retry-After": "Thu, 01 Jan 2026 00:00:00 GMT"}),
        Fault(body_ends_after=0),
        Fault(body_ends_after=99_999),
        Fault(silence=1),
    ],
)
def test_what_passes_is_tried_again(fault: Fault, web: WebServer, files: dict[str, bytes]) -> None:
    # Short only where silence is what passes: a busy machine may be silent for a while, and then a few attempts more do it.
    patience = RetryPolicy(attempts=40, silence=0.5) if fault.silence else RetryPolicy(attempts=4)
    with opened(web.url, replace(patience, first=0.001, longest=0.01)) as folder:
        folder.size(BIG)
        web.faults += [fault] * (1 if fault.silence else 3)
        assert read(folder, BIG, 0, 200_000) == files[BIG][:200_000]


def test_waiting_follows_the_servers_wish_within_reason() -> None:
    patience = RetryPolicy(first=0.5, longest=30)
    assert [patience.pause(failed, None) // 0.5 for failed in (1, 2, 3)] == pytest.approx([1.25, 2.5, 5], rel=0.3)
    assert 30 <= patience.pause(1, 3600) <= 45
    assert 7 <= patience.pause(1, 7) <= 10.5


@pytest.mark.parametrize(("status", "meaning"), [(401, "wants credentials"), (403, "does not allow it"), (418, "refuses")])
def test_refusals_are_not_tried_again(status: int, meaning: str, web: WebServer) -> None:
    with opened(f"http://user:{SECRET}@{HOST}:{web.port}/?sig={SECRET}") as folder:
        folder.size(BIG)
        web.faults += [Fault(status)]
        web.log.clear()
        with pytest.raises(UserError, match=rf"{BIG}`: the server {meaning} \(HTTP {status}\)") as caught:
            read(folder, BIG, 0, 100_000)
        assert len(web.log) == 1
        assert SECRET not in str(caught.value) + folder.label


def test_user_and_query_of_a_url_reach_the_server_alone(web: WebServer, files: dict[str, bytes]) -> None:
    for secret, url in {
        "Basic dTpz": f"http://u:s@{HOST}:{web.port}",
        f"sig={SECRET}": f"{web.url}/?sig={SECRET}",
    }.items():
        web.secret = secret
        with opened(url) as folder:
            assert folder.get("config.json") == files["config.json"]
            assert folder.label == web.url
    with opened(web.url) as folder, pytest.raises(UserError, match="wants credentials"):
        folder.get("config.json")


def test_netrc_opens_a_server(web: WebServer, files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine {HOST} login u password s\n")
    (tmp_path / ".netrc").chmod(0o600)
    web.secret = "Basic dTpz"
    with opened(web.url) as folder:
        assert folder.get("config.json") == files["config.json"]


def test_a_server_without_head_or_etag_will_do(web: WebServer, files: dict[str, bytes]) -> None:
    web.heads, web.etag = False, lambda data: ""
    with opened(web.url) as folder:
        assert folder.get(BIG) == files[BIG]
        web.files[BIG] = b"short"
        with pytest.raises(UserError, match="changed while it was being read: it had 300000 bytes, now it has 5"):
            folder.get(BIG)


def test_a_weak_etag_is_compared_too(web: WebServer, files: dict[str, bytes]) -> None:
    web.etag = lambda data: f'W/"{hashlib.md5(data).hexdigest()}"'
    with opened(web.url) as folder:
        assert folder.get(BIG) == files[BIG]
        web.files[BIG] = bytes(300_000)
        with pytest.raises(UserError, match='ETag was `W/"'):
            folder.get(BIG)


def test_a_server_without_ranges_serves_small_files_only(web: WebServer, files: dict[str, bytes]) -> None:
    web.ranges = False
    with opened(web.url) as folder:
        assert folder.get("config.json") == files["config.json"]
        with pytest.raises(UserError, match="does not answer by byte range"):
            read(folder, BIG, 0, 100_000)


def test_integrity_names_the_files_of_an_iteration(web: WebServer) -> None:
    names = ["__0_0.distcp", "huggingface/headers/model.safetensors.header", "../../etc/passwd", "/etc/passwd"]
    web.files.update({f"m/iter_0000007/{name}": b"x" for name in [".metadata", *names]})
    web.files["m/iter_0000007/integrity.json"] = json.dumps({"algorithm": "sha256", "files": dict.fromkeys(names, "0")}).encode()
    web.files["m/latest_checkpointed_iteration.txt"] = b"7\n"
    with opened(f"{web.url}/m") as folder:
        assert folder.children() == ["iter_0000007/", "latest_checkpointed_iteration.txt"]
        iteration = folder.below("iter_0000007")
        assert iteration.files() == [
            ".metadata",
            "__0_0.distcp",
            "huggingface/headers/model.safetensors.header",
            "integrity.json",
        ]
        assert iteration.below("huggingface").files() == ["headers/model.safetensors.header"]
    assert not any("passwd" in path for _, path, _ in web.log)


def test_files_of_an_iteration_are_found_that_the_caller_knows_of(web: WebServer) -> None:
    known = [".metadata", "__0_0.distcp", "notes/of ours.json"]
    web.files.update({f"m/{name}": b"x" for name in known})
    folder = open_folder(f"{web.url}/m", policy=HURRIED, probe=["notes/of ours.json", "notes/gone.json"])
    assert folder.files() == [".metadata", "notes/of ours.json"]
    folder.close()


def test_small_reads_close_together_are_one_request(web: WebServer, files: dict[str, bytes]) -> None:
    with opened(web.url) as folder:
        folder.size(BIG)
        web.log.clear()
        assert b"".join(read(folder, BIG, at, 50) for at in range(70_000, 90_000, 50)) == files[BIG][70_000:90_000]
        assert len(web.log) == 1


def test_memory_is_that_of_the_caller(web: WebServer) -> None:
    web.files["big"] = bytes(64 << 20)
    with opened(web.url) as folder:
        out = memoryview(bytearray(4 << 20))
        folder.read_into("big", 0, out)
        tracemalloc.start()
        for at in range(0, 64 << 20, 4 << 20):
            folder.read_into("big", at, out)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8 << 20, "the server's copy of one range, and little more"


def test_connections_are_used_again(web: WebServer) -> None:
    ports: set[int] = set()
    web.faulty = lambda handler: bool(ports.add(handler.client_address[1]))
    web.faults.append(Fault())
    with opened(web.url) as folder:
        for at in range(0, 200_000, 20_000):
            read(folder, BIG, at, 20_000)
    assert len(ports) == 1


def test_a_proxy_is_used_and_told_no_secret_of_the_url(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:pass@{HOST}:{web.port}")
    web.files["models/config.json"] = b"{}"
    with opened(f"http://user:{SECRET}@models.example/models") as folder:
        assert folder.get("config.json") == b"{}"
    assert {path for _, path, _ in web.log} == {"http://models.example/models/config.json"}
    assert all(headers["Proxy-Authorization"] == "Basic bWU6cGFzcw==" for _, _, headers in web.log)


@pytest.mark.parametrize(
    ("url", "pattern"),
    [
        ("ftp://host/x", r"`ftp://` is not supported\n\nhint: known are hf://, s3://"),
        ("http://[half/x", "not a URL of a web server"),
        ("s3:///x", "names no bucket"),
    ],
)
def test_a_url_that_names_nothing_readable_is_refused(url: str, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern):
        open_folder(url, policy=HURRIED)


def test_a_bucket_that_is_not_there_says_so(moto: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{HOST}:{moto}")
    with opened("s3://no-such-bucket/x") as folder, pytest.raises(UserError, match="HTTP 404, NoSuchBucket") as caught:
        folder.files()
    assert SECRET not in str(caught.value)


def test_an_endpoint_that_is_no_url_is_named_but_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"{SECRET}@nowhere")
    with pytest.raises(UserError, match="check AWS_ENDPOINT_URL") as caught:
        open_folder("s3://bucket/x")
    assert SECRET not in str(caught.value)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "botocore.session", None)
    with pytest.raises(UserError, match=r"pip install 'mbtools\[remote\]'"):
        open_folder("s3://bucket/x")


def test_a_path_is_a_local_folder(tmp_path: Path) -> None:
    assert isinstance(open_folder(tmp_path), LocalFolder)
    assert isinstance(open_folder(str(tmp_path)), LocalFolder)
