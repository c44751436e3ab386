"""Readers of models in chunks and of tar archives, with files to damage.

Oracles: a damaged `.metadata` gives bytes that torch finds in the undamaged data files; slices are what the safetensors library
reads of each file, put where the header says, each element once; members of an archive are those that `tarfile` extracts."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np
import numpy.ma  # `np.unique` imports it, and no file that is read may import anything
import safetensors
import safetensors.numpy
import torch

from formats.detect import open_huggingface
from formats.disk import user_errors
from formats.folder import LocalFolder
from formats.spec import extent
from formats.tar import TarFolder
from tests.fuzz import bases
from tests.fuzz.bases import Files
from tests.fuzz.by_torch import bytes_by_torch
from tests.fuzz.target import Target
from tests.models import tree

_SHARD = "shard-0000{}-model-00001-of-00001.safetensors"
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64}


@cache
def sharded_models() -> tuple[Files, ...]:
    """A model that torch saved under the names of its modules, bare and as one state of several."""
    state = {name: torch.from_numpy(value) for name, value in bases.weights().items()}
    saved = state, {"model": state, "optimizer": {"step": torch.ones(()), "exp_avg": torch.ones(3)}, "step": 1}
    made: list[Files] = []
    for contents in saved:
        with TemporaryDirectory() as name:
            torch.distributed.checkpoint.save(contents, checkpoint_id=name, no_dist=True)
            made.append(tree(Path(name)))
    return tuple(made)


@cache
def slices() -> tuple[Files, ...]:
    """A model in slices of rows, and one in slices of columns and whole tensors."""
    made: list[Files] = []
    for axis in (0, 1):
        files: Files = {}
        for number in (0, 1):
            parts, corners = dict[str, np.ndarray](), dict[str, object]()
            for name, value in bases.weights().items():
                at = axis if value.ndim > axis else 0
                half = [slice(None)] * value.ndim
                half[at] = slice(number * 3, 3 + 100 * number)
                parts[name] = np.ascontiguousarray(value[tuple(half)])
                corners[name] = {"saved_offsets": [3 * number if dim == at else 0 for dim in range(value.ndim)]}
            parts = {name: part for name, part in parts.items() if part.size}
            info = {"format": "pt", "DCP_SHARDING_INFO": json.dumps(corners)}
            files[_SHARD.format(number + 1)] = safetensors.numpy.save(parts, info)
        made.append(files)
    return tuple(made)


@cache
def archives() -> tuple[Files, ...]:
    """Archives of the three formats that Python writes."""
    made: list[Files] = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form, bufsize=512) as archive:
            for name, size in {"./model_config.yaml": 5, "./model_weights/" + "k" * 120 + "/0": 700, "./a/b": 0}.items():
                member = tarfile.TarInfo(name)
                member.size = size
                archive.addfile(member, io.BytesIO(bytes(range(7)) * 100))
        made.append({"a.nemo": file.getvalue()})
    return tuple(made)


@user_errors()
def read_model(folder: Path) -> dict[str, list[tuple[tuple[slice, ...], np.ndarray]]]:
    """Every chunk of every tensor: its region and values, read as parts of the tensor."""
    reader = open_huggingface(LocalFolder(folder))
    tensors: dict[str, list[tuple[tuple[slice, ...], np.ndarray]]] = {}
    try:
        for name, spec in reader.specs.items():
            for chunk in reader.chunks(name):
                corner = tuple(slice(part.start, part.start + 1) for part in chunk.region)
                if all(extent(chunk.region)):
                    reader.read(name, corner, np.empty(extent(corner), spec.dtype))  # before memory is taken for all of it
                out = np.empty(extent(chunk.region), spec.dtype)
                reader.read(name, chunk.region, out)
                tensors.setdefault(name, []).append((chunk.region, out))
    finally:
        reader.close()
    return tensors


def check_index(tensors: dict[str, list], _folder: Path, before: Files) -> None:
    files = tuple(sorted((name, data) for name, data in before.items() if name.endswith(".distcp")))
    known = bytes_by_torch(before[".metadata"], files)
    assert tensors
    assert all(out.tobytes() in known for chunks in tensors.values() for _, out in chunks if out.size)


def check_slices(tensors: dict[str, list], folder: Path, _before: Files) -> None:
    expected: dict[str, list[tuple[tuple[slice, ...], bytes]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
        corners = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        for name, entry in safetensors.deserialize(raw):
            at = corners[name]["saved_offsets"]
            region = tuple(slice(start, start + size) for start, size in zip(at, entry["shape"], strict=True))
            expected.setdefault(name, []).append((region, bytes(entry["data"])))
    assert tensors.keys() == expected.keys()
    for name, chunks in tensors.items():
        assert sorted((str(region), out.tobytes()) for region, out in chunks) == sorted((str(r), d) for r, d in expected[name])
        covered = np.zeros([max(region[dim].stop for region, _ in chunks) for dim in range(chunks[0][1].ndim)], np.int8)
        for region, _ in chunks:
            covered[region] += 1
        assert (covered == 1).all()


@user_errors()
def read_archive(folder: Path) -> dict[str, bytes]:
    opened = TarFolder(LocalFolder(folder), "a.nemo")
    return {name: opened.get(name) for name in opened.files()}


def check_archive(contents: dict[str, bytes], folder: Path, _before: Files) -> None:
    with tarfile.open(folder / "a.nemo", "r:") as archive:
        files = {member.name.removeprefix("./").rstrip("/"): member for member in archive if member.isreg()}
        assert contents.keys() == files.keys()
        for name, member in files.items():
            opened = archive.extractfile(member)
            assert opened
            assert opened.read() == contents[name]


CHUNKED = (
    Target("dcp_index", "pickle", ".metadata", sharded_models, read_model, check_index),
    Target("slices", "header", _SHARD.format(2), slices, read_model, check_slices, share=2),
    Target("tar", "bytes", "a.nemo", archives, read_archive, check_archive, share=3),
)
