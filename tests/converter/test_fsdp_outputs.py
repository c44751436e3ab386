"""What is written for Megatron-FSDP is what it wrote itself of the same weights, and what torch's own loader reads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from converter import hf_to_mcore, mcore_to_hf, verify_checkpoints
from formats.detect import Format, detect, open_megatron
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.rank_names import with_expert
from tests.converter import family_suite
from tests.converter.test_kinds import LLAMA
from tests.golden.kinds import unpacked
from tests.megatron_cpu import Shape
from tests.megatron_fsdp import loaded_without_a_gpu


def stored(root, *, tokens=None):
    """The weights of a checkpoint under their keys: shape, dtype, boxes and bytes; of the vocabulary those of `tokens` rows."""
    container, weights = open_megatron(LocalFolder(root)).container, {}
    for key in (key for key in container.tensor_names if key.startswith("model.")):
        tensor = container.tensor(key)
        value = np.empty(tensor.shape, tensor.dtype)
        container.read(tensor, tuple(slice(0, size) for size in tensor.shape), value)
        boxes = sorted([(part.start, part.stop) for part in chunk.region] for chunk in tensor.chunks)
        rows = tokens if key.endswith(("word_embeddings.weight", "output_layer.weight")) else None
        weights[key] = (tensor.shape, tensor.dtype.name, boxes, value[:rows].tobytes())
    return weights


@pytest.fixture
def golden_weights(tmp_path):
    """What Megatron-FSDP wrote, and the same weights in a Hugging Face directory."""
    root, config = unpacked("fsdp_dtensor", tmp_path), tmp_path / "config"
    config.mkdir()
    (config / "config.json").write_text(json.dumps(LLAMA))
    mcore_to_hf(root, tmp_path / "hf", hf_config=config)
    return root, tmp_path / "hf"


def test_keys_shapes_dtypes_boxes_and_bytes_are_those_that_megatron_fsdp_wrote(golden_weights, tmp_path):
    root, source = golden_weights
    options = {"ckpt_format": "fsdp_dtensor", "transformer_impl": "local", "make_vocab_size_divisible_by": 16}
    hf_to_mcore(source, tmp_path / "m", tp=2, verify=True, **options)
    assert stored(tmp_path / "m", tokens=89) == stored(root, tokens=89)  # rows that pad the vocabulary are random there
    assert detect(LocalFolder(tmp_path / "m")) is Format.FSDP_DTENSOR
    ours, theirs = (open_megatron(LocalFolder(folder)) for folder in (tmp_path / "m", root))
    names = ("num_layers", "hidden_size", "num_attention_heads", "add_position_embedding", "swiglu", "padded_vocab_size")
    assert [ours.args()[name] for name in names] == [theirs.args()[name] for name in names]


@pytest.mark.parametrize(("family", "options"), [
    ("mixtral", {}),
    ("qwen2_moe", {"tp": 2, "transformer_impl": "local"}),
    ("gpt2", {"tp": 2}),
])  # fmt: skip
def test_torch_loads_every_key_and_the_way_back_gives_the_same_bytes(tmp_path, family, options):
    source = family_suite.save_small(family, tmp_path / "hf")
    hf_to_mcore(source, tmp_path / "m", ckpt_format="fsdp_dtensor", verify=True, **options)
    held = stored(tmp_path / "m")
    state = {key: torch.empty(shape) for key, (shape, *_) in held.items()}
    state |= {"args": None, "iteration": None, "checkpoint_version": None}
    dcp.load(state, checkpoint_id=tmp_path / "m" / "iter_0000000")
    assert (state.pop("iteration"), state.pop("checkpoint_version"), state.pop("args").num_layers) == (0, 3.0, 4)
    assert {key: value.numpy().tobytes() for key, value in state.items()} == {key: data for key, (*_, data) in held.items()}
    mcore_to_hf(tmp_path / "m", tmp_path / "back", dtype="bf16")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert verify_checkpoints(tmp_path / "m", source, cast_to="fp32").same


REFUSED = {
    "stages": ("llama", {"pp": 2}, "Megatron-FSDP divides layers, and has no pipeline stages: `--pp` is 2"),
    "dtype": ("llama", {"dtype": "bf16"}, "`--dtype bf16`, but Megatron-FSDP holds weights in fp32"),
    "hybrid": ("nemotron_h", {}, "`--ckpt-format fsdp_dtensor` is written of GPT models without layout hybrid"),
    "format": ("llama", {"ckpt_format": "zarr"}, "ckpt_format `zarr` is not one of torch_dist, torch, fsdp_dtensor"),
    "layers": ("llama", {"transformer_impl": "apex"}, "transformer_impl `apex` is not one of transformer_engine, local"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_hold_is_refused_by_name_and_nothing_is_written(tmp_path, case):
    family, options, message = REFUSED[case]
    source = family_suite.save_small(family, tmp_path / "hf")
    with pytest.raises(UserError) as error:
        hf_to_mcore(source, tmp_path / "m", **{"ckpt_format": "fsdp_dtensor", **options})
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_megatron_fsdp_loads_it_strictly_and_holds_the_weights(ranks, tmp_path, family):
    """Divided over two ranks, whose shares end inside of weights."""
    source = family_suite.save_small(family, tmp_path / "hf")
    hf_to_mcore(source, tmp_path / "m", ckpt_format="fsdp_dtensor", transformer_impl="local")
    shape = Shape(json.loads((source / "config.json").read_text()))
    reader = open_megatron(LocalFolder(tmp_path / "m"))
    loaded = {name: np.full(spec.shape, np.nan, spec.dtype) for name, spec in reader.specs.items()}
    for held in ranks.run(loaded_without_a_gpu, 2, shape, str(tmp_path / "m")):
        assert {with_expert(name) for name in held} == loaded.keys()
        for name, (start, value) in held.items():
            box = tuple(slice(first, first + size) for first, size in zip(start, value.shape, strict=True))
            loaded[with_expert(name)][box] = value
    for name, spec in reader.specs.items():
        written = np.empty(spec.shape, spec.dtype)
        reader.read(name, spec.full_region, written)
        np.testing.assert_array_equal(loaded[name], written)
