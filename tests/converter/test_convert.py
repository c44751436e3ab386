"""A conversion there and back gives the source's bytes; what it writes is what readers of both worlds expect."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from threading import Thread

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from converter import UserError, hf_to_mcore, mcore_to_hf, verify
from tests.models import VARIANTS, build, model_tree, save, tree

LAYOUTS = [{"tp": 1, "pp": 1}, {"tp": 2, "pp": 2}, {"tp": 4, "pp": 1}, {"tp": 1, "pp": 4}, {"tp": 2, "pp": 2, "vpp": 2}]


def there_and_back(folder, tmp_path, **options):
    hf_to_mcore(folder, tmp_path / "megatron", **options)
    mcore_to_hf(tmp_path / "megatron", tmp_path / "back")
    return tmp_path / "back"


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_the_way_back_gives_every_byte_of_every_file(model_folder, tmp_path, options):
    folder = model_folder("gqa", dtype="bfloat16", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert model_tree(there_and_back(folder, tmp_path, **options)) == tree(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back_byte_for_byte(model_folder, tmp_path, variant, dtype):
    folder = model_folder(variant, dtype=dtype)
    assert model_tree(there_and_back(folder, tmp_path, tp=2, pp=2)) == tree(folder)


def test_mistral_comes_back_byte_for_byte(model_folder, tmp_path):
    folder = model_folder("head_dim", family="mistral", dtype="bfloat16")
    assert model_tree(there_and_back(folder, tmp_path, tp=2, pp=2)) == tree(folder)


def test_the_reference_directory_comes_back_byte_for_byte(golden, tmp_path):
    source = golden / "bridge_llama_tiny" / "hf"
    assert model_tree(there_and_back(source, tmp_path, tp=2, pp=3)) == tree(source)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_the_same_bytes_with_one_worker_and_with_eight_from_any_folder(model_folder, tmp_path, monkeypatch, tp, pp):
    folder = model_folder("padded_vocab", dtype="bfloat16", max_shard_size="60KB")
    elsewhere = tmp_path / "elsewhere" / "deep"
    elsewhere.mkdir(parents=True)
    shutil.copytree(folder, elsewhere / folder.name)
    hf_to_mcore(folder, tmp_path / "same", tp=tp, pp=pp, workers=1)
    monkeypatch.chdir(elsewhere)
    hf_to_mcore(folder.name, "same", tp=tp, pp=pp, workers=8)
    assert tree(tmp_path / "same") == tree(elsewhere / "same")
    mcore_to_hf(tmp_path / "same", tmp_path / "back1", workers=1)
    mcore_to_hf("same", "back8", workers=8)
    assert tree(tmp_path / "back1") == tree(elsewhere / "back8")


@pytest.mark.parametrize("size", [1000, 60], ids=["rows", "parts of rows"])
def test_small_pieces_make_the_same_bytes(model_folder, tmp_path, monkeypatch, size):
    folder = model_folder("attention_bias", dtype="bfloat16")
    hf_to_mcore(folder, tmp_path / "large", tp=2, pp=2)
    for module in ("worker", "comparison", "run"):
        monkeypatch.setattr(f"converter.{module}.PIECE_BYTES", size)
    hf_to_mcore(folder, tmp_path / "small", tp=2, pp=2, verify=True)
    mcore_to_hf(tmp_path / "small", tmp_path / "back", verify=True)
    assert tree(tmp_path / "large") == tree(tmp_path / "small")
    assert model_tree(tmp_path / "back") == tree(folder)


def test_threads_are_as_many_as_workers_for_each_purpose(model_folder, tmp_path, monkeypatch):
    """Each takes memory, which an estimate counts by worker."""
    started, start = Counter(), Thread.start

    def counted(thread):
        started[thread.name.partition("_")[0]] += 1
        start(thread)

    monkeypatch.setattr(Thread, "start", counted)
    monkeypatch.setattr("converter.worker.PIECE_BYTES", 512)
    hf_to_mcore(model_folder("gqa"), tmp_path / "megatron", workers=2)
    mcore_to_hf(tmp_path / "megatron", tmp_path / "back", workers=2)
    assert all(0 < started[purpose] <= 2 for purpose in ("made", "tap"))  # each in one of the two conversions
    assert 0 < started["piece"] <= 4


def test_a_hub_cache_snapshot_of_links_converts(model_folder, tmp_path):
    folder = model_folder("gqa", dtype="bfloat16", max_shard_size="60KB")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, (name, data) in enumerate(tree(folder).items()):
        (blobs / f"{number:040x}").write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / f"{number:040x}", (snapshot / name).parent))
    back = there_and_back(snapshot, tmp_path, tp=2)
    assert model_tree(back) == tree(folder)
    assert not any(path.is_symlink() for path in back.rglob("*"))


def test_a_hub_id_is_taken_from_the_hub_cache(model_folder, tmp_path, monkeypatch):
    folder = model_folder("gqa", dtype="bfloat16")
    cache, commit = tmp_path / "hub", "1" * 40
    snapshot = cache / "models--org--name" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    (cache / "models--org--name" / "refs").mkdir()
    (cache / "models--org--name" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hf_to_mcore("org/name", tmp_path / "megatron")
    mcore_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert model_tree(tmp_path / "back") == tree(folder)


def test_weights_in_other_formats_are_named_and_left_out(model_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_folder("gqa", dtype="bfloat16", max_shard_size="60KB"), source)
    expected = tree(source)
    for name in (
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "model.gguf",
        "onnx/model.onnx_data_1",
        "consolidated.safetensors",
        ".git/HEAD",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"other weights")
    from converter import Reporter

    notes = []
    hf_to_mcore(source, tmp_path / "megatron", reporter=Reporter(note=notes.append))
    mcore_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert model_tree(tmp_path / "back") == expected
    left_out = ".git/, consolidated.safetensors, model.gguf, onnx/model.onnx_data_1, original/consolidated.00.pth"
    assert notes == [f"left out, not part of the model: {left_out}, pytorch_model.bin"]


def test_inverse_frequencies_of_old_llama_2_files_travel(model_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_folder("mha", dtype="float16"), source)
    weights = load_file(source / "model.safetensors")
    for layer in range(4):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    assert model_tree(there_and_back(source, tmp_path, tp=2, pp=2)) == tree(source)


def test_numbers_without_dimensions_travel_and_are_compared(model_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_folder("gqa", dtype="bfloat16"), source)
    weights = load_file(source / "model.safetensors")
    name = "model.layers.2.self_attn.rotary_emb.inv_freq"
    weights[name] = torch.tensor(0.625, dtype=torch.bfloat16)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    back = there_and_back(source, tmp_path, tp=2)
    assert model_tree(back) == tree(source)
    assert verify(source, back).same
    save_file({**weights, name: torch.tensor(0.5, dtype=torch.bfloat16)}, source / "model.safetensors", {"format": "pt"})
    assert [difference.name for difference in verify(source, back).different] == [name]


def test_a_tied_output_layer_equal_to_the_embedding_comes_back(model_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_folder("tied", dtype="bfloat16"), source)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    assert model_tree(there_and_back(source, tmp_path, tp=2)) == tree(source)
    weights["lm_head.weight"][3, 5] += 1
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"`lm_head.weight` differs from `model.embed_tokens.weight`"):
        hf_to_mcore(source, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_headers_with_unusual_spacing_and_order_come_back(model_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_folder("gqa", dtype="bfloat16"), source)
    path = source / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(dict(reversed(header.items())), indent=3).encode() + b" " * 13
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    assert model_tree(there_and_back(source, tmp_path, tp=2, pp=2)) == tree(source)


def test_max_shard_size_makes_other_files_that_transformers_reads(model_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = model_folder("gqa", dtype="bfloat16")
    hf_to_mcore(folder, tmp_path / "megatron")
    mcore_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_size=50_000)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3
    for path in files:
        with safe_open(path, "pt") as shard:
            sizes = [shard.get_tensor(name).nbytes for name in shard.keys()]  # noqa: SIM118
        assert sum(sizes) <= 50_000 or len(sizes) == 1
    original, exported = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (folder, tmp_path / "back"))
    for (name, a), (_, b) in zip(original.state_dict().items(), exported.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in original.state_dict().values())


@pytest.mark.parametrize(("start", "option", "torch_dtype"), [
    ("float32", "bf16", torch.bfloat16), ("float32", "fp16", torch.float16), ("bfloat16", "fp32", torch.float32),
    ("float16", "bf16", torch.bfloat16),
])  # fmt: skip
def test_a_cast_equals_torchs_and_keeps_the_files_grouping(model_folder, tmp_path, start, option, torch_dtype):
    folder = model_folder("gqa", dtype=start, max_shard_size="60KB")
    hf_to_mcore(folder, tmp_path / "megatron", tp=2, pp=2, dtype=option)
    mcore_to_hf(tmp_path / "megatron", tmp_path / "back")
    mcore_to_hf(there_and_back(folder, tmp_path / "plain") / "../megatron", tmp_path / "cast_later", dtype=option)
    assert {p.name for p in folder.glob("*")} | {"conversion.json"} == {p.name for p in (tmp_path / "back").glob("*")}
    for path in folder.glob("*.safetensors"):
        source, back = load_file(path), load_file(tmp_path / "back" / path.name)
        assert source.keys() == back.keys()
        assert all(torch.equal(back[name], source[name].to(torch_dtype)) for name in source)
    assert model_tree(tmp_path / "cast_later") == model_tree(tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((folder / "config.json").read_text())
    assert config == {**original, "dtype": str(torch_dtype).removeprefix("torch.")}


def test_casting_rounds_as_torch_does_at_ties_underflow_and_nan_and_refuses_what_would_become_infinite():
    from converter.values import cast_into
    from formats.spec import DTYPES

    patterns = np.concatenate([np.arange(0, 1 << 32, 65_537, np.uint64).astype(np.uint32),
                               (np.arange(1 << 16, dtype=np.uint32) << 16) + 0x8000,
                               np.array([0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x477FEFFF, 0x477FF000], np.uint32)])  # fmt: skip
    values = patterns.view(np.float32)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        lost = np.isinf(torch.from_numpy(values).to(dtype).float().numpy()) & np.isfinite(values)
        with pytest.raises(UserError, match=f"`w` has numbers that {name} cannot hold.*; {lost.sum()} of the {lost.size} "):
            cast_into(np.empty(values.shape, DTYPES[name]), values, name="w")
        kept = values[~lost]
        assert np.isinf(kept).any()
        out = np.empty(kept.shape, DTYPES[name])
        cast_into(out, kept, name="w")
        expected = torch.from_numpy(kept).to(dtype)
        number = ~np.isnan(kept)
        assert np.array_equal(out.view(np.int16)[number], expected.view(torch.int16).numpy()[number])
        assert np.isnan(out.astype(np.float32)[~number]).all()


@pytest.mark.parametrize(("start", "infinite"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_a_cast_never_makes_a_number_infinite(model_folder, tmp_path, start, infinite):
    """One that was infinite before stays."""
    source, name = tmp_path / "source", "model.layers.2.mlp.up_proj.weight"
    shutil.copytree(model_folder("gqa", dtype=start), source)
    weights = load_file(source / "model.safetensors")
    weights[name][3, 5:7] = torch.inf if infinite else torch.tensor([65536.0, -131072.0])
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    if infinite:
        hf_to_mcore(source, tmp_path / "m", dtype="fp16", verify=True)
        return
    text = (
        f"`{name}` has numbers that fp16 cannot hold: up to `131072`, and its largest is `65504`; 2 of the 6144 looked at would "
        "become infinite\n\nhint: cast to bf16 or fp32, or convert with `--dtype keep`"
    )
    with pytest.raises(UserError) as error:
        hf_to_mcore(source, tmp_path / "m", dtype="fp16", verify=True)
    assert str(error.value) == text
    assert not list(tmp_path.glob("m*"))
    hf_to_mcore(source, tmp_path / "m", dtype="bf16")
    with pytest.raises(
        UserError, match=r"`decoder.layers.2.mlp.linear_fc1.weight` has numbers that fp16 cannot hold: up to `131072`"
    ):
        mcore_to_hf(tmp_path / "m", tmp_path / "back", dtype="fp16")
    assert not list(tmp_path.glob("back*"))
    with pytest.raises(UserError, match="has numbers that fp16 cannot hold"):
        verify(source, tmp_path / "m", cast_to="fp16")


def test_a_dtype_per_layer_is_refused_and_can_be_cast(model_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_folder("gqa", dtype="bfloat16"), source)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"] = weights["model.layers.2.mlp.down_proj.weight"].float()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"`decoder.layers.0.mlp.linear_fc2.weight` is bf16 and `decoder.layers.2.*` is fp32"):
        hf_to_mcore(source, tmp_path / "megatron")
    hf_to_mcore(source, tmp_path / "megatron", dtype="fp32")
    assert not list(tmp_path.glob("*.partial-*"))


def test_norms_in_another_dtype_keep_it(model_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_folder("gqa", dtype="bfloat16"), source)
    weights = load_file(source / "model.safetensors")
    save_file({n: t.float() if "norm" in n else t for n, t in weights.items()}, source / "model.safetensors", {"format": "pt"})
    assert model_tree(there_and_back(source, tmp_path, tp=2, pp=2)) == tree(source)


def test_a_random_real_model_survives_bit_patterns_of_every_kind(model_folder, tmp_path):
    """NaN payloads, infinities and negative zeros are bytes like any others."""
    source = tmp_path / "source"
    shutil.copytree(model_folder("gqa", dtype="bfloat16"), source)
    path = source / "model.safetensors"
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start:] = np.random.default_rng(3).bytes(len(raw) - start)
    path.write_bytes(raw)
    assert model_tree(there_and_back(source, tmp_path, tp=4, pp=2)) == tree(source)


def test_a_model_larger_than_one_piece_per_tensor_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr("converter.worker.PIECE_BYTES", 1 << 12)
    folder = save(build("padded_vocab", hidden_size=128, dtype="bfloat16"), tmp_path / "source")
    assert model_tree(there_and_back(folder, tmp_path, tp=2, pp=2, workers=3)) == tree(folder)
