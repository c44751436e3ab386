"""torch is the oracle for archives, in both directions."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch

from formats.errors import UserError
from formats.pickles import Global, Record
from formats.spec import DTYPES
from formats.torch_zip import OpenArchive, object_archive, tensor_frame

TORCH = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64, "int8": torch.int8,
    "int16": torch.int16, "int32": torch.int32, "int64": torch.int64, "uint8": torch.uint8, "bool": torch.bool,
    "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip


def opened(data):
    return OpenArchive(lambda at, size: data[at : at + size], len(data), source="x.distcp")


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(3, 4), (1,), (5,), (2, 3, 4), (0,), ()], ids=str)
@pytest.mark.parametrize("dtype", TORCH)
def test_torch_loads_a_framed_tensor_safely(dtype, shape):
    frame = tensor_frame(dtype, shape)
    data = np.random.default_rng(1).bytes(frame.size)
    if dtype == "bool":
        data = bytes(byte & 1 for byte in data)
    loaded = torch.load(io.BytesIO(frame.before + data + frame.after), weights_only=True)
    assert loaded.dtype == TORCH[dtype]
    assert tuple(loaded.shape) == shape
    assert loaded.reshape(-1).view(torch.uint8).numpy().tobytes() == data
    assert frame.length == len(frame.before) + len(data) + len(frame.after)
    assert len(frame.before) == 4096


@pytest.mark.parametrize("dtype", TORCH)
def test_a_tensor_that_torch_saved_is_found(dtype):
    tensor = torch.randint(0, 2, (5, 6)).to(TORCH[dtype])
    data = saved(tensor)
    archive = opened(data)
    stored, start = archive.tensor(archive.pickle())
    assert (stored.dtype, stored.shape, stored.strides) == (DTYPES[dtype], (5, 6), (6, 1))
    assert data[start : start + tensor.nbytes] == tensor.view(torch.uint8).numpy().tobytes()


def test_views_parameters_and_lists_are_found():
    whole = torch.arange(20.0)
    data = saved([whole[5:9], torch.nn.Parameter(torch.ones(2))])
    archive = opened(data)
    view, parameter = archive.pickle()
    assert archive.array(view).tolist() == [5.0, 6.0, 7.0, 8.0]
    assert archive.array(parameter).tolist() == [1.0, 1.0]


def test_torch_loads_our_objects_safely():
    value = [{"a": 1, "b": [2.5, None, True, "text", -(1 << 40)], "t": np.arange(3, dtype=np.int64), "d": {"x": (1, 2)}}]
    loaded = torch.load(io.BytesIO(object_archive(value)), weights_only=True)
    assert loaded[0]["t"].tolist() == [0, 1, 2]
    assert {**loaded[0], "t": 0} == {**value[0], "t": 0}


def test_an_archive_with_records_in_another_order_is_read():
    tensor = torch.arange(6.0)
    source = zipfile.ZipFile(io.BytesIO(saved(tensor)))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for info in reversed(source.infolist()):
            target.writestr(info.filename, source.read(info))
    archive = opened(file.getvalue())
    assert archive.array(archive.pickle()).tolist() == tensor.tolist()


def test_a_record_of_more_than_4_gib_is_framed_with_zip64(tmp_path):
    """Sparse: the file holds frames and a hole. Python's zipfile and our reader agree on where things are."""
    frame = tensor_frame("bf16", (1 << 17, 20_000))
    assert frame.size > 1 << 32
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.write(frame.before)
        file.seek(frame.size, 1)
        file.write(frame.after)
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == frame.size
        assert archive.read("archive/version") == b"3\n"
    with path.open("rb") as file:
        reader = OpenArchive(lambda at, size: (file.seek(at), file.read(size))[1], frame.length, source="big")
        assert reader.locate("data/0") == (len(frame.before), frame.size)
        stored, start = reader.tensor(reader.pickle())
    assert (stored.shape, start) == ((1 << 17, 20_000), len(frame.before))
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded.shape == (1 << 17, 20_000)
    assert loaded[-1, -1] == 0


@pytest.mark.parametrize("damage", [
    lambda d: d[:100], lambda d: d[:-5], lambda d: b"", lambda d: d[:-22] + b"\0" * 22, lambda d: b"\xff" * len(d),
    lambda d: d.replace(b"archive/data/0", b"archive/data/9"),
])  # fmt: skip
def test_damaged_archives_are_named(damage):
    def read(data):
        archive = opened(data)
        return archive.tensor(archive.pickle())

    with pytest.raises(UserError, match=r"`x.distcp`"):
        read(damage(saved(torch.arange(6.0))))


def test_a_compressed_record_is_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("archive/data.pkl", b"\x80\x02N.")
    with pytest.raises(UserError, match="is compressed"):
        opened(file.getvalue())


def test_a_tensor_larger_than_its_record_is_refused():
    data = saved(torch.arange(6.0))
    archive = opened(data)
    record = archive.pickle()
    forged = Record(record.kind, (record.args[0], 0, (1000,), (1,), False, {}))
    with pytest.raises(UserError, match="needs more than"):
        archive.tensor(forged)


@pytest.mark.parametrize("shape", [(1 << 31, 1 << 32), (1 << 61, 8), (1,) * 65, (0, 1 << 61, 1 << 61), [1 << 62], {}], ids=str)
def test_sizes_whose_product_overflows_are_refused(shape):
    archive = opened(saved(torch.arange(6.0)))
    record = archive.pickle()
    strides = (1,) * len(shape)
    with pytest.raises(UserError):
        archive.tensor(Record(record.kind, (record.args[0], 0, shape, strides, False, {})))


def test_a_parameter_in_thousands_of_parameters_is_refused():
    archive = opened(saved(torch.arange(6.0)))
    record = archive.pickle()
    for _ in range(5000):
        record = Record(Global("torch._utils", "_rebuild_parameter"), (record, False, {}))
    with pytest.raises(UserError, match="does not describe a tensor"):
        archive.tensor(record)
