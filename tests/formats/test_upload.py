"""Directories made in object storage: nothing to be read before they are whole, nothing left when they fail."""

from __future__ import annotations

import gc
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from formats.errors import TransientError, UserError
from formats.location import open_folder
from formats.remote import upload as upload_module
from formats.remote.part_memory import MemoryPart
from formats.remote.upload import Upload, exists, part_size
from formats.replacement import Present
from tests.locations import HURRIED, Store, google_store, s3_store
from tests.servers import Fault, GoogleServer, Handler

TRACKER = "latest_checkpointed_iteration.txt"
INDEX = "iter_0000000/.metadata"
DATA = "iter_0000000/__0_0.distcp"
MIB = 1 << 20


@pytest.fixture
def google() -> Iterator[GoogleServer]:
    server = GoogleServer("bucket")
    yield server
    server.server_close()


@pytest.fixture(params=["s3", "gs"])
def store(request, google: GoogleServer, moto: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with ExitStack() as stack:
        yield s3_store(stack, monkeypatch, moto) if request.param == "s3" else google_store(google, stack, monkeypatch)


@pytest.fixture
def bucket(google: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with ExitStack() as stack:
        yield google_store(google, stack, monkeypatch)


@pytest.fixture
def files() -> dict[str, bytes]:
    return {
        DATA: os.urandom(18 * MIB + 5),
        "iter_0000000/__1_0.distcp": os.urandom(8 * MIB),
        "iter_0000000/empty": b"",
        INDEX: os.urandom(300_000),
        TRACKER: b"0",
    }


def fill(upload: Upload, files: dict[str, bytes], *, piece: int = 3 * MIB + 7) -> None:
    """As the converter does: pieces in order within a file, several files at once, memory that is used again."""

    def send(name: str) -> None:
        data, buffer = files[name], bytearray(piece)
        sink = upload.open(name, len(data))
        for at in range(0, len(data), piece):
            part = data[at : at + piece]
            buffer[: len(part)] = part
            sink.update(memoryview(buffer)[: len(part)])
        sink.close()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(send, files))


def opened(store: Store, **options) -> Upload:
    return Upload(store.url, policy=HURRIED, **options)


def test_nothing_is_there_before_commit_and_everything_after(store: Store, files: dict[str, bytes]) -> None:
    assert not exists(store.url)
    with opened(store) as upload:
        fill(upload, files)
        assert store.objects() == {}
        upload.commit([INDEX, TRACKER])
    assert store.objects() == files
    assert store.unfinished() == 0
    assert exists(store.url)
    folder = open_folder(store.url, policy=HURRIED)
    assert folder.files() == sorted(files)
    assert folder.get(DATA) == files[DATA]
    folder.close()


def test_answers_that_get_lost_change_nothing(store: Store, files: dict[str, bytes]) -> None:
    with opened(store) as upload:
        store.cutter.cut(4, after=0)
        fill(upload, files)
        store.cutter.cut(0, after=0)
        upload.commit([INDEX, TRACKER])
    assert store.objects() == files


def test_a_completion_whose_answer_is_lost_is_recognised(bucket: Store, google: GoogleServer, files: dict[str, bytes]) -> None:
    lost: list[str] = []
    google.after = lambda handler: _lose_first_completion(handler, lost)
    with opened(bucket) as upload:
        fill(upload, files)
        upload.commit([INDEX, TRACKER])
    assert len(lost) == 1
    assert bucket.objects() == files


def _lose_first_completion(handler: Handler, lost: list[str]) -> bool:
    completes = handler.command == "POST" and "uploadId" in handler.path
    if completes and not lost:
        lost.append(handler.path)
        return True
    return False


@pytest.mark.parametrize("how", ["abort", "error", "nothing"])
def test_what_is_not_committed_leaves_nothing(store: Store, files: dict[str, bytes], how: str) -> None:
    with pytest.raises(KeyError) if how == "error" else ExitStack(), opened(store) as upload:
        fill(upload, files)
        assert store.unfinished() > 0
        if how == "abort":
            upload.abort()
        elif how == "error":
            raise KeyError("of ours")
    assert store.objects() == {}
    assert store.unfinished() == 0


def test_what_is_there_is_not_harmed(store: Store) -> None:
    store.put("model.safetensors", b"precious")
    with pytest.raises(UserError, match=r"already exists\n\nhint: .*--overwrite"):
        opened(store)
    assert store.objects() == {"model.safetensors": b"precious"}


def anything(_found: Present) -> None:
    """A rule that lets everything go."""


def test_the_rule_sees_all_that_is_there_and_what_it_refuses_stays(store: Store) -> None:
    existing = {"holidays/photo.jpg": b"precious", "model.safetensors": b"precious too", "conversion.json": b"x" * 100}
    for name, data in existing.items():
        store.put(name, data)
    seen: list[bytes] = []

    def rule(present: Present) -> None:
        assert (present.label, set(present.entries)) == (store.url, set(existing))
        seen.append(present.read("conversion.json"))
        raise UserError("the rule's own words")

    with pytest.raises(UserError, match="the rule's own words"):
        opened(store, rule=rule)
    assert seen == [existing["conversion.json"]]
    assert store.objects() == existing


def test_a_whole_bucket_is_never_replaced(store: Store) -> None:
    store.put("conversion.json", b"")
    bucket = store.url.removesuffix("/out")
    for url in (bucket, f"{bucket}/", f"{bucket}//"):
        with pytest.raises(UserError) as caught:
            Upload(url, rule=anything, policy=HURRIED)
        assert str(caught.value) == (
            f"`{bucket}` is a whole bucket, which `--overwrite` never replaces\n\n"
            f"hint: give a folder in it, such as `{bucket}/model`"
        )
    assert store.objects() == {"conversion.json": b""}


@pytest.mark.parametrize("before", [{}, {"old": b"old"}], ids=["nothing was there", "something was there"])
def test_what_comes_there_meanwhile_is_not_removed(store: Store, files: dict[str, bytes], before: dict[str, bytes]) -> None:
    for name, data in before.items():
        store.put(name, data)
    with opened(store, rule=anything) as upload:
        fill(upload, files)
        store.put("thesis.tex", b"precious")
        with pytest.raises(TransientError) as caught:
            upload.commit([INDEX, TRACKER])
    what = "changed while its replacement was being made: `thesis.tex` appeared" if before else "appeared while it was being made"
    assert str(caught.value).startswith(f"`{store.url}` {what}\n\nhint: move")
    assert store.objects() == {**before, "thesis.tex": b"precious"}
    assert store.unfinished() == 0


def test_overwrite_keeps_the_old_until_commit_and_then_replaces_all_of_it(store: Store, files: dict[str, bytes]) -> None:
    old = {DATA: b"old", INDEX: b"old", TRACKER: b"100", "iter_0000100/.metadata": b"old", "config.json": b"old"}
    for name, data in old.items():
        store.put(name, data)
    with opened(store, rule=anything) as upload:
        fill(upload, files)
        assert store.objects() == old
        upload.commit([INDEX, TRACKER])
    assert store.objects() == files


def test_old_marks_go_first_and_new_ones_come_last(bucket: Store, google: GoogleServer, files: dict[str, bytes]) -> None:
    for name in (DATA, INDEX, TRACKER, "stale"):
        bucket.put(name, b"old")
    with opened(bucket, rule=anything) as upload:
        fill(upload, files)
        upload.commit([INDEX, TRACKER])
    made = [(method, *path.removeprefix("/bucket/out/").partition("?")) for method, path, _ in google.log]
    changes = [f"{method} {path}" for method, path, _, query in made if method != "GET" and not re.search("uploads|part", query)]
    assert changes[:3] == [f"DELETE {TRACKER}", f"DELETE {INDEX}", "DELETE stale"]
    assert changes[-2:] == [f"POST {INDEX}", f"PUT {TRACKER}"]


def test_what_says_which_files_belong_together_comes_before_them(bucket: Store, google: GoogleServer) -> None:
    """A run that is killed between two objects leaves none that a later one could not tell to be its own."""
    with opened(bucket) as upload:
        for name in ("a", "conversion.json", "z", TRACKER):
            upload.put(name, b"x")
        upload.commit([TRACKER], record="conversion.json")
    made = [path.removeprefix("/bucket/out/") for method, path, _ in google.log if method == "PUT"]
    assert (made[0], set(made[1:3]), made[3]) == ("conversion.json", {"a", "z"}, TRACKER)


def convert(store: Store, files: dict[str, bytes], *, meanwhile: Callable[[], None] = lambda: None) -> None:
    with opened(store) as upload:
        fill(upload, files)
        meanwhile()
        upload.commit([INDEX, TRACKER])


def test_a_commit_that_fails_takes_back_what_it_made(bucket: Store, google: GoogleServer, files: dict[str, bytes]) -> None:
    google.faulty = lambda handler: handler.command == "PUT" and TRACKER in handler.path
    google.faults.append(Fault(403))
    with pytest.raises(UserError, match=rf"cannot write `gs://bucket/out/{TRACKER}`: the server does not allow it"):
        convert(bucket, files)
    assert list(bucket.objects()) == []
    assert bucket.unfinished() == 0


def test_what_cannot_be_taken_back_keeps_the_record_that_says_whose_it_is(bucket: Store, google: GoogleServer) -> None:
    """Else no later run could replace it: it would be anybody's."""
    google.faulty = lambda handler: (handler.command, handler.path.rpartition("/")[2]) in {("PUT", TRACKER), ("DELETE", "a")}
    google.faults += [Fault(403)] * 2
    with pytest.raises(UserError, match=rf"cannot write `gs://bucket/out/{TRACKER}`"), opened(bucket) as upload:  # noqa: PT012
        for name in ("a", "conversion.json", "z", TRACKER):
            upload.put(name, b"x")
        upload.commit([TRACKER], record="conversion.json")
    assert sorted(bucket.objects()) == ["a", "conversion.json"]


def test_of_what_is_replaced_the_record_goes_last(bucket: Store, google: GoogleServer) -> None:
    """A run that ends between two objects leaves none that a later one could not tell to be a conversion's."""
    for name, size in {"conversion.json": 1, "large": 100, "old": 10}.items():
        bucket.put(name, b"x" * size)
    google.faulty = lambda handler: handler.command == "DELETE" and handler.path.endswith("/large")
    google.faults.append(Fault(403))
    with pytest.raises(UserError, match=r"cannot write `gs://bucket/out/large`"), opened(bucket, rule=anything) as upload:  # noqa: PT012
        upload.put("iter_0000000/conversion.json", b"x")
        upload.commit([], record="iter_0000000/conversion.json")
    assert {"conversion.json", "large"} <= bucket.objects().keys()


def test_somebody_else_who_was_faster_is_not_overwritten(store: Store, files: dict[str, bytes]) -> None:
    with pytest.raises(UserError, match="appeared while it was being made"):
        convert(store, files, meanwhile=lambda: store.put("model.safetensors", b"theirs"))
    assert store.objects() == {"model.safetensors": b"theirs"}
    assert store.unfinished() == 0


def test_a_part_that_cannot_be_sent_stops_the_run(bucket: Store, google: GoogleServer, files: dict[str, bytes]) -> None:
    google.faulty = lambda handler: "partNumber=2" in handler.path
    google.faults += [Fault(503)] * 6
    with pytest.raises(UserError, match=r"writing part 2 of `gs://bucket/out/.*` failed 6 times; the last time: .* HTTP 503"):
        convert(bucket, files)
    assert list(bucket.objects()) == []
    assert bucket.unfinished() == 0


def test_the_memory_of_parts_is_freed_as_they_are_sent(bucket: Store, google: GoogleServer) -> None:
    """Whoever holds it: a part that was sent, and is still known for its tag, has no data any more."""
    google.forgets = True
    piece, most = memoryview(bytearray(4 * MIB)), 0
    with opened(bucket, streams=2, memory=16 * MIB) as upload:
        sink = upload.open(DATA, 160 * MIB)
        for _ in range(40):
            sink.update(piece)
            assert upload.held <= 16 * MIB
            alive = [part for part in gc.get_objects() if type(part) is MemoryPart]
            most = max(most, sum(part.size for part in alive if hasattr(part, "_data")))
        sink.close()
    assert 8 * MIB <= most <= 16 * MIB


def test_parts_are_few_enough_for_any_file() -> None:
    assert part_size(1) == part_size(9000 * 8 * MIB) == 8 * MIB
    for size in (100_000_000_000, 5_000_000_000_000):
        assert size / part_size(size) <= 9000
        assert part_size(size) % (8 * MIB) == 0


@pytest.mark.parametrize("url", ["hf://org/name", "https://host/x", "file:///x", "just/a/path"])
def test_other_places_cannot_be_written(url: str) -> None:
    with pytest.raises(UserError, match="cannot be written to"):
        Upload(url)


def test_no_thread_outlives_an_upload(bucket: Store, files: dict[str, bytes]) -> None:
    with opened(bucket) as upload:
        fill(upload, files)
        upload.commit([INDEX, TRACKER])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("upload")]


def test_many_files_at_once_share_a_bounded_memory(bucket: Store, google: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve files are filled in turns, as ranks are: more open parts than memory for them, and each waits for its next bytes."""
    monkeypatch.setattr(upload_module, "PART_BYTES", MIB)
    files = {f"iter_0000000/__{number}_0.distcp": os.urandom(2 * MIB + number) for number in range(12)}
    with opened(bucket, streams=2, memory=4 * MIB) as upload:
        sinks = {name: upload.open(name, len(data)) for name, data in files.items()}
        for at in range(0, 2 * MIB + 12, MIB // 2):
            for name, data in files.items():
                sinks[name].update(memoryview(data)[at : at + MIB // 2])
                assert upload.held <= 4 * MIB
        for sink in sinks.values():
            sink.close()
        upload.commit([])
    assert bucket.objects() == files
