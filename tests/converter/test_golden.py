"""Chunks lie in the files of the ranks that hold them, and Megatron-Bridge's own directory reads."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
import yaml
from safetensors.torch import load_file

from converter import hf_to_mcore, inspect, mcore_to_hf
from tests.golden.make_te_keys import SIZES
from tests.models import build, save, tree


def stored_keys(iteration):
    """What torch itself finds in `.metadata`."""
    metadata = pickle.loads((iteration / ".metadata").read_bytes())
    kinds = {name: type(entry).__name__ for name, entry in metadata.state_dict_metadata.items()}
    tensors = {n: metadata.state_dict_metadata[n] for n, kind in kinds.items() if kind == "TensorStorageMetadata"}
    return tensors, {name for name, kind in kinds.items() if kind == "BytesStorageMetadata"}


def test_a_ranks_chunks_lie_in_its_own_file_one_per_layer_and_fc1_two(tmp_path):
    hf_to_mcore(save(build(dtype="bfloat16", **SIZES), tmp_path / "hf"), tmp_path / "m", tp=2, pp=2)
    metadata = pickle.loads((tmp_path / "m" / "iter_0000000" / ".metadata").read_bytes())
    chunks = {}
    for index, info in metadata.storage_data.items():
        if index.offset is not None:
            chunks.setdefault(info.relative_path, []).append((index.fqn, tuple(index.offset)))
    assert sorted(chunks) == [f"__{rank}_0.distcp" for rank in range(4)]
    for rank in range(4):
        stage, tp = divmod(rank, 2)
        held = chunks[f"__{rank}_0.distcp"]
        layers = range(2 * stage, 2 * stage + 2)
        expected = [("decoder.layers.self_attention.linear_qkv.weight", (layer, 64 * tp, 0)) for layer in layers]
        expected += [("decoder.layers.self_attention.linear_proj.weight", (layer, 0, 32 * tp)) for layer in layers]
        expected += [("decoder.layers.mlp.linear_fc2.weight", (layer, 0, 80 * tp)) for layer in layers]
        expected += [
            ("decoder.layers.mlp.linear_fc1.weight", (layer, 80 * tp + 160 * up, 0)) for layer in layers for up in (0, 1)
        ]
        norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        expected += [(f"decoder.layers.{norm}", (layer, 0)) for layer in layers for norm in norms if tp == 0]
        edge = "output_layer.weight" if stage else "embedding.word_embeddings.weight"
        expected += [(edge, (128 * tp, 0))]
        expected += [("decoder.final_layernorm.weight", (0,))] if rank == 2 else []
        assert sorted(held) == sorted(expected)


def test_padding_of_the_vocabulary_is_zero(tmp_path):
    folder = save(build("padded_vocab", dtype="bfloat16"), tmp_path / "hf")
    hf_to_mcore(folder, tmp_path / "m", tp=4)
    weight = torch.zeros(512, 64, dtype=torch.bfloat16)
    state = {"embedding.word_embeddings.weight": weight}
    torch.distributed.checkpoint.load(
        state, storage_reader=torch.distributed.checkpoint.FileSystemReader(tmp_path / "m" / "iter_0000000"), no_dist=True
    )
    expected = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weight[:389], expected)
    assert not weight[389:].any()


@pytest.mark.parametrize("reference", ["rebuilt", "given"])
def test_megatron_bridges_directory_gives_its_hf_source(golden, tmp_path, reference):
    bridge = golden / "bridge_llama_tiny"
    given = {"hf_config": bridge / "hf"} if reference == "given" else {}
    mcore_to_hf(bridge / "megatron", tmp_path / "back", **given)
    expected = {name: t for path in (bridge / "hf").glob("*.safetensors") for name, t in load_file(path).items()}
    actual = load_file(tmp_path / "back" / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    source = json.loads((bridge / "hf" / "config.json").read_text())
    if reference == "given":
        assert config == source
        return
    rope = source.pop("rope_parameters")
    assert config.pop("rope_theta") == rope.pop("rope_theta")
    assert config.pop("rope_scaling") == rope
    assert {name: source[name] for name in config} == config
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (bridge / "hf" / "tokenizer.json").read_bytes()


def test_the_files_beside_the_weights_follow_megatron_bridges(golden, tmp_path):
    bridge = golden / "bridge_llama_tiny"
    hf_to_mcore(bridge / "hf", tmp_path / "m")
    ours, theirs = tree(tmp_path / "m"), tree(bridge / "megatron")
    assert theirs.keys() - ours.keys() == set()
    for name in ("latest_checkpointed_iteration.txt", "iter_0000000/metadata.json", "iter_0000000/tokenizer/tokenizer.json"):
        assert ours[name] == theirs[name]
    for name in ("latest_train_state.pt", "iter_0000000/train_state.pt"):
        written, reference = (torch.load(root / name, weights_only=True) for root in (tmp_path / "m", bridge / "megatron"))
        assert written == reference
        assert {key: value.dtype for key, value in written.items()} == {key: value.dtype for key, value in reference.items()}
    mine, his = (yaml.safe_load(files["iter_0000000/run_config.yaml"]) for files in (ours, theirs))
    assert mine.keys() <= his.keys()
    differing = {key for key, value in mine["model"].items() if his["model"].get(key) != value}
    assert differing == {"make_vocab_size_divisible_by"}


def test_common_state_is_what_megatron_core_reads_first(golden, tmp_path, ranks):
    hf_to_mcore(golden / "bridge_llama_tiny" / "hf", tmp_path / "m", tp=2)
    ours, theirs = (
        ranks.run(common_state, 1, str(root / "iter_0000000"))[0]
        for root in (tmp_path / "m", golden / "bridge_llama_tiny" / "megatron")
    )
    assert ours == theirs


def common_state(rank, iteration):
    from megatron.core.dist_checkpointing import load_common_state_dict

    return load_common_state_dict(iteration)


def test_inspect_tells_the_two_writers_apart(golden, tmp_path):
    bridge = golden / "bridge_llama_tiny"
    hf_to_mcore(bridge / "hf", tmp_path / "m", tp=2, pp=3)
    theirs, ours, source = inspect(bridge / "megatron"), inspect(tmp_path / "m"), inspect(bridge / "hf")
    assert (theirs.writer, ours.writer, source.writer) == ("Megatron-Bridge", "mbconvert", "transformers 5.12.1")
    assert ours.layout == {"tp": 2, "pp": 3}
    assert theirs.layout == {"tp": 1, "pp": 1}
    assert (source.family, ours.family, source.layers, ours.layers) == ("llama", "llama", 3, 3)
    assert source.parameters == theirs.parameters == 236480
    assert [row.dtype for row in ours.dtypes] == ["bf16"]
