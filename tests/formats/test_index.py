"""An index is written from templates as pickling its records writes it, and read by patterns as opcode by opcode."""

from __future__ import annotations

import pickle
from array import array
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.chunks import ChunkedTensor
from formats.dcp_index import _index, read_index
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.index_pickle import IndexUnpickler, load_index
from formats.index_writer import index_document
from formats.pickle_writer import dumps
from formats.pickles import Global, Record
from formats.spec import DTYPES, extent

FILES = ["__0_0.distcp", "__1_0.distcp", "offset"]


def record(name, state, module="torch.distributed.checkpoint.metadata"):
    return Record(Global(module, name), state=state, made_by_call=False)


def size(numbers):
    return Global("torch", "Size")(tuple(numbers))


def starts(region):
    return size(part.start for part in region)


def records(tensors, objects):
    """The records of an index, one by one: what the templates stand for."""
    described, stored = {}, {}

    def add_location(key, offset, file, start, length):
        info = {"relative_path": file, "offset": start, "length": length}
        index = record("MetadataIndex", {"fqn": key, "offset": offset, "index": None})
        stored[index] = record("_StorageInfo", info, "torch.distributed.checkpoint.filesystem")

    for key, tensor in tensors.items():
        layout = Global("torch.serialization", "_get_layout")("torch.strided")
        memory = Global("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")(0)
        properties = record("TensorProperties", (Global("torch", "bfloat16"), layout, False, memory, False))
        boxes = [
            record("ChunkStorageMetadata", {"offsets": starts(c.region), "sizes": size(extent(c.region))}) for c in tensor.chunks
        ]
        described[key] = record("TensorStorageMetadata", {"properties": properties, "size": size(tensor.shape), "chunks": boxes})
        for c in tensor.chunks:
            add_location(key, starts(c.region), c.location.file, c.location.offset, c.location.length)
    for key, (file, start, length) in objects.items():
        described[key] = record("BytesStorageMetadata", {})
        add_location(key, None, FILES[file], start, length)
    fields = {"state_dict_metadata": described, "planner_data": None, "storage_data": stored}
    return record("Metadata", {**fields, "storage_meta": None, "version": "1.0.0"})


@st.composite
def indices(draw):
    """Tensors of bands of rows, each band's archive where no other is; and objects."""
    at, tensors = Counter(), {}
    far = draw(st.sampled_from([1, 300, 1 << 31, 1 << 40]))

    def take(file):
        at[file] += far
        return file, at[file] - far, far

    for number in range(draw(st.integers(0, 4))):
        rest = tuple(draw(st.lists(st.sampled_from([1, 255, 256, 70_000]), max_size=2)))
        step, numbers, row = draw(st.sampled_from([1, 300])), array("q"), 0
        for _ in range(draw(st.integers(1, 40))):
            box = (row, *[0] * len(rest), step, *rest)
            numbers.extend((*box, *take(draw(st.integers(0, 2))), -1))
            row += step
        tensors[f"layers.{number}"] = ChunkedTensor((row, *rest), DTYPES["bf16"], numbers, FILES)
    objects = {f"state/{number}": take(draw(st.integers(0, 2))) for number in range(draw(st.integers(0, 5)))}
    return tensors, objects


def contents_of(index):
    tensors = {name: (index.shape(name), index.dtype(name), index.tensor(name).chunks) for name in index.tensors}
    return tensors, {name: index.object(name) for name in index.objects}


@settings(deadline=None, max_examples=60)
@given(indices())
def test_an_index_is_written_as_its_records_are_and_read_back(made):
    tensors, objects = made
    locations = np.array(list(objects.values()), np.int64).reshape(-1, 3)
    document = index_document(tensors, (list(objects), locations, FILES))
    data = b"".join(document.blocks())
    assert data == dumps(records(tensors, objects))
    assert document.size == len(data)
    contents = contents_of(load_index(data, _index, source="x"))
    assert contents == contents_of(_index(IndexUnpickler(data, patterns=False).load()))
    assert contents[0] == {name: (tensor.shape, tensor.dtype, tensor.chunks) for name, tensor in tensors.items()}


def test_what_torch_pickles_is_read_by_patterns_as_without_them(tmp_path):
    torch = pytest.importorskip("torch")
    from torch.distributed.checkpoint import metadata as md
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    chunks = [md.ChunkStorageMetadata(torch.Size([row, 0]), torch.Size([1, 300])) for row in range(700)]
    whole = md.TensorStorageMetadata(md.TensorProperties(torch.bfloat16), torch.Size([700, 300]), chunks)
    stored = {
        md.MetadataIndex("w", chunk.offsets, n): _StorageInfo(f"__{n % 3}_0.distcp", n * 5000, 4000)
        for n, chunk in enumerate(chunks)
    }
    again = {md.MetadataIndex("v", torch.Size([row, 0])): _StorageInfo("__9_0.distcp", row * 10, 10) for row in range(700)}
    anew = [md.ChunkStorageMetadata(torch.Size([row, 0]), torch.Size([1, 300])) for row in range(700)]
    other = md.TensorStorageMetadata(md.TensorProperties(torch.float32), torch.Size([700, 300]), anew)
    objects = {f"state/{number}": md.BytesStorageMetadata() for number in range(700)}
    again |= {md.MetadataIndex(name): _StorageInfo("__8_0.distcp", n * 10, 10) for n, name in enumerate(objects)}
    for shared in (True, False):
        kept = {**objects, "w": whole, "v": other} if shared else {"v": other, **objects}
        data = pickle.dumps(md.Metadata(kept, None, {**(stored if shared else {}), **again}))
        (tmp_path / ".metadata").write_bytes(data)
        assert contents_of(read_index(LocalFolder(tmp_path))) == contents_of(_index(IndexUnpickler(data, patterns=False).load()))


def test_a_record_that_is_changed_after_it_was_built_is_read_as_it_became():
    """Numbers cannot be changed later: such a pickle is read opcode by opcode."""
    tensors = {
        "w": ChunkedTensor(
            (3,), DTYPES["bf16"], array("q", [n for row in range(3) for n in (row, 1, 0, 10 * row, 10, -1)]), FILES
        )
    }
    data = dumps(records(tensors, {}))
    with pytest.raises(UserError):
        load_index(data.replace(b"ube", b"ubNbe", 1), _index, source="x").tensor("w")
