"""Every verb of the vocabulary, by families of transformers: what is written is what the published layouts say, worked out in
`published_layouts`, and the way back gives the same bytes, at several layouts."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from converter import UserError, hf_to_mcore, mcore_to_hf, verify
from formats.folder import LocalFolder
from formats.torch_dist import TorchDistReader
from tests.converter.published_layouts import MODELS, ORACLES
from tests.converter.weights import as_torch, source, stored
from tests.models import model_tree

pytestmark = pytest.mark.usefixtures("families_of_tests")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A model directory of a family, as transformers saves it, with random weights that bf16 holds."""
    known = {}

    def make(family, dtype="bfloat16"):
        if (family, dtype) not in known:
            known[family, dtype] = _save(family, getattr(torch, dtype), tmp_path_factory.mktemp(family) / "hf")
        return known[family, dtype]

    return make


def _save(family, dtype, folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **MODELS[family]), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-127, 128, parameter.shape) / 64)  # exact in bf16, also with 1 taken off
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


LAYOUTS = {"tp 1": {}, "tp 2": {"tp": 2}, "pp 3": {"pp": 3}}
WITH_EXPERTS = {"ep 2": {"tp": 2, "ep": 2, "etp": 1}, "ep 4, etp 2": {"tp": 1, "ep": 4, "etp": 2}}
CASES = [
    (family, name, layout) for family in ORACLES for name, layout in LAYOUTS.items() if family != "qwen3_next" or name != "pp 3"
]
CASES += [
    (family, name, layout) for family in ("mixtral", "gpt_oss", "dbrx", "qwen3_next") for name, layout in WITH_EXPERTS.items()
]


@pytest.mark.parametrize(("family", "layout"), [pytest.param(f, layout, id=f"{f}, {name}") for f, name, layout in CASES])
def test_weights_are_where_the_published_layout_has_them_and_come_back_to_the_bit(made, tmp_path, family, layout):
    folder = made(family)
    hf_to_mcore(folder, tmp_path / "m", verify=True, make_vocab_size_divisible_by=128 // layout.get("tp", 1), **layout)
    expected = ORACLES[family](source(folder))
    actual = stored(tmp_path / "m")
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        tensor = as_torch(array)
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(folder)
    assert verify(folder, tmp_path / "m").same


@pytest.mark.parametrize("family", ["gpt_oss", "mamba2", "phi3", "qwen3_next"])
def test_hashes_of_tensors_that_do_not_pass_in_order_are_those_of_their_bytes(made, tmp_path, family):
    from blake3 import blake3

    hf_to_mcore(made(family), tmp_path / "m", workers=3)
    listed = json.loads((tmp_path / "m" / "iter_0000000" / "conversion.json").read_text())["blake3"]
    tensors = source(made(family))
    tensors |= {name: tensors[name.removesuffix(".as_stored")] for name in listed.keys() - tensors.keys()}
    assert listed == {name: blake3(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for name, t in tensors.items()}


@pytest.mark.parametrize("family", ["gpt_oss", "dbrx", "qwen3_next"])
def test_the_size_of_pieces_and_the_number_of_threads_do_not_change_a_byte(made, tmp_path, monkeypatch, family):
    import converter.run
    import converter.worker

    hf_to_mcore(made(family), tmp_path / "one", workers=1)
    for module in (converter.run, converter.worker):
        monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    hf_to_mcore(made(family), tmp_path / "two", workers=4)
    data = [{p.name: p.read_bytes() for p in sorted((tmp_path / folder).rglob("*.distcp"))} for folder in ("one", "two")]
    assert data[0] == data[1]
    mcore_to_hf(tmp_path / "two", tmp_path / "back", workers=4)
    assert model_tree(tmp_path / "back") == model_tree(made(family))


def test_a_dtype_that_a_family_keeps_wins_over_the_one_asked_for_and_the_source_s_comes_back(made, tmp_path):
    folder = made("mamba2")
    hf_to_mcore(folder, tmp_path / "m", dtype="fp16")
    dtypes = {name: array.dtype.name for name, array in stored(tmp_path / "m").items()}
    assert {dtypes[f"decoder.layers.{n}.mixer.{parameter}"] for n in range(3) for parameter in ("A_log", "D")} == {"float32"}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith(("A_log", "D"))} == {"float16"}
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    back = source(tmp_path / "back")
    assert {str(t.dtype) for name, t in back.items() if not name.endswith(("A_log", "D"))} == {"torch.float16"}
    assert {str(t.dtype) for name, t in back.items() if name.endswith(("A_log", "D"))} == {"torch.bfloat16"}


@pytest.mark.parametrize(("family", "name"), [("olmo", "decoder.layers.1.mlp.linear_fc1.layer_norm_weight")])
def test_a_weight_that_hugging_face_has_not_must_still_be_what_it_was(made, tmp_path, family, name):
    hf_to_mcore(made(family), tmp_path / "m", integrity=False)
    reader = TorchDistReader(LocalFolder(tmp_path / "m"))
    location = reader.chunks(name)[0].location
    path = tmp_path / "m" / "iter_0000000" / location.file
    data = bytearray(path.read_bytes())
    at = data.index(
        np.ones(32, np.float32).astype("<f4").view("<u4").astype("<u4").__rshift__(16).astype("<u2").tobytes(), location.offset
    )
    data[at : at + 2] = b"\x00\x40"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"`{name}` is not 1 everywhere any more"):
        mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert not verify(made(family), tmp_path / "m").same


def test_expert_parallel_sizes_that_do_not_fit_are_refused(made, tmp_path):
    refused = {3: "expert-parallel size 3 does not divide the model's 4 experts"}
    refused[1] = "expert-tensor-parallel size 5 does not divide the experts' feed-forward size, 48"
    for ep, message in refused.items():
        with pytest.raises(UserError, match=message):
            hf_to_mcore(made("mixtral"), tmp_path / "m", ep=ep, etp=5)
    with pytest.raises(UserError, match="expert-parallel size 2 needs a model with experts"):
        hf_to_mcore(made("qwen2"), tmp_path / "m", ep=2)


def test_a_rank_s_file_holds_its_experts(made, tmp_path):
    import pickle

    hf_to_mcore(made("mixtral"), tmp_path / "m", tp=2, ep=2, etp=1)
    metadata = pickle.loads((tmp_path / "m" / "iter_0000000" / ".metadata").read_bytes())
    key = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    held = {tuple(i.offset): info.relative_path for i, info in metadata.storage_data.items() if i.fqn == key}
    assert held == {(layer, e, 0, 0): f"__{e // 2}_0.distcp" for layer in range(3) for e in range(4)}


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next"])
def test_a_conversion_that_was_stopped_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch, family):
    import converter.run
    import converter.worker
    from formats.torch_dist_writer import TorchDistWriter

    for module in (converter.run, converter.worker):
        monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    hf_to_mcore(made(family), tmp_path / "whole")
    write, calls = TorchDistWriter.write, itertools.count()

    def stopped(*arguments):
        if next(calls) > 150:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TorchDistWriter, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            hf_to_mcore(made(family), tmp_path / "again", workers=1)
    assert hf_to_mcore(made(family), tmp_path / "again", resume=True).reused_bytes > 0
    whole, resumed = (model_tree(tmp_path / name / "iter_0000000") for name in ("whole", "again"))
    assert whole == resumed
    hashes = [
        json.loads((tmp_path / name / "iter_0000000" / "conversion.json").read_text())["blake3"] for name in ("whole", "again")
    ]
    assert hashes[0] == hashes[1]


def test_what_a_run_left_that_knew_no_transforms_is_refused_by_name(made, tmp_path, monkeypatch):
    import converter.worker
    from formats.torch_dist_writer import TorchDistWriter

    calls, write = itertools.count(), TorchDistWriter.write

    def stopped(*arguments):
        if next(calls) > 20:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TorchDistWriter, "write", stopped)
        patch.setattr(converter.worker, "PLAN_FORMAT", None)
        with pytest.raises(KeyboardInterrupt):
            hf_to_mcore(made("qwen2"), tmp_path / "m", workers=1)
    with pytest.raises(UserError, match="was begun with a plan of format null, now it is 2"):
        hf_to_mcore(made("qwen2"), tmp_path / "m", resume=True)
