"""Compressed zarr arrays are read from any folder: each chunk is fetched and decoded once, and few are kept."""

from __future__ import annotations

import json
import sys
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from formats import zarr_compressed
from formats.detect import open_megatron
from formats.errors import UserError
from formats.folder import Folder, LocalFolder
from formats.megatron_reader import MegatronReader
from formats.tar import TarFolder
from formats.zarr import ARRAY
from formats.zarr_compressed import Compression, DecodedChunks
from tests.formats import zarr_arrays
from tests.locations import KINDS, served
from tests.models import tree

NAME = "output_layer.weight"
VALUES = np.random.default_rng(0).standard_normal((70, 120)).astype(np.float32)
LISTED = [kind for kind in KINDS if kind != "http"]
"""A web server lists no folder, so that arrays there are not found, compressed or not."""


@pytest.fixture
def local(tmp_path) -> Path:
    """A checkpoint of one compressed weight in 3 × 3 chunks, of which those at the ends reach past them."""
    folder = tmp_path / "m"
    zarr_arrays.write(folder / NAME, VALUES, chunks=(30, 50), compressor="zlib")
    zarr_arrays.mark(folder)
    return folder


def read(folder: Folder) -> np.ndarray:
    """Read the weight."""
    return bands(checked(folder))


def checked(folder: Folder) -> MegatronReader:
    reader = open_megatron(folder)
    reader.check()
    return reader


def bands(reader: MegatronReader) -> np.ndarray:
    """Read the weight, five rows at a time."""
    out = np.empty_like(VALUES)
    for row in range(0, len(out), 5):
        reader.read(NAME, (slice(row, row + 5), slice(0, out.shape[1])), out[row : row + 5])
    return out


@pytest.fixture
def decoded(monkeypatch) -> Counter[str]:
    """How often each chunk was decoded."""
    counts: Counter[str] = Counter()

    def decode(folder, file, compression, decode=zarr_compressed._decode):
        counts[file] += 1
        return decode(folder, file, compression)

    monkeypatch.setattr(zarr_compressed, "_decode", decode)
    return counts


@pytest.mark.parametrize("kind", LISTED)
def test_compressed_arrays_of_servers_are_those_of_a_disk(local, monkeypatch, moto, kind, decoded):
    with served(kind, tree(local), monkeypatch, moto) as server:
        reader = checked(server.open())
        server.cutter.cut(2, after=900)
        assert bands(reader).tobytes() == VALUES.tobytes()
        reader.close()
    assert decoded == {f"{NAME}/{row}.{column}": 1 for row in range(3) for column in range(3)}


def test_compressed_arrays_in_an_archive_are_those_of_a_disk(local, tmp_path):
    with tarfile.open(tmp_path / "m.tar", "w") as archive:
        archive.add(local, arcname=".")
    assert read(TarFolder(LocalFolder(tmp_path), "m.tar")).tobytes() == VALUES.tobytes()


def test_threads_that_need_the_same_chunk_decode_it_once(local, decoded):
    chunks = DecodedChunks(LocalFolder(local))
    compression = Compression(json.loads((local / NAME / ARRAY).read_text())["compressor"], "<f4", (30, 50))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda _: chunks.chunk(f"{NAME}/0.1", compression, 6000), range(32)))
    assert all(each is read[0] for each in read)
    assert read[0].tobytes() == VALUES[:30, 50:100].tobytes()
    assert decoded == {f"{NAME}/0.1": 1}


def test_chunks_are_kept_up_to_a_limit_and_decoded_again_beyond_it(local, decoded):
    chunks = DecodedChunks(LocalFolder(local), limit=13000)
    compression = Compression(json.loads((local / NAME / ARRAY).read_text())["compressor"], "<f4", (30, 50))
    for file in ("0.0", "0.1", "0.0", "0.2", "0.0", "0.1"):
        chunks.chunk(f"{NAME}/{file}", compression, 6000)
        assert 0 < chunks.held <= 13000
    assert decoded == {f"{NAME}/0.0": 1, f"{NAME}/0.1": 2, f"{NAME}/0.2": 1}


def described(folder: Path, **changes: object) -> None:
    file = folder / NAME / ARRAY
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("data", [b"", b"damaged", b"longer"])
def test_a_damaged_chunk_is_named(local, data):
    file = local / NAME / "0.2"
    file.write_bytes(file.read_bytes() + b"x" if data == b"longer" else data)
    with pytest.raises(UserError) as refused:
        read(LocalFolder(local))
    assert str(refused.value) == (
        f"chunk `{NAME}/0.2` cannot be decoded by `zlib` to [30, 50] of `<f4`\n\nhint: the checkpoint is damaged"
    )


@pytest.mark.parametrize(("compressor", "name"), [({"id": "lz4"}, "lz4"), ("zlib", "zlib"), ({}, "None"), (7, "7")])
def test_a_compressor_that_tensorstore_lacks_is_named(local, compressor, name):
    described(local, compressor=compressor)
    with pytest.raises(UserError) as refused:
        read(LocalFolder(local))
    assert str(refused.value) == (
        f"`{NAME}/0.0` is compressed by `{name}`, which `tensorstore` cannot open\n\n"
        "hint: read it with the program that wrote it, and save it without a compressor"
    )


def test_a_chunk_too_large_to_decode_is_refused_before_it_is_read(local, decoded):
    described(local, shape=[1 << 40, 120], chunks=[1 << 40, 120])
    reader = open_megatron(LocalFolder(local))
    with pytest.raises(UserError) as refused:
        reader.read(NAME, (slice(0, 5), slice(0, 120)), np.empty((5, 120), np.float32))
    assert str(refused.value) == (
        f"chunk `{NAME}/0.0` is compressed and would take {480 << 40} bytes; at most {4 << 30} are decoded at once\n\n"
        "hint: read it with the program that wrote it, and save it without a compressor or in smaller chunks"
    )
    assert not decoded


def test_the_package_to_install_is_named(local, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(UserError) as refused:
        read(LocalFolder(local))
    assert str(refused.value) == (
        f"`{NAME}/0.0` is compressed, and `tensorstore` is not installed\n\nhint: `pip install 'mbtools[zarr]'`"
    )
