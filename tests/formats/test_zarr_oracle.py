"""zarr-python reads what we read: the arrays of megatron-core 0.8.0, and those of which chunks reach past the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr

from formats.detect import open_megatron
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.zarr import ARRAY, ZarrContainer
from tests.formats import zarr_arrays
from tests.golden.kinds import unpacked

BF16 = np.dtype(ml_dtypes.bfloat16)


def by_zarr_python(array: Path, copy: Path) -> np.ndarray:
    """Read an array with zarr-python. It refuses `bfloat16`, so a copy of the array says `<u2`."""
    shutil.copytree(array, copy)
    described = json.loads((copy / ARRAY).read_text())
    is_bf16 = described["dtype"] == "bfloat16"
    (copy / ARRAY).write_text(json.dumps({**described, "dtype": "<u2"} if is_bf16 else described))
    value = np.asarray(zarr.open_array(copy, mode="r", zarr_format=2)[...])
    return value.view(BF16) if is_bf16 else value


def by_us(container: ZarrContainer, name: str) -> np.ndarray:
    tensor = container.tensor(name)
    out = np.empty(tensor.shape, tensor.dtype)
    container.read(tensor, tuple(slice(0, size) for size in tensor.shape), out)
    return out


def compare(folder: Path, copies: Path) -> dict[str, np.dtype]:
    """Compare all arrays of a checkpoint bit for bit; return their dtypes."""
    container = ZarrContainer(LocalFolder(folder))
    for name in container.tensor_names:
        ours, theirs = by_us(container, name), by_zarr_python(folder / name, copies / name)
        assert (name, ours.shape, ours.dtype) == (name, theirs.shape, theirs.dtype)
        assert ours.tobytes() == theirs.tobytes(), name
    return {name: container.dtype(name) for name in container.tensor_names}


@pytest.mark.parametrize("name", ["zarr", "zarr_distributed_optimizer"])
def test_zarr_python_reads_the_same_of_what_megatron_core_wrote(tmp_path, name):
    iteration = next(unpacked(name, tmp_path).glob("iter_*"))
    dtypes = compare(iteration, tmp_path / "copies")
    weights = [key for key in dtypes if not key.startswith("optimizer.")]
    assert {dtypes[key] for key in weights} == {BF16}
    assert {dtypes[key] for key in dtypes.keys() - weights} == {np.dtype(np.float32)}
    assert len(dtypes) == 4 * len(weights)


@pytest.mark.parametrize("compressor", [None, "zlib", "bz2"])
def test_zarr_python_reads_the_same_of_chunks_that_reach_past_the_end(tmp_path, compressor):
    values = np.random.default_rng(0).integers(0, 256, (7, 12, 4), np.uint8)
    for name, dtype in (("a", BF16), ("b", np.float32)):
        zarr_arrays.write(tmp_path / name, values.view(dtype), chunks=(3, 5, 1), compressor=compressor)
    assert set(compare(tmp_path, tmp_path / "copies").values()) == {BF16, np.dtype(np.float32)}


def test_zarr_python_takes_a_missing_chunk_for_zeros_where_we_refuse(tmp_path):
    zarr_arrays.write(tmp_path / "a", np.ones((6, 10), np.float32), chunks=(3, 5))
    zarr_arrays.mark(tmp_path)
    (tmp_path / "a" / "1.0").unlink()
    assert not by_zarr_python(tmp_path / "a", tmp_path / "copy")[3:, :5].any()
    with pytest.raises(UserError, match=r"chunk `a/1.0` is missing"):
        by_us(open_megatron(LocalFolder(tmp_path)).container, "a")
