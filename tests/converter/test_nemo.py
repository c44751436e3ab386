"""NeMo's checkpoints, of Megatron's tensors under other roots, are exported, verified and inspected as Megatron's are.

They are made of real ones: the keys renamed, and stored by torch, tensorstore or Python's `tarfile`. The trainer's state beside
the weights names classes that are refused elsewhere."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file

from converter import UserError, extend_vocab, hf_to_mcore, inspect, mcore_to_hf, reshard, verify
from formats.folder import LocalFolder
from formats.spec import names_of
from formats.torch_dist import TorchDistReader
from tests.converter import family_suite
from tests.formats import zarr_arrays
from tests.golden.kinds import unpacked
from tests.refusal import refused


def nemo_1(source, **changes):
    """Return what NeMo 1 says of a Llama, and of its training."""
    config = json.loads((source / "config.json").read_text())
    return yaml.safe_dump({
        "num_layers": config["num_hidden_layers"], "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"], "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"], "kv_channels": config["head_dim"],
        "layernorm_epsilon": config["rms_norm_eps"], "normalization": "rmsnorm", "activation": "fast-swiglu", "bias": False,
        "position_embedding_type": "rope", "rotary_percentage": 1.0, "share_embeddings_and_output_weights": False,
        "rotary_base": config["rope_parameters"]["rope_theta"], "max_position_embeddings": 64, "encoder_seq_length": 64,
        "transformer_block_type": "pre_ln", "mcore_gpt": True, "tensor_model_parallel_size": 2, "precision": "bf16",
        "optim": {"name": "distributed_fused_adam", "lr": 1e-4}, "tokenizer": {"library": "huggingface", "type": "x"}, **changes,
    })  # fmt: skip


class Callback:
    """A class of a trainer, with a method of Python's own in its state."""

    def __init__(self):
        self.step = functools.partial(os.path.join, "a")


def weights(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return family_suite.save_small("llama", tmp_path_factory.mktemp("hf") / "hf")


@pytest.fixture(scope="module")
def keys(source, tmp_path_factory):
    """The keys of the model as megatron-core stores them, with their values."""
    root = tmp_path_factory.mktemp("m") / "m"
    hf_to_mcore(source, root, tp=2)
    return keys_of(root)


def keys_of(root):
    """Return the values of a checkpoint by their keys."""
    container, values = TorchDistReader(LocalFolder(root)).container, {}
    for key in container.tensor_names:
        tensor = container.tensor(key)
        values[key] = np.empty(tensor.shape, tensor.dtype)
        container.read(tensor, tuple(slice(0, size) for size in tensor.shape), values[key])
    return values


def as_tensor(value):
    dtype = getattr(torch, names_of(value.dtype).torch)
    return torch.from_numpy(value.view(np.uint8).reshape(-1).copy()).view(dtype).reshape(value.shape)


def save_torch_dist(folder, keys, root):
    state = {f"{root}{key}": as_tensor(value) for key, value in keys.items()}
    dcp.save({**state, f"optimizer.state.exp_avg.{root}x": torch.ones(2)}, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    torch.save({"callbacks": Callback(), "pytorch-lightning_version": "2.4"}, folder / "common.pt")


def save_zarr(folder, keys, root):
    for key, value in keys.items():
        halves = tuple(-(-size // 2) for size in value.shape)
        zarr_arrays.write(folder / f"{root}{key}", value, chunks=halves)
    zarr_arrays.mark(folder)
    torch.save({"callbacks": Callback()}, folder / "common.pt")


def nemo_2(folder, keys, *, fields=None):
    (folder / "context").mkdir(parents=True)
    save_torch_dist(folder / "weights", keys, "module.")
    if fields is not None:
        document = {"_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel", "config": fields}
        (folder / "context" / "model.yaml").write_text(yaml.safe_dump(document))
    return folder


def archive(folder):
    """Put a folder in a `.nemo`."""
    path = folder.with_name(f"{folder.name}.nemo")
    with tarfile.open(path, "w") as opened:
        opened.add(folder, ".")
    shutil.rmtree(folder)
    return path


def provider(source, keys, tmp_path):
    """What Megatron-Bridge, which has NeMo 2's fields, says of the model."""
    hf_to_mcore(source, tmp_path / "b", tp=1)
    return yaml.safe_load((tmp_path / "b" / "iter_0000000" / "run_config.yaml").read_text())["model"]


def test_nemo_2_says_which_model_it_holds(source, keys, tmp_path):
    nemo = nemo_2(tmp_path / "n", keys, fields=provider(source, keys, tmp_path))
    report = inspect(nemo)
    assert (report.format, report.writer, report.optimizer_state) == ("NeMo, Megatron torch_dist", "NeMo", True)
    assert report.unknown_packages == []
    mcore_to_hf(nemo, tmp_path / "back")
    assert same(weights(tmp_path / "back"), weights(source))
    assert verify(nemo, source).same
    fields = {**provider(source, keys, tmp_path / "again"), "rotary_base": 500}
    other = nemo_2(tmp_path / "o", keys, fields=fields)
    refused(mcore_to_hf, other, tmp_path / "r", "`context/model.yaml` that it is `500`", hf_config=source)


def test_nemo_2_gets_another_vocabulary_after_a_reshard(source, keys, tmp_path):
    nemo = nemo_2(tmp_path / "n", keys, fields=provider(source, keys, tmp_path))
    refused(extend_vocab, nemo, tmp_path / "r", "is NeMo's, whose `context/model.yaml` counts tokens in its own way", to=500)


def test_weights_of_nemo_2_depend_on_nothing_beside_them(source, keys, tmp_path):
    nemo = nemo_2(tmp_path / "n", keys)
    refused(mcore_to_hf, nemo, tmp_path / "r", "says nothing about its model")
    for root in (nemo, nemo / "weights"):
        mcore_to_hf(root, tmp_path / f"back of {root.name}", hf_config=source)
        assert same(weights(tmp_path / f"back of {root.name}"), weights(source))
    reshard(nemo, tmp_path / "r1", tp=2, pp=1, hf_config=source, weights_only=True)
    assert verify(tmp_path / "r1", source).same
    (nemo / "weights" / ".metadata").unlink()
    refused(mcore_to_hf, nemo, tmp_path / "r", "is an incomplete checkpoint: `.metadata` is missing", hf_config=source)


@pytest.mark.parametrize("save", [save_torch_dist, save_zarr])
def test_nemo_1_is_read_in_its_archive(source, keys, tmp_path, save):
    folder = tmp_path / "llama"
    save(folder / "model_weights", keys, "model.")
    (folder / "model_config.yaml").write_text(nemo_1(source))
    (folder / "abc_tokenizer.model").write_bytes(b"tokenizer")
    nemo = archive(folder)
    before = set(tmp_path.iterdir())
    report = inspect(nemo)
    kind = "torch_dist" if save is save_torch_dist else "zarr"
    assert (report.format, report.writer, report.tensors) == (f"NeMo, Megatron {kind}", "NeMo", 27)
    mcore_to_hf(nemo, tmp_path / "back", hf_config=source, verify=True)
    assert same(weights(tmp_path / "back"), weights(source))
    assert verify(source, nemo).same
    assert set(tmp_path.iterdir()) - before == {tmp_path / "back"}


CONFIGS = {
    "layers": ({"num_layers": 3}, "`model_config.yaml` that it is `3`"),
    "norm": ({"normalization": "layernorm"}, "`model_config.yaml` that it is `LayerNorm`"),
    "activation": ({"activation": "fast-geglu"}, "`model_config.yaml` that it is `fast_gelu`"),
    "tied": ({"share_embeddings_and_output_weights": None}, "`model_config.yaml` that it is `True`"),
    "learned": ({"position_embedding_type": None}, "`model_config.yaml` that it is `learned_absolute`"),
    "yaml": ("{", "`model_config.yaml` is not readable as YAML"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_what_nemo_1_says_of_its_model_is_compared_with_the_given_config(source, keys, tmp_path, name):
    changes, message = CONFIGS[name]
    save_torch_dist(tmp_path / "n" / "model_weights", keys, "model.")
    text = changes if isinstance(changes, str) else nemo_1(source, **changes)
    (tmp_path / "n" / "model_config.yaml").write_text(text)
    refused(mcore_to_hf, tmp_path / "n", tmp_path, message, hf_config=source)


def test_nemo_1_does_not_say_how_many_rows_are_tokens(source, keys, tmp_path):
    save_torch_dist(tmp_path / "n" / "model_weights", keys, "model.")
    (tmp_path / "n" / "model_config.yaml").write_text(nemo_1(source))
    refused(
        mcore_to_hf,
        tmp_path / "n",
        tmp_path,
        r"`model_config.yaml` say `padded_vocab_size` `512`, and not how many of these rows are tokens",
    )


@pytest.fixture
def ranks(tmp_path):
    """The model of each rank's file of a checkpoint of Megatron-LM, TP 2 and PP 2, and its twin."""
    root = unpacked("ranks_tp2_pp2", tmp_path)
    files = sorted(root.glob("iter_*/mp_rank_*/model_optim_rng.pt"))
    states = {file.parent.name: torch.load(file, weights_only=False)["model"] for file in files}
    return states, unpacked("ranks_tp2_pp2_as_torch_dist", tmp_path)


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "vocab_size": 89,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def write_ranks(folder, states, root):
    for name, state in states.items():
        file = folder / name / "model_weights.ckpt"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({f"{root}{key}": value for key, value in state.items()}, file)
    (folder / "model_config.yaml").write_text("precision: bf16\n")


def of_both_stages(states, tp):
    second = {key.replace("layers.0.", "layers.1."): value for key, value in states[f"mp_rank_0{tp}_001"].items()}
    return {**states[f"mp_rank_0{tp}_000"], **second}


@pytest.mark.parametrize("layout", ["tp_rank_pp_rank", "mp_rank", "in one"])
def test_nemo_1s_files_of_ranks_hold_what_megatrons_do(ranks, tmp_path, layout):
    states, twin = ranks
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text(json.dumps(LLAMA))
    mcore_to_hf(twin, tmp_path / "expected", hf_config=tmp_path / "c")
    folder = tmp_path / "n"
    if layout == "tp_rank_pp_rank":
        write_ranks(folder, {f"tp_rank_{name[8:10]}_pp_rank_{name[11:]}": state for name, state in states.items()}, "model.")
    elif layout == "mp_rank":
        write_ranks(folder, {f"mp_rank_0{tp}": of_both_stages(states, tp) for tp in (0, 1)}, "model.module.")
    else:
        reader = TorchDistReader(LocalFolder(twin))
        values = {name: np.empty(spec.shape, spec.dtype) for name, spec in reader.specs.items()}
        for name, out in values.items():
            reader.read(name, reader.specs[name].full_region, out)
        write_ranks(folder, {"": {name: as_tensor(value) for name, value in values.items()}}, "model.")
    nemo = archive(folder)
    report = inspect(nemo)
    assert (report.format, report.writer, report.optimizer_state) == ("NeMo, Megatron mp_rank files", "NeMo", False)
    mcore_to_hf(nemo, tmp_path / "back", hf_config=tmp_path / "c")
    assert same(weights(tmp_path / "back"), weights(tmp_path / "expected"))


def test_a_missing_rank_and_a_model_before_megatron_core_are_named(ranks, tmp_path):
    states, _ = ranks
    names = {f"tp_rank_{name[8:10]}_pp_rank_{name[11:]}": state for name, state in states.items()}
    write_ranks(tmp_path / "n", names, "model.")
    shutil.rmtree(tmp_path / "n" / "tp_rank_01_pp_rank_000")
    with pytest.raises(UserError, match=r"lacks the file of tensor-parallel rank 1 of 2, pipeline rank 0 of 2"):
        inspect(tmp_path / "n")
    old = {"model.language_model.embedding.word_embeddings.weight": torch.ones(2, 2)}
    write_ranks(tmp_path / "o", {"": old}, "")
    with pytest.raises(UserError, match=r"is of a model from before megatron-core"):
        inspect(tmp_path / "o")


def test_nemos_model_is_megatrons_where_a_hugging_face_model_is_wanted(keys, tmp_path):
    with pytest.raises(UserError, match=r"is a Megatron checkpoint, not a Hugging Face model"):
        hf_to_mcore(nemo_2(tmp_path / "n", keys), tmp_path / "out")
