"""A merged model is what PEFT would merge, rounded once; the same model whichever format the base and the output are in."""

from __future__ import annotations

import json
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from converter import Reporter, UserError, check, hf_to_mcore, mcore_to_hf, verify
from converter.adapters.adapter import Delta
from converter.adapters.convert import adapter_to_mcore
from converter.adapters.merge import merge
from converter.adapters.merged import MergedReader, block_rows, blocks
from formats.folder import LocalFolder
from formats.huggingface import HuggingFaceReader
from formats.iterations import TRACKER
from tests.converter.adapters.made import EVERY, logits, older_names, save_adapter, with_adapter
from tests.converter.test_provenance import hashes, record
from tests.converter.test_verify import Lying
from tests.models import model_tree, tree
from tests.quantized import plain_of, quantize

METHODS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "r": 6},
    "feed-forward alone": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "two layers, query and value": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 2]},
    "a rank for one layer": {"rank_pattern": {"layers.1.self_attn.q_proj": 9}, "alpha_pattern": {"down_proj": 3}},
}


def weights(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def exact_adapter(base, folder, **config):
    """An adapter whose B · A and scale are exact in fp32, in whatever order they are computed."""
    save_adapter(base, folder, lora_alpha=4, r=4, **config)
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(7)
    eighths = {name: torch.randint(-9, 10, tensor.shape, generator=generator) / 64 for name, tensor in tensors.items()}
    save_file(eighths, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder, eighths


def keep_factors_alone(adapter):
    """As with `save_embedding_layers=False`: PEFT saves the output layer itself beside its adapter otherwise."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "lora_" in name}, adapter / "adapter_model.safetensors")


def in_fp32(base, factors):
    """The same sums as torch makes them, each in fp32."""
    merged = {}
    for name, tensor in weights(base).items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        changes = f"{stem}.lora_A.weight" in factors
        product = factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"] if changes else 0
        merged[name] = tensor.float() + product
    return merged


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_that_peft_merges_and_logits_those_it_has_unmerged(base, peft_folder, tmp_path, method):
    from transformers import AutoModelForCausalLM

    adapter = peft_folder(**METHODS[method])
    merge(base, adapter, tmp_path / "merged")
    adapted = with_adapter(base, adapter)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto", attn_implementation="eager").eval()
    unmerged = logits(adapted)
    torch.testing.assert_close(logits(ours), unmerged, rtol=1e-4, atol=1e-4)  # of logits that span several units
    with older_names():
        theirs = adapted.merge_and_unload().state_dict()
    changed = 0
    for name, tensor in weights(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=2e-7)  # a few times fp32's rounding of sums near 1
        changed += not torch.equal(tensor, weights(base)[name])
    assert changed == {"feed-forward alone": 12, "two layers, query and value": 4}.get(method, 28)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_sums_are_rounded_once(model_folder, tmp_path, dtype):
    base = model_folder("gqa", dtype=dtype)
    adapter, factors = exact_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged")
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in in_fp32(base, factors).items()}
    assert same_bits(weights(tmp_path / "merged"), expected)
    assert not same_bits(expected, weights(base))


@pytest.mark.parametrize("to", ["hf", "mcore"])
@pytest.mark.parametrize(("start", "option"), [("bfloat16", "fp32"), ("float32", "bf16"), ("float16", "bf16")])
def test_with_a_cast_too(model_folder, tmp_path, to, start, option):
    """Not to the base's dtype first: a sum in a bf16 base is not cut to bf16 on the way to fp32."""
    base, torch_dtype = model_folder("gqa", dtype=start), {"fp32": torch.float32, "bf16": torch.bfloat16}[option]
    adapter, factors = exact_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged", to=to, dtype=option, verify=True)
    if to == "mcore":
        mcore_to_hf(tmp_path / "merged", tmp_path / "back")
    folder = tmp_path / ("back" if to == "mcore" else "merged")
    expected = {name: tensor.to(torch_dtype) for name, tensor in in_fp32(base, factors).items()}
    assert same_bits(weights(folder), expected)
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(torch_dtype).removeprefix("torch.")


DTYPES = {"gqa": "bfloat16", "mqa": "bfloat16", "head_dim": "float16", "tied": "bfloat16", "padded_vocab": "float32",
          "both_biases": "bfloat16"}  # fmt: skip


@pytest.mark.parametrize("variant", DTYPES)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_every_way_gives_the_same_model(model_folder, tmp_path, monkeypatch, variant, method):
    """Rows of fused tensors too, in bands of any size: a weight's rows have the same bits wherever they are read."""
    base = model_folder(variant, dtype=DTYPES[variant], max_shard_size="60KB")
    adapter = save_adapter(base, tmp_path / "adapter", **METHODS[method])
    hf_to_mcore(base, tmp_path / "base", tp=2, pp=2)
    merge(base, adapter, tmp_path / "hf-hf")
    merge(tmp_path / "base", adapter, tmp_path / "mcore-hf", to="hf", verify=True)
    monkeypatch.setattr("converter.worker.PIECE_BYTES", 3000)
    monkeypatch.setattr("converter.adapters.merged.RECENT", 1)
    merge(base, adapter, tmp_path / "hf-mcore", to="mcore", tp=4, verify=True)
    merge(tmp_path / "base", adapter, tmp_path / "mcore-mcore", pp=4, verify=True, workers=7)
    for name in ("mcore-hf", "hf-mcore", "mcore-mcore"):
        assert verify(tmp_path / "hf-hf", tmp_path / name).lines() == []
    assert not verify(tmp_path / "hf-hf", base).same
    assert len({str(record(tmp_path / name)["blake3"]) for name in ("hf-hf", "mcore-hf", "hf-mcore", "mcore-mcore")}) == 1


def test_files_keep_their_names_headers_and_what_lies_beside(model_folder, tmp_path):
    base = model_folder("gqa", dtype="bfloat16", max_shard_size="60KB")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    hf_to_mcore(base, tmp_path / "base")
    merge(base, adapter, tmp_path / "merged")
    merge(tmp_path / "base", adapter, tmp_path / "again", tp=2)
    mcore_to_hf(tmp_path / "again", tmp_path / "back")
    before, after = tree(base), model_tree(tmp_path / "merged")
    assert model_tree(tmp_path / "back") == after
    assert before.keys() == after.keys()
    for name, data in before.items():
        if name.endswith(".safetensors"):
            header = 8 + int.from_bytes(data[:8], "little")
            assert data[:header] == after[name][:header]
        else:
            assert data == after[name]
    merged, old = weights(tmp_path / "merged"), weights(base)
    assert [name for name in old if not torch.equal(old[name], merged[name])] == [name for name in old if "q_proj" in name]


def test_smaller_files_if_they_are_asked_for(base, peft_folder, tmp_path):
    merge(base, peft_folder(), tmp_path / "merged")
    merge(base, peft_folder(), tmp_path / "small", max_shard_size=100_000)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 5
    assert same_bits(weights(tmp_path / "merged"), weights(tmp_path / "small"))


def test_the_bytes_do_not_depend_on_the_number_of_workers_nor_on_how_rows_are_cut(base, peft_folder, tmp_path, monkeypatch):
    for workers, size in ((1, 3000), (8, 100)):
        monkeypatch.setattr("converter.worker.PIECE_BYTES", size)
        merge(base, peft_folder(use_dora=True), tmp_path / f"{workers}", to="mcore", tp=2, workers=workers)
    assert tree(tmp_path / "1") == tree(tmp_path / "8")


def test_an_adapter_checkpoint_of_megatron_merges_to_the_same(base, peft_folder, tmp_path):
    for method, canonical in (("lora", True), ("dora", True), ("lora", False)):
        adapter, name = peft_folder(equal_a=True, **METHODS[method]), f"{method}-{canonical}"
        adapter_to_mcore(adapter, tmp_path / name, base=base, canonical=canonical)
        merge(base, tmp_path / name, tmp_path / f"{name}-merged")
        merge(base, adapter, tmp_path / f"{name}-expected")
        assert same_bits(weights(tmp_path / f"{name}-merged"), weights(tmp_path / f"{name}-expected"))


@pytest.mark.parametrize("to", ["hf", "mcore"])
@pytest.mark.parametrize("kind", ["hf", "mcore"])
@pytest.mark.parametrize("scheme", ["blocks", "int4"])
def test_a_quantized_base_is_merged_as_the_plain_one_that_it_means(model_folder, tmp_path, scheme, kind, to):
    base = quantize(model_folder("gqa", dtype="bfloat16"), tmp_path / "q", scheme)
    hf_to_mcore(base, tmp_path / "m", tp=2)
    save_adapter(plain_of(base), tmp_path / "a")
    merge(base if kind == "hf" else tmp_path / "m", tmp_path / "a", tmp_path / "out", to=to)
    merge(plain_of(base), tmp_path / "a", tmp_path / "expected", to=to)
    assert verify(tmp_path / "out", tmp_path / "expected").same
    config = next((tmp_path / "out").rglob("config.json"))
    assert to == "mcore" or "quantization_config" not in json.loads(config.read_text())


def test_a_model_of_an_unknown_family_can_be_merged_into_its_own_format(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=384, num_hidden_layers=2, **sizes)).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter")
    merge(tmp_path / "base", adapter, tmp_path / "merged", verify=True)
    with older_names():
        theirs = with_adapter(tmp_path / "base", adapter).merge_and_unload().state_dict()
    for name, tensor in weights(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=2e-7)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_the_output_layer_can_be_merged_where_it_is_not_tied(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    keep_factors_alone(adapter)
    merge(base, adapter, tmp_path / "merged", to="mcore")
    mcore_to_hf(tmp_path / "merged", tmp_path / "back")
    with older_names():
        theirs = with_adapter(base, adapter).merge_and_unload().state_dict()
    torch.testing.assert_close(weights(tmp_path / "back")["lm_head.weight"], theirs["lm_head.weight"], rtol=1e-6, atol=2e-7)


def test_a_row_of_zeros_has_no_direction_and_stays(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name][3] = 0
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter", use_dora=True)
    factors = load_file(adapter / "adapter_model.safetensors")
    factors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][3] = 0
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    merged = weights(tmp_path / "merged")[name]
    assert not merged[3].any()
    assert torch.isfinite(merged).all()


def test_the_record_names_base_and_adapter_and_lists_the_hashes_of_what_was_made(base, peft_folder, tmp_path):
    adapter = peft_folder(use_dora=True)
    hf_to_mcore(base, tmp_path / "base")
    merge(base, adapter, tmp_path / "hf")
    merge(tmp_path / "base", adapter, tmp_path / "mcore", tp=2)
    provenance = record(tmp_path / "hf")
    assert (provenance["command"], provenance["source"], provenance["family"]) == (
        "merge",
        {**provenance["source"], "format": "safetensors"},
        "llama",
    )
    assert provenance["blake3"] == hashes(tmp_path / "hf") == record(tmp_path / "mcore")["blake3"]
    assert provenance["adapter"] == record(tmp_path / "mcore")["adapter"]
    named = {"name": "adapter", "method": "dora", "dim": 4, "alpha": 8, "weights": 28, "target_modules": sorted(EVERY)}
    assert {
        key: sorted(provenance["adapter"][key]) if key == "target_modules" else provenance["adapter"][key] for key in named
    } == named
    assert record(tmp_path / "mcore")["source"]["format"] == "torch_dist"
    assert check(tmp_path / "hf").whole
    assert check(tmp_path / "mcore").whole
    assert (tmp_path / "mcore" / TRACKER).read_text() == "0"
    merge(base, peft_folder(use_dora=True, seed=2), tmp_path / "other")
    assert record(tmp_path / "other")["adapter"]["blake3"] != provenance["adapter"]["blake3"]


def test_a_base_of_megatrons_that_carries_no_config_follows_the_one_given(base, peft_folder, tmp_path):
    hf_to_mcore(base, tmp_path / "base", tp=2)
    shutil.rmtree(tmp_path / "base" / "iter_0000000" / "huggingface")
    (tmp_path / "base" / "iter_0000000" / "run_config.yaml").unlink()
    merge(base, peft_folder(), tmp_path / "expected")
    for to in ("hf", "mcore"):
        merge(tmp_path / "base", peft_folder(), tmp_path / to, to=to, hf_config=base)
        assert verify(tmp_path / "expected", tmp_path / to).same


def test_what_a_checkpoint_rebuilds_travels_with_the_merged_one(base, peft_folder, tmp_path):
    hf_to_mcore(base, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "iter_0000000" / "huggingface")
    merge(tmp_path / "base", peft_folder(), tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "iter_0000000" / "huggingface" / "files" / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 4)
    merge(base, peft_folder(), tmp_path / "expected")
    assert verify(tmp_path / "expected", tmp_path / "merged").same


def test_an_interrupted_merge_goes_on_and_one_of_another_adapter_does_not(base, peft_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("converter.worker.PIECE_BYTES", 3000)
    merge(base, peft_folder(), tmp_path / "straight", to="mcore", tp=2)

    def stop_halfway():
        done = 0

        def progress(count):
            nonlocal done
            done += count
            if done > 300_000:
                raise KeyboardInterrupt

        return Reporter(progress=progress)

    with pytest.raises(KeyboardInterrupt):
        merge(base, peft_folder(), tmp_path / "m", to="mcore", tp=2, reporter=stop_halfway())
    other = merge(base, peft_folder(seed=3), tmp_path / "other", to="mcore", tp=2, resume=True)
    assert other.reused_bytes == 0
    resumed = merge(base, peft_folder(), tmp_path / "m", to="mcore", tp=2, resume=True)
    assert resumed.reused_bytes > 250_000
    assert tree(tmp_path / "m") == tree(tmp_path / "straight")


def test_a_sum_that_the_bases_dtype_cannot_hold_is_refused(model_folder, tmp_path):
    base = model_folder("gqa", dtype="float16")
    adapter, factors = exact_adapter(base, tmp_path / "adapter", target_modules=["o_proj"])
    large = {name: tensor * 2**24 if ".lora_B" in name else tensor for name, tensor in factors.items()}
    save_file(large, adapter / "adapter_model.safetensors", {"format": "pt"})
    assert any(tensor.half().isinf().any() for tensor in in_fp32(base, large).values())
    with pytest.raises(UserError, match=r"`model.layers.\d.self_attn.o_proj.weight` has numbers that fp16 cannot hold: up to `"):
        merge(base, adapter, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))
    merge(base, adapter, tmp_path / "merged", dtype="fp32")
    assert same_bits(weights(tmp_path / "merged"), in_fp32(base, large))


@settings(deadline=None)  # a test asserts no time
@given(st.data())
def test_a_band_of_rows_has_the_bits_it_has_in_the_whole_weight(wide, data):
    """BLAS alone does not promise that: this fails for products of just the rows that are asked for."""
    merged, whole = wide
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    part = np.empty((stop - start, *whole.shape[1:]), whole.dtype)
    merged.read("weight", (slice(start, stop), slice(0, whole.shape[1])), part)
    assert np.array_equal(part, whole[start:stop])


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A weight of many columns that an adapter of a real rank changes, and what all of it is when it is read at once."""
    folder, generator = tmp_path_factory.mktemp("wide"), np.random.default_rng(3)
    a, b, weight = (generator.standard_normal(shape, np.float32) for shape in ((16, 2051), (200, 16), (200, 2051)))
    save_file({"weight": torch.from_numpy(weight)}, folder / "model.safetensors")
    delta = Delta(a, b, 0.7, np.abs(b[:, 0]))
    base, deltas = HuggingFaceReader(LocalFolder(folder)), {"weight": delta}
    with closing(MergedReader(base, deltas.__getitem__, changed=deltas.keys(), dtype="keep")) as merged:
        whole = np.empty_like(weight)
        merged.read("weight", merged.specs["weight"].full_region, whole)
        yield merged, whole


def test_verify_sees_what_a_lying_disk_holds(model_folder, peft_folder, tmp_path, monkeypatch):
    base, adapter = model_folder("gqa", dtype="bfloat16"), peft_folder(use_dora=True)
    for to in ("hf", "mcore"):
        with monkeypatch.context() as patch:
            Lying(patch, 4)
            with pytest.raises(UserError, match=r"what is on the disk is not what was converted: `model\..* 1 element differs"):
                merge(base, adapter, tmp_path / to, to=to, verify=True)
    assert not list(tmp_path.iterdir())


def test_row_blocks_cover_each_row_once():
    for shape in ((100, 64), (7, 3), (4096, 53_248), (5, 1 << 22), (128, 0)):
        step = block_rows(shape)
        for rows in (slice(0, shape[0]), slice(3, 5), slice(shape[0] - 1, shape[0])):
            covered = [row for block in blocks(rows, shape) for row in range(block.start, block.stop)]
            assert np.array_equal(covered, np.arange(rows.start // step * step, min(-(-rows.stop // step) * step, shape[0])))
