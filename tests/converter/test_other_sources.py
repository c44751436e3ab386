"""Weights that are quantized, named otherwise or with another head, and folders of another kind: each is said to be what it is,
and what the hint says works."""

from __future__ import annotations

import json
import re
import shutil
import struct
from inspect import signature

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import torch as safetensors_torch
from safetensors.numpy import load_file, save_file

from converter import UserError, hf_to_mcore, inspect, mcore_to_hf, merge, verify
from converter.execution import Reporter
from tests.converter.adapters.made import save_adapter
from tests.models import model_tree
from tests.refusal import refused

SINGLE = "model.safetensors"


@pytest.fixture
def plain(model_folder, tmp_path):
    """A model in one file, free to be changed."""
    shutil.copytree(model_folder("gqa"), tmp_path / "source")
    return tmp_path / "source"


def rewrite(folder, change, **config):
    """Change a model's tensors, by a function of all of them, and its `config.json`."""
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **config}))


def message(action, source, tmp_path, **options):
    with pytest.raises(UserError) as error:
        action(source, tmp_path / "out", **options)
    return str(error.value)


def parts(**made):
    """Replace each projection's weight by the parts of a quantized one."""

    def change(tensors):
        linear = [name for name in tensors if "_proj.weight" in name]
        kept = {name: value for name, value in tensors.items() if name not in linear}
        return kept | {
            f"{name.removesuffix('.weight')}.{part}": value(tensors[name]) for name in linear for part, value in made.items()
        }

    return change


def ints(_weight):
    return np.zeros((8, 8), "int32")


def scales(_weight):
    return np.ones((2, 2), "float32")


def fp8(weight):
    return weight.astype(ml_dtypes.float8_e4m3fn)


def nibbles(weight):
    return np.zeros((weight.size // 2, 1), "uint8")


def small(weight):
    return weight.astype("int8")


def same(weight):
    return weight


QUANTIZED = {
    "GPTQ": ("gptq", {"qweight": ints, "qzeros": ints, "scales": scales, "g_idx": ints}),
    "AWQ or GPTQ": ("awq", {"qweight": ints, "qzeros": ints, "scales": scales}),
    "bitsandbytes": (
        "bitsandbytes",
        {"weight": nibbles, "weight.absmax": scales, "weight.quant_state.bitsandbytes__nf4": nibbles},
    ),
    "bitsandbytes int8": ("bitsandbytes", {"weight": small, "SCB": scales}),
    "FP8 with a scale for each block": ("fp8", {"weight": fp8, "weight_scale_inv": scales}),
    "FP8 by tensor": ("fbgemm_fp8", {"weight": fp8, "weight_scale": scales}),
    "compressed-tensors": ("compressed-tensors", {"weight_packed": ints, "weight_scale": scales, "weight_shape": ints}),
    "ModelOpt": ("modelopt", {"weight": nibbles, "weight_scale": fp8, "weight_scale_2": scales, "input_scale": scales}),
    "MXFP4": ("mxfp4", {"weight_blocks": nibbles, "weight_scales": nibbles}),
    "EXL2": ("exl2", {"q_weight": ints, "q_scale": ints, "q_groups": ints}),
    "AQLM": ("aqlm", {"codes": ints, "codebooks": scales, "scales": scales}),
    "VPTQ": ("vptq", {"indices": ints, "centroids.weight": scales}),
    "HQQ": ("hqq", {"W_q": ints, "scale": scales, "zero": scales}),
    "quanto": ("quanto", {"weight._data": small, "weight._scale": scales}),
    "torchao": ("torchao", {"_weight_qdata": small, "_weight_scale": scales}),
    "EETQ": ("eetq", {"weight": small, "weight_scales": scales}),
    "MLX": (None, {"weight": ints, "scales": scales, "biases": scales}),
    "whole numbers": ("bitnet", {"weight": small}),
    "a scale of the cache": ("fp8", {"weight": same, "k_scale": scales}),
}


NOT_BY_NAMES = {"FP8 by tensor", "MLX", "whole numbers", "a scale of the cache"}


READ = {"FP8 with a scale for each block", "MXFP4"}


@pytest.mark.parametrize("name", sorted(QUANTIZED.keys() - READ))
def test_quantized_weights_are_said_to_be_with_their_method_and_the_way_out(plain, tmp_path, name):
    method, made = QUANTIZED[name]
    settings = {"quantization_config": {"quant_method": method}} if method else {"quantization": {"group_size": 64, "bits": 4}}
    rewrite(plain, parts(**made), **settings)
    text = message(hf_to_mcore, plain, tmp_path)
    assert text.startswith(f"`{plain}` is quantized ({method or 'MLX'}): ")
    assert "hint: convert the original weights (bf16), from which it was made; or dequantize it first" in text


@pytest.mark.parametrize(
    "name", [name for name, (method, _) in QUANTIZED.items() if method and name[0].isupper() and " by" not in name]
)
def test_the_method_is_told_by_names_where_the_config_says_nothing(plain, tmp_path, name):
    rewrite(plain, parts(**QUANTIZED[name][1]))
    assert message(hf_to_mcore, plain, tmp_path).startswith(f"`{plain}` is quantized ({name.removesuffix(' int8')}): ")


@pytest.mark.parametrize(("method", "way"), [
    ("fp8", "FineGrainedFP8Config(dequantize=True)"), ("mxfp4", "Mxfp4Config(dequantize=True)"),
    ("compressed-tensors", "CompressedTensorsConfig(dequantize=True)"),
])  # fmt: skip
def test_the_ways_out_are_what_transformers_has(plain, tmp_path, method, way):
    import transformers

    rewrite(plain, parts(weight=small), quantization_config={"quant_method": method})
    assert way in message(hf_to_mcore, plain, tmp_path)
    assert "dequantize" in signature(getattr(transformers, way.partition("(")[0])).parameters


def test_fp8_weights_without_scales_are_plain_weights(plain, tmp_path):
    rewrite(plain, lambda tensors: {name: fp8(value) for name, value in tensors.items()})
    hf_to_mcore(plain, tmp_path / "m")
    assert verify(plain, tmp_path / "m").same


def test_a_config_names_the_dtype_of_fp8_weights_as_torch_does(plain, tmp_path):
    rewrite(plain, lambda tensors: {name: fp8(value) for name, value in tensors.items()})
    hf_to_mcore(plain, tmp_path / "m")
    (tmp_path / "settings").mkdir()
    shutil.copy(plain / "config.json", tmp_path / "settings")
    mcore_to_hf(tmp_path / "m", tmp_path / "back", hf_config=tmp_path / "settings")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert getattr(torch, config.get("dtype") or config["torch_dtype"]) is torch.float8_e4m3fn


def everywhere(name, wrapper):
    head, dot, tail = name.partition("self_attn.")
    return f"{head}{wrapper}.{dot}{tail}" if dot else name


RENAMED = {
    "DDP": (lambda n: f"module.{n}", "`module.` is DistributedDataParallel's or DeepSpeed's"),
    "compiled": (lambda n: f"_orig_mod.{n}", "`_orig_mod.` is `torch.compile`'s"),
    "both": (lambda n: f"module._orig_mod.{n}", "`module.` is DistributedDataParallel's or DeepSpeed's; `_orig_mod.` is"),
    "FSDP": (lambda n: everywhere(n, "_fsdp_wrapped_module"), "`_fsdp_wrapped_module.` is FSDP's"),
    "checkpointed": (lambda n: everywhere(n, "_checkpoint_wrapped_module"), "is activation checkpointing's"),
    "PEFT": (lambda n: f"base_model.model.{n}", "`base_model.model.` is PEFT's"),
    "Lightning": (lambda n: f"model.{n}", "the prefix is `model.model.` instead of `model.`"),
    "twice": (lambda n: n.replace("model.", "model.model.", 1), "the prefix is `model.model.` instead of `model.`"),
    "transformer": (lambda n: n.replace("model.", "transformer.", 1), "the prefix is `transformer.` instead of `model.`"),
    "vision, old": (lambda n: f"language_model.{n}", "a model of text and images"),
    "vision, new": (lambda n: n.replace("model.", "model.language_model.", 1), "a model of text and images"),
    "bare": (lambda n: n.removeprefix("model."), "saved from `AutoModel`, without the prefix `model.`"),
}


@pytest.mark.parametrize("name", RENAMED)
def test_names_with_other_prefixes_are_told_and_the_hint_mends_them(plain, model_folder, tmp_path, name):
    renamed, cause = RENAMED[name]
    rewrite(plain, lambda tensors: {renamed(old): value for old, value in tensors.items()})
    text = message(hf_to_mcore, plain, tmp_path)
    problem, _, hint = text.partition("\n\nhint: ")
    match = re.match(rf"`{re.escape(str(plain))}` holds `(.*?)`, which `config.json` calls `(.*?)`: ", problem)
    assert match
    assert renamed(match[2]) == match[1]
    assert cause in problem
    exec(hint.partition("`f`: `")[2].partition("` of")[0], {**vars(safetensors_torch), "f": str(plain / SINGLE)})
    assert verify(plain, model_folder("gqa")).same


def test_an_automodels_save_is_told_to_have_no_head(plain, tmp_path):
    bare = {name: value for name, value in load_file(plain / SINGLE).items() if name != "lm_head.weight"}
    rewrite(plain, lambda _: {name.removeprefix("model."): value for name, value in bare.items()})
    text = message(hf_to_mcore, plain, tmp_path)
    assert "saved from `AutoModel`, without the prefix `model.` and without a head" in text
    assert "AutoModelForCausalLM.from_pretrained(BASE)" in text
    rewrite(plain, lambda _: bare)
    text = message(hf_to_mcore, plain, tmp_path)
    assert text.startswith(
        f"`{plain}` has no head of a language model (`lm_head.weight`)\n\nhint: if it is tied to the embedding"
    )


@pytest.mark.parametrize(
    "head", ["score.weight", "classifier.weight", "v_head.summary.weight", "value_head.weight", "reward_head.bias"]
)
def test_another_head_is_named(plain, tmp_path, head):
    whole = load_file(plain / SINGLE)
    rewrite(plain, lambda _: {**whole, head: np.ones((1, 64), "float32")})
    text = message(hf_to_mcore, plain, tmp_path)
    assert f"holds `{head}` beside the language model: a head for classification, rewards or values" in text
    del whole["lm_head.weight"]
    rewrite(plain, lambda _: {**whole, head: np.ones((1, 64), "float32")})
    assert f"has no head of a language model (`lm_head.weight`), but `{head}`: a head for" in message(
        hf_to_mcore, plain, tmp_path
    )


OTHERS = {
    "tok_embeddings.weight": "names of Meta's and Mistral's own format",
    "layers.2.attention.wq.weight": "names of Meta's and Mistral's own format",
    "model.layers.0.self_attn.q_proj.lora_A.weight": "LoRA tensors that were not merged",
    "decoder.layers.0.self_attention.linear_qkv.weight": "Megatron's names",
    "blk.0.attn_q.weight": "names of GGUF",
    "transformer.h.0.attn.c_attn.weight": "names of another architecture",
    "model.layers.1.self_attn.qkv_proj.weight": "projections fused into one tensor",
    "vision_tower.encoder.layers.0.mlp.fc1.weight": "a part for images or sounds beside the language model",
    "model.layers.1.mlp.experts.0.w1.weight": "experts of a mixture",
}


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_other_programs_are_told(plain, tmp_path, name):
    rewrite(plain, lambda tensors: {**tensors, name: np.ones((2, 2), "float32")})
    text = message(hf_to_mcore, plain, tmp_path)
    assert f"holds `{name}`: {OTHERS[name]}" in text
    assert "hint: " in text


def test_what_is_lacking_and_what_is_there_instead_are_both_named(plain, tmp_path):
    rewrite(plain, lambda tensors: {name.replace("up_proj", "w3"): value for name, value in tensors.items()})
    text = message(hf_to_mcore, plain, tmp_path)
    assert text.startswith("the source lacks `model.layers.0.mlp.up_proj.weight`, ")
    assert "and 1 more; it holds `model.layers.0.mlp.w3.weight`, `model.layers.1.mlp.w3.weight`, " in text


def test_mistrals_own_file_alone_is_told(plain, tmp_path):
    (plain / SINGLE).rename(plain / "consolidated.safetensors")
    save_file({"tok_embeddings.weight": np.ones((2, 2), "float32")}, plain / "consolidated.safetensors")
    assert "names of Meta's and Mistral's own format (`consolidated.safetensors`)" in message(hf_to_mcore, plain, tmp_path)


def test_of_mistrals_repository_without_an_index_the_numbered_files_are_converted(source, model_folder, tmp_path):
    (source / "model.safetensors.index.json").unlink()
    save_file({"tok_embeddings.weight": np.ones((2, 2), "float32")}, source / "consolidated.safetensors")
    notes = []
    hf_to_mcore(source, tmp_path / "m", reporter=Reporter(notes.append))
    assert notes == ["left out, not part of the model: consolidated.safetensors"]
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    expected = {name: data for name, data in model_tree(source).items() if name != "consolidated.safetensors"}
    assert {name: data for name, data in model_tree(tmp_path / "back").items() if not name.endswith("index.json")} == expected


def test_a_tokenizer_that_git_lfs_did_not_fetch_is_not_carried_along(plain, tmp_path):
    (plain / "tokenizer.json").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4' * 64}\nsize 9085657\n")
    refused(hf_to_mcore, plain, tmp_path, "^`tokenizer.json` is a git-lfs pointer, not the file itself")


def test_a_config_behind_a_byte_order_mark_is_told(plain, tmp_path):
    data = (plain / "config.json").read_bytes()
    (plain / "config.json").write_bytes(b"\xef\xbb\xbf" + data)
    text = message(hf_to_mcore, plain, tmp_path)
    assert text == (
        "`config.json` is JSON behind a byte order mark, which JSON must not have\n\n"
        "hint: save the file as UTF-8 without a byte order mark"
    )


def test_a_checkpoint_that_git_lfs_did_not_fetch_is_told(checkpoint, tmp_path):
    (checkpoint / "iter_0000000" / "__1_0.distcp").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4' * 64}\n"
    )
    refused(mcore_to_hf, checkpoint, tmp_path, "^`__1_0.distcp` is a git-lfs pointer, not the file itself")


def test_each_command_names_what_it_was_given_and_the_command_for_it(plain, checkpoint, tmp_path):
    assert message(mcore_to_hf, plain, tmp_path).startswith(
        f"`{plain}` is a Hugging Face model, not a Megatron checkpoint\n\nhint: `mbconvert hf-to-mcore` converts it"
    )
    assert message(hf_to_mcore, checkpoint, tmp_path).startswith(
        f"`{checkpoint}` is a Megatron checkpoint, not a Hugging Face model\n\nhint: `mbconvert mcore-to-hf` converts it"
    )


def test_an_export_named_after_its_iteration_is_a_model_like_any_other(checkpoint, model_folder, tmp_path):
    named = tmp_path / "hf" / "iter_0000100"
    mcore_to_hf(checkpoint, named)
    assert inspect(named).format == "Hugging Face safetensors"
    assert verify(named, checkpoint).same
    hf_to_mcore(named, tmp_path / "again")
    assert verify(tmp_path / "again", named).same
    adapter = save_adapter(model_folder("gqa"), tmp_path / "adapter")
    merge(named, adapter, tmp_path / "merged")
    merge(tmp_path / "again", adapter, tmp_path / "merged too")
    assert verify(tmp_path / "merged", tmp_path / "merged too").same
    assert not verify(tmp_path / "merged", named).same


@pytest.mark.parametrize("command", [inspect, lambda path: verify(path, path)], ids=["inspect", "verify"])
def test_inspect_and_verify_name_other_formats_too(tmp_path, command):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"`pytorch_model\.bin`: pickled PyTorch tensors, not safetensors"):
        command(tmp_path / "m")


DTYPES = {
    "U16": ("uint16", 2), "U32": ("uint32", 4), "U64": ("uint64", 8), "C64": ("complex64", 8), "F8_E8M0": ("fp8_e8m0", 1),
    "F8_E4M3FNUZ": ("fp8_e4m3fnuz", 1), "F8_E5M2FNUZ": ("fp8_e5m2fnuz", 1), "F4": ("F4", 0.5), "F6_E2M3": ("F6_E2M3", 0.75),
    "F9_OF_TOMORROW": ("F9_OF_TOMORROW", 3),
}  # fmt: skip


def with_dtype(folder, dtype, size, *, value=b"\1"):
    """A file of one tensor, [4, 8], as the format's specification has it."""
    folder.mkdir()
    header = json.dumps({"x": {"dtype": dtype, "shape": [4, 8], "data_offsets": [0, int(32 * size)]}}).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + value * int(32 * size))
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_is_reported_by_name_and_size_and_compared(tmp_path, dtype):
    name, size = DTYPES[dtype]
    folder = with_dtype(tmp_path / "m", dtype, size)
    report = inspect(folder, tensors=True)
    assert [(row.dtype, row.tensors, row.parameters, row.bytes) for row in report.dtypes] == [(name, 1, 32, int(32 * size))]
    assert report.tensor_list == [{"name": "x", "shape": [4, 8], "dtype": name, "file": SINGLE}]
    assert report.parameters == 32
    assert verify(folder, folder).same
    assert not verify(folder, with_dtype(tmp_path / "other", dtype, size, value=b"\2")).same


TORCH = {
    "U16": torch.uint16, "U32": torch.uint32, "C64": torch.complex64, "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
}  # fmt: skip


@pytest.mark.parametrize("dtype", TORCH)
def test_the_dtypes_that_safetensors_has_are_read_as_it_writes_them(tmp_path, dtype):
    made = {
        "U16": torch.uint16,
        "U32": torch.uint32,
        "C64": torch.complex64,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F4": torch.float4_e2m1fn_x2,
    }
    bits = torch.arange(4 * 64, dtype=torch.uint8).view(4, 64).view(made[dtype])
    (tmp_path / "m").mkdir()
    safetensors_torch.save_file({"x": bits}, tmp_path / "m" / SINGLE)
    header = json.loads((tmp_path / "m" / SINGLE).read_bytes()[8:].partition(b"}}")[0] + b"}}")
    report = inspect(tmp_path / "m", tensors=True)
    assert header["x"]["dtype"] == dtype
    assert report.tensor_list[0]["shape"] == header["x"]["shape"]
    assert report.dtypes[0].bytes == 256


def test_a_dtype_that_is_not_converted_is_refused_by_name(plain, tmp_path):
    rewrite(plain, lambda tensors: {**tensors, "model.norm.weight": np.ones(64, "complex64")})
    text = message(hf_to_mcore, plain, tmp_path)
    assert text.startswith(
        "`model.norm.weight` is complex64, which cannot be converted\n\nhint: those that can be are bf16, fp16"
    )
