"""torch's own distributed checkpoints are read; an index that would take memory or time without end is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint.metadata import MetadataIndex

from formats.archive_files import NewPart, Shard
from formats.dcp import ContainerWriter, DcpContainer
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.outputs import LocalOutputs
from formats.spec import TensorSpec
from formats.torch_dist import TorchDistReader
from formats.torch_dist_writer import ShardedTensor, TorchDistWriter

STACK = "decoder.layers.mlp.linear_fc2.weight"


@pytest.fixture
def saved(tmp_path):
    state = {"number": torch.tensor(3), "empty": torch.ones(0, 2), STACK: torch.arange(6.0).reshape(2, 3)}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


def edit(folder, change):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(("name", "expected"), [("number", 3), ("empty", []), (STACK, [[0, 1, 2], [3, 4, 5]])])
def test_a_tensor_of_any_number_of_dimensions_reads_back(saved, name, expected):
    container = DcpContainer(LocalFolder(saved))
    tensor = container.tensor(name)
    out = np.full(tensor.shape, 9, tensor.dtype)
    container.read(tensor, tuple(slice(0, size) for size in tensor.shape), out)
    assert out.tolist() == expected


def nested(metadata):
    name = ()
    for _ in range(40):
        name = name, name
    metadata.storage_data[MetadataIndex("x")] = metadata.storage_data[MetadataIndex("number", torch.Size([]))]
    next(index for index in metadata.storage_data if index.fqn == "x").__dict__["fqn"] = name


def named(name):
    def change(metadata):
        metadata.state_dict_metadata[name] = metadata.state_dict_metadata.pop("number")

    return change


@pytest.mark.parametrize("change", [nested, named("layers." * 100_000 + "\n"), named("a" * 1025)])
def test_names_that_take_forever_to_look_at_are_refused(saved, change):
    edit(saved, change)
    with pytest.raises(UserError, match="name is not text"):
        TorchDistReader(LocalFolder(saved))


def test_layers_that_no_model_has_are_not_counted_through(saved):
    def stack(metadata):
        metadata.state_dict_metadata[STACK].size = torch.Size([100_000, 3])

    edit(saved, stack)
    with pytest.raises(UserError, match="should be the number of layers"):
        TorchDistReader(LocalFolder(saved))


def test_many_stacks_of_many_layers_are_refused(saved):
    def stacks(metadata):
        metadata.state_dict_metadata[STACK].size = torch.Size([10_000, 3])
        for number in range(30):
            metadata.state_dict_metadata[f"decoder.layers.x{number}"] = metadata.state_dict_metadata[STACK]

    edit(saved, stacks)
    with pytest.raises(UserError, match="more than 262144 weights"):
        TorchDistReader(LocalFolder(saved))


def test_a_shape_of_more_dimensions_than_numpy_has_is_refused(saved):
    def flat(metadata):
        metadata.state_dict_metadata["number"].size = torch.Size([1] * 3000)

    edit(saved, flat)
    with pytest.raises(UserError, match="a shape"):
        TorchDistReader(LocalFolder(saved))


class Counted(LocalFolder):
    """A folder that counts what is read of data files."""

    reads = 0

    def read_into(self, name, offset, out):
        self.reads += name.endswith(".distcp")
        super().read_into(name, offset, out)


@pytest.fixture
def written(tmp_path):
    """A chunk as this tool writes it."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    outputs = LocalOutputs(tmp_path)
    region = (slice(0, 2), slice(0, 3))
    part = NewPart("a", (), [Shard((0, 0), (2, 3), "__0_0.distcp")])
    writer = ContainerWriter("it", {"a": ((2, 3), values.dtype)}, [part], [])
    writer.write(outputs, "a", region, values)
    for span in writer.spans("it/__0_0.distcp"):
        if span.known:
            outputs.put("it/__0_0.distcp", span.start, span.known)
    outputs.close()
    (tmp_path / "it" / ".metadata").write_bytes(b"".join(writer.metadata.blocks()))
    return tmp_path / "it"


def read_all(folder):
    container = DcpContainer(folder)
    tensor = container.tensor("a")
    out = np.zeros(tensor.shape, tensor.dtype)
    container.read(tensor, tuple(slice(0, size) for size in tensor.shape), out)
    return out.tolist()


def test_an_archive_that_is_known_byte_by_byte_is_compared_and_not_parsed(written):
    folder = Counted(written)
    assert read_all(folder) == [[0, 1, 2], [3, 4, 5]]
    assert folder.reads == 3  # what is before the data, what is after it, the data


def test_an_archive_that_differs_is_parsed(written):
    path = written / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    at = data.index(b"Z" * 64)
    data[at] = ord("Y")  # padding, which means nothing
    path.write_bytes(data)
    folder = Counted(written)
    assert read_all(folder) == [[0, 1, 2], [3, 4, 5]]
    assert folder.reads > 3
    data[data.index(b"FloatStorage")] = ord("f")
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"`__0_0\.distcp` is not a valid torch archive"):
        read_all(LocalFolder(written))


def test_objects_are_found_after_the_chunks_of_all_tensors_were_let_go_of(tmp_path):
    outputs = LocalOutputs(tmp_path)
    weights = [TensorSpec(f"decoder.layers.{row}.mlp.linear_fc2.weight", (4, 2), np.dtype(np.float32)) for row in range(2)]
    writer = TorchDistWriter([ShardedTensor(spec, ((spec.full_region, 0),)) for spec in weights])
    for file in writer.files:
        for span in writer.spans(file):
            outputs.put(file, span.start, span.known or bytes(span.size))
    outputs.close()
    for name, document in writer.documents.items():
        (tmp_path / name).write_bytes(b"".join(document.blocks()))
    reader = TorchDistReader(LocalFolder(tmp_path / "iter_0000000"))
    reader.check()
    reader.check()
    assert len(reader.container.tensor("decoder.layers.mlp.linear_fc2.weight")) == 2
    assert [chunk.region[0] for chunk in reader.chunks(weights[1].name)] == [slice(1, 2)]
    assert reader.common_state()["iteration"] == 0
    states = [name for name in reader.container.object_names if "_extra_state" in name]
    assert [len(reader.container.archive(name).pickle()) for name in states] == [1, 1]


def test_layers_that_are_stacked_inside_a_numbered_layer_are_read_from_their_rows(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    key = "decoder.layers.5.inner.layers.weight"
    state = {key: torch.from_numpy(values), "decoder.layers.1.weight": torch.ones(2)}
    torch.distributed.checkpoint.save(state, checkpoint_id=tmp_path, no_dist=True)
    reader = TorchDistReader(LocalFolder(tmp_path))
    names = [f"decoder.layers.5.inner.layers.{row}.weight" for row in range(3)]
    assert reader.specs.keys() == {*names, "decoder.layers.1.weight"}
    for name, expected in zip([*names, "decoder.layers.1.weight"], [*values, [1, 1]], strict=True):
        out = np.zeros(2, np.float32)
        reader.read(name, (slice(0, 2),), out)
        assert out.tolist() == list(expected)


def test_layers_that_differ_cannot_be_stacked(tmp_path):
    """Layers 0 to 2 are dense, 3 to 5 have experts: of a key with 3 rows there is no row 3."""
    specs = [TensorSpec(f"decoder.layers.{n}.mlp.linear_fc2.weight", (4, 2), np.dtype(np.float32)) for n in range(3)]
    specs += [TensorSpec(f"decoder.layers.{n}.mlp.experts.{e}.linear_fc2.weight", (4, 2), np.dtype(np.float32))
              for n in range(3, 6) for e in range(2)]  # fmt: skip
    placed = [ShardedTensor(spec, ((spec.full_region, 0),)) for spec in specs]
    key = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    with pytest.raises(UserError, match=f"`{key}` would stack 6 tensors as 6 × 2: not every layer has one"):
        TorchDistWriter(placed)
    writer = TorchDistWriter(placed, stacked=False)
    assert writer.touched(specs[-1].name) == {"iter_0000000/__0_0.distcp"}


def test_chunks_that_do_not_tile_are_not_written(tmp_path):
    spec = TensorSpec("a.weight", (4, 2), np.dtype(np.float32))
    half = ShardedTensor(spec, (((slice(0, 2), slice(0, 2)), 0),))
    with pytest.raises(ValueError, match=r"chunks to be written of `a.weight` do not tile its shape \[4, 2\]"):
        TorchDistWriter([half])
