"""Other kinds of checkpoints, as megatron-core and Megatron-LM wrote them, hold what a `torch_dist` of the same state does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from formats.detect import Format, detect, open_megatron
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.optimizer.open import open_optimizer
from formats.optimizer.state import MASTER, STATES
from tests.formats import zarr_arrays
from tests.golden.kinds import unpacked

FUSED = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
"""Names of norms in layers without Transformer Engine: `torch_dist` alone stores them under that library's."""


def values(reader) -> dict[str, bytes]:
    contents = {}
    for name, spec in reader.specs.items():
        out = np.empty(spec.shape, spec.dtype)
        reader.read(name, spec.full_region, out)
        fused = next((name.replace(norm, other) for norm, other in FUSED.items() if norm in name), name)
        contents[fused] = (spec.shape, spec.dtype, out.tobytes())
    return contents


@pytest.fixture
def opened(tmp_path) -> Callable[[str], tuple[Path, object]]:
    def open_kind(name: str):
        folder = unpacked(name, tmp_path)
        return folder, open_megatron(LocalFolder(folder))

    return open_kind


@pytest.mark.parametrize(("name", "twin", "kind"), [
    ("zarr", "zarr_as_torch_dist", Format.ZARR),
    ("torch_dcp", "torch_dcp_as_torch_dist", Format.TORCH_DCP),
])  # fmt: skip
def test_weights_are_those_of_the_twin(opened, name, twin, kind):
    folder, reader = opened(name)
    assert detect(LocalFolder(folder)) is kind
    assert values(reader) == values(opened(twin)[1])
    assert reader.args()["num_layers"] == 2


@pytest.mark.parametrize("state", STATES)
def test_optimizer_state_of_zarr_is_that_of_the_twin(opened, state):
    reader, twin = (open_optimizer(opened(name)[1]).states[state] for name in ("zarr", "zarr_as_torch_dist"))
    assert len(reader.specs) == 15
    assert values(reader) == values(twin)


def test_masters_of_zarr_with_a_distributed_optimizer_round_to_its_weights(opened):
    _, reader = opened("zarr_distributed_optimizer")
    masters, weights = values(open_optimizer(reader).states[MASTER]), values(reader)
    for name, (shape, dtype, data) in weights.items():
        assert np.frombuffer(masters[name][2], np.float32).astype(dtype).tobytes() == data
        assert masters[name][0] == shape
    assert len(masters) == 15


def test_weights_of_megatron_fsdp_are_named_as_those_of_torch_dist(opened):
    folder, reader = opened("fsdp_dtensor")
    assert detect(LocalFolder(folder)) is Format.FSDP_DTENSOR
    assert values(reader).keys() == opened("torch_dcp_as_torch_dist")[1].specs.keys()
    assert {spec.dtype.name for spec in reader.specs.values()} == {"float32"}
    assert reader.args()["num_layers"] == 2


def made(folder: Path, **changes: object) -> Path:
    """A checkpoint of one weight, [7, 12] in 3 × 3 chunks, with changes to what its `.zarray` says."""
    zarr_arrays.write(folder / "output_layer.weight", np.arange(84, dtype=np.float32).reshape(7, 12), chunks=(3, 5))
    zarr_arrays.mark(folder)
    described = folder / "output_layer.weight" / ".zarray"
    described.write_text(json.dumps({**json.loads(described.read_text()), **changes}))
    return folder


DAMAGE = {
    "compressed_v3": ({"zarr_format": 3}, "`zarr_format`"),
    "order": ({"order": "F"}, "`order` in `output_layer.weight/.zarray` is `F`; Megatron writes `\"C\"`"),
    "filters": ({"filters": [{"id": "delta"}]}, "`filters`"),
    "fill": ({"fill_value": 1.0}, "`fill_value` in `output_layer.weight/.zarray` is `1.0`; Megatron writes `null`"),
    "dtype": ({"dtype": ">f4"}, "`dtype` in `output_layer.weight/.zarray` is `>f4`"),
    "fields": ({"dtype": [["a", "<f4"]]}, "`dtype` in `output_layer.weight/.zarray`"),
    "wide": ({"dtype": "<f8"}, "has 60 bytes; [3, 5] of `float64` are 120"),
    "shape": ({"shape": [7, -1]}, "`shape` in `output_layer.weight/.zarray` is `[7, -1]`, not a list of sizes"),
    "taller": ({"shape": [10, 12]}, "chunk `output_layer.weight/3.0` is missing"),
    "axes": ({"shape": [84]}, "has shape [84] in chunks of [3, 5]"),
    "zero": ({"chunks": [0, 5]}, "has shape [7, 12] in chunks of [0, 5]"),
    "many": ({"shape": [3 << 30, 5 << 20]}, "of shape [3221225472, 5242880] has 1125899906842624 chunks"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_zarray_of_another_kind_is_named(tmp_path, name):
    changes, message = DAMAGE[name]
    with pytest.raises(UserError) as error:
        open_megatron(LocalFolder(made(tmp_path, **changes))).check()
    assert message in str(error.value)


def test_a_missing_chunk_is_named_and_not_taken_for_zeros(tmp_path):
    made(tmp_path)
    (tmp_path / "output_layer.weight" / "1.2").unlink()
    with pytest.raises(UserError, match=r"chunk `output_layer.weight/1.2` is missing: .* has 9 chunks"):
        open_megatron(LocalFolder(tmp_path)).check()


@pytest.mark.parametrize("size", [59, 61, 0])
def test_a_chunk_of_another_size_is_named_with_both(tmp_path, size):
    made(tmp_path)
    (tmp_path / "output_layer.weight" / "0.2").write_bytes(bytes(size))
    with pytest.raises(UserError, match=rf"chunk `output_layer.weight/0.2` has {size} bytes; \[3, 5\] of `float32` are 60"):
        open_megatron(LocalFolder(tmp_path)).check()


def test_a_checkpoint_of_which_the_last_file_is_missing_is_incomplete(tmp_path):
    made(tmp_path)
    (tmp_path / "metadata.json").unlink()
    with pytest.raises(UserError, match=r"is an incomplete checkpoint: `metadata.json` is missing"):
        detect(LocalFolder(tmp_path))
