"""Whole conversions from servers and to buckets on loopback: the same bytes as from and to a disk."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack

import pytest

from converter import Reporter, TransientError, UserError, check, hf_to_mcore, inspect, mcore_to_hf, verify
from converter.ranks import Ranks
from formats.remote import folder as remote
from tests.conftest import SECRET
from tests.locations import HURRIED, KINDS, google_store, s3_store, served
from tests.models import model_tree, tree
from tests.servers import GoogleServer

TELLS_SOURCE = {"iter_0000000/conversion.json", "iter_0000000/integrity.json"}
SHARD = "model-00001-of-00003.safetensors"

pytestmark = pytest.mark.usefixtures("at_home")


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    monkeypatch.setattr(remote, "RetryPolicy", lambda: HURRIED)


@pytest.fixture
def folder(model_folder):
    return model_folder("gqa", dtype="bfloat16", max_shard_size="150KB")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def server(kind, folder, monkeypatch, moto):
    with served(kind, tree(folder), monkeypatch, moto) as server:
        yield server


@pytest.fixture(params=["s3", "gs"])
def bucket(request, monkeypatch, moto):
    with ExitStack() as stack:
        if request.param == "s3":
            yield s3_store(stack, monkeypatch, moto)
        else:
            server = GoogleServer("bucket")
            yield google_store(server, stack, monkeypatch)


def without(names, files):
    return {name: data for name, data in files.items() if name not in names}


def test_an_import_by_byte_range_makes_the_same_bytes(folder, kind, server, tmp_path):
    hf_to_mcore(folder, tmp_path / "local", tp=2, pp=2)
    server.cutter.cut(4, after=900)
    hf_to_mcore(server.url, tmp_path / "remote", tp=2, pp=2, verify=True)
    local, far = tree(tmp_path / "local"), tree(tmp_path / "remote")
    if kind == "http":  # it has no listing: side files of unknown names do not travel
        left = {name for name in local if name.endswith("logo.svg")}
        assert len(left) == 1
        local = without(left, local)
    assert without(TELLS_SOURCE, far) == without(TELLS_SOURCE, local)
    assert check(tmp_path / "remote").whole
    text = (tmp_path / "remote" / "iter_0000000" / "conversion.json").read_text()
    assert SECRET not in text
    assert json.loads(text)["blake3"] == json.loads(local["iter_0000000/conversion.json"])["blake3"]


def test_the_hub_is_told_by_id_commit_and_sha256(folder, monkeypatch, moto, tmp_path):
    with served("hf", tree(folder), monkeypatch, moto) as server:
        hf_to_mcore(server.url, tmp_path / "m")
    source = json.loads((tmp_path / "m" / "iter_0000000" / "conversion.json").read_text())["source"]
    assert (source["id"], source["revision"]) == ("org/tiny", "c0ffee" + "0" * 34)
    assert all(len(entry["sha256"]) == 64 for entry in source["files"].values())


def test_an_export_by_byte_range_makes_the_same_bytes(folder, kind, monkeypatch, moto, tmp_path):
    hf_to_mcore(folder, tmp_path / "m", tp=2, pp=2)
    with served(kind, tree(tmp_path / "m"), monkeypatch, moto) as server:
        mcore_to_hf(server.url, tmp_path / "back")
        assert verify(folder, server.url).same
        assert inspect(server.url).layout == {"tp": 2, "pp": 2}
        assert check(server.url).whole
    assert model_tree(tmp_path / "back") == tree(folder)


def test_a_source_that_changes_meanwhile_is_an_error_and_leaves_nothing(folder, server, kind, tmp_path, monkeypatch):
    from converter import worker

    def change_then_run(*arguments, run=worker.run, **options):
        data = bytearray(tree(folder)[SHARD])
        data[-1] ^= 1
        server.put(SHARD, bytes(data))
        run(*arguments, **options)

    if kind == "hf":
        pytest.skip("a commit of the Hub does not change; a mirror that lies is tested with the folder")
    monkeypatch.setattr(worker, "run", change_then_run)
    with pytest.raises(UserError, match=rf"`{SHARD}` changed while it was being read"):
        hf_to_mcore(server.url, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_a_network_that_goes_away_is_resumed(folder, server, tmp_path):
    hf_to_mcore(server.url, tmp_path / "straight", tp=2)
    (tmp_path / "other").mkdir()
    broken = []

    def cut(_count):
        if not broken:
            broken.append(server.cutter.cut(10_000, after=10))

    from converter import Reporter

    with pytest.raises(TransientError, match="failed 6 times"):
        hf_to_mcore(server.url, tmp_path / "other" / "m", tp=2, workers=1, reporter=Reporter(progress=cut))
    server.cutter.cut(0, after=0)
    summary = hf_to_mcore(server.url, tmp_path / "other" / "m", tp=2, resume=True)
    assert summary.reused_bytes > 0
    assert tree(tmp_path / "other" / "m") == tree(tmp_path / "straight")


def test_an_import_to_a_bucket_has_the_same_bytes_and_is_read_from_there(folder, bucket, tmp_path):
    hf_to_mcore(folder, tmp_path / "m", tp=2, pp=2)
    assert hf_to_mcore(folder, bucket.url, tp=2, pp=2).target == bucket.url
    assert bucket.objects() == tree(tmp_path / "m")
    assert bucket.unfinished() == 0
    assert verify(folder, bucket.url).same
    mcore_to_hf(bucket.url, tmp_path / "back")
    assert model_tree(tmp_path / "back") == tree(folder)


def test_an_export_to_a_bucket_has_the_same_bytes(folder, bucket, tmp_path):
    hf_to_mcore(folder, tmp_path / "m", tp=2, pp=2)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", max_shard_size=100_000)
    mcore_to_hf(tmp_path / "m", bucket.url, max_shard_size=100_000)
    assert bucket.objects() == tree(tmp_path / "back")


def test_an_upload_that_fails_leaves_nothing_there(checkpoint, bucket, monkeypatch):
    monkeypatch.setattr("formats.remote.upload.RetryPolicy", lambda: HURRIED)
    bucket.cutter.cut(10_000, after=0)
    with pytest.raises(UserError):
        mcore_to_hf(checkpoint, bucket.url)
    bucket.cutter.cut(0, after=0)
    assert not bucket.objects()


def test_a_source_on_a_disk_that_changes_meanwhile_leaves_nothing_in_a_bucket(folder, bucket, tmp_path):
    source = shutil.copytree(folder, tmp_path / "hf")
    changes = [lambda: (source / SHARD).write_bytes((source / SHARD).read_bytes())]
    reporter = Reporter(progress=lambda _count: changes and changes.pop()())
    with pytest.raises(UserError, match=f"`{source / SHARD}` changed while it was being read"):
        hf_to_mcore(source, bucket.url, tp=2, workers=1, reporter=reporter)
    assert not changes
    assert not bucket.objects()
    assert bucket.unfinished() == 0


def test_a_bucket_with_a_model_is_refused_and_replaced_on_purpose(folder, checkpoint, bucket, tmp_path):
    hf_to_mcore(folder, bucket.url, tp=2)
    before = bucket.objects()
    with pytest.raises(UserError, match="already exists"):
        hf_to_mcore(folder, bucket.url)
    assert bucket.objects() == before
    hf_to_mcore(folder, bucket.url, tp=4, overwrite=True)
    hf_to_mcore(folder, tmp_path / "m", tp=4)
    assert bucket.objects() == tree(tmp_path / "m")


@pytest.mark.parametrize("option", ["verify", "resume"])
def test_what_a_bucket_cannot_do_is_said_at_once(folder, option):
    with pytest.raises(UserError, match=rf"`--{option}` needs a directory as target, `s3://bucket/out` is not one"):
        hf_to_mcore(folder, "s3://bucket/out", **{option: True})


def test_several_ranks_do_not_upload(folder):
    with pytest.raises(UserError, match="cannot be written by 2 processes together"):
        hf_to_mcore(folder, "s3://bucket/out", ranks=Ranks(0, 2, "run"))
