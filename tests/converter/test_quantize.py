"""`--quantize` writes weights with new scales, which transformers reads, and says what that lost."""

from __future__ import annotations

import json
import re

import ml_dtypes
import numpy as np
import pytest
import torch

from converter import UserError, hf_to_mcore, mcore_to_hf
from converter.execution import Reporter
from tests import quantized_models
from tests.converter.family_suite import save_small
from tests.programs import expected_memory

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
FP8_BLOCKS = {
    "llama": lambda folder: save_small("llama", folder, **SIZES),
    "mixtral": lambda folder: save_small("mixtral", folder, **SIZES),
}


@pytest.fixture
def notes():
    return []


@pytest.fixture
def reporter(notes):
    return Reporter(note=notes.append)


def quantized(source, tmp_path, method, reporter=None, **options):
    hf_to_mcore(source, tmp_path / "m", tp=2)
    mcore_to_hf(tmp_path / "m", tmp_path / "out", quantize=method, verify=True, reporter=reporter, **options)
    return quantized_models.load(tmp_path / "out" / "model.safetensors")


def settings(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def errors(notes):
    (note,) = [text for text in notes if text.startswith("quantizing changed")]
    return [float(number) / 100 for number in re.findall(r"([\d.]+)%", note)]


@pytest.mark.parametrize("family", FP8_BLOCKS)
def test_fp8_blocks_are_those_of_torch_and_transformers(tmp_path, family, notes, reporter):
    """transformers multiplies by the inverse of a scale: a number in the middle of two codes may get the other one."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    source = FP8_BLOCKS[family](tmp_path / "hf")
    tensors, before = quantized(source, tmp_path, "fp8-block", reporter), quantized_models.load(source / "model.safetensors")
    operation = Fp8Quantize(type("Quantizer", (), {"quantization_config": FineGrainedFP8Config()}))
    linear = [name for name, tensor in before.items() if tensors[name].dtype == ml_dtypes.float8_e4m3fn]
    assert {name.split(".")[-2] for name in linear} >= {"q_proj", "o_proj"}
    assert not [name for name in linear if re.search("norm|embed|lm_head|mlp.gate.weight|block_sparse_moe.gate", name)]
    for name in linear:
        weight, scales = torch.from_numpy(before[name].astype(np.float32)), torch.from_numpy(tensors[f"{name}_scale_inv"])
        blocks = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        assert torch.equal(scales, blocks.abs().amax((1, 3)) / 448)
        codes = torch.from_numpy(tensors[name].view(np.uint8))
        expected = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).reshape(weight.shape)
        assert torch.equal(codes, expected.view(torch.uint8))
        theirs = operation._quantize_one(name, weight)
        assert torch.allclose(scales, theirs[f"{name}_scale_inv"], rtol=3e-7, atol=0)  # they divide twice
        assert (codes.int() - theirs[name].view(torch.uint8).int()).abs().max() <= 1
    assert {name: tensor.tobytes() for name, tensor in before.items() if name not in linear} == {
        name: tensor.tobytes() for name, tensor in tensors.items() if name in before and name not in linear
    }
    overall, worst = errors(notes)
    assert 0.01 < overall <= worst < 0.04


def test_transformers_loads_what_was_quantized(tmp_path):
    """Dequantized, for a machine without a GPU."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    source = FP8_BLOCKS["llama"](tmp_path / "hf")
    tensors = quantized(source, tmp_path, "fp8-block")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=FineGrainedFP8Config(dequantize=True))
    mcore_to_hf(tmp_path / "m", tmp_path / "plain")
    for name, parameter in model.named_parameters():
        scale = tensors.get(f"{name}_scale_inv")
        numbers = tensors[name].astype(np.float32)
        numbers = numbers if scale is None else numbers * np.kron(scale, np.ones((128, 128), np.float32))
        assert np.array_equal(parameter.detach().float().numpy(), numbers.astype(ml_dtypes.bfloat16).astype(np.float32)), name
    assert settings(tmp_path / "out")["modules_to_not_convert"] == ["lm_head"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_was_quantized_is_read_again(tmp_path):
    source = FP8_BLOCKS["mixtral"](tmp_path / "hf")
    quantized(source, tmp_path, "fp8-block")
    hf_to_mcore(tmp_path / "out", tmp_path / "m2", verify=True)
    mcore_to_hf(tmp_path / "m2", tmp_path / "back")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", tmp_path / "back")]
    assert weights[0] == weights[1]


def test_bands_of_rows_give_the_same_codes(tmp_path, monkeypatch):
    """Wherever pieces are cut, scales are of whole blocks."""
    source = save_small("llama", tmp_path / "hf", hidden_size=192, intermediate_size=320)  # ragged
    whole = quantized(source, tmp_path, "fp8-block")
    monkeypatch.setattr("converter.worker.PIECE_BYTES", 5000)
    mcore_to_hf(tmp_path / "m", tmp_path / "cut", quantize="fp8-block", verify=True)
    cut = quantized_models.load(tmp_path / "cut" / "model.safetensors")
    assert {name: tensor.tobytes() for name, tensor in whole.items()} == {name: tensor.tobytes() for name, tensor in cut.items()}


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(("method", "family", "name"), [
    ("fp8-block", "llama", "model.layers.1.mlp.up_proj.weight"),
    ("mxfp4", "gpt_oss", "model.layers.1.mlp.experts.down_proj"),
])  # fmt: skip
def test_numbers_that_no_scale_fits_are_refused_by_name(tmp_path, method, family, name, number):
    source = save_small(family, tmp_path / "hf")
    quantized_models.edit(source, lambda tensors: tensors[name].__setitem__((-1, -1), number))
    with pytest.raises(UserError, match=f"`{re.escape(name)}` holds numbers that are not finite"):
        quantized(source, tmp_path, method)


def test_a_block_of_zeros_stays_zero(tmp_path):
    source = FP8_BLOCKS["llama"](tmp_path / "hf")
    name = "model.layers.0.mlp.up_proj.weight"
    quantized_models.edit(source, lambda tensors: tensors[name].__setitem__(slice(0, 128), 0))
    tensors = quantized(source, tmp_path, "fp8-block")
    assert not tensors[name].view(np.uint8)[:128].any()
    assert (tensors[f"{name}_scale_inv"] != 0).all()


def test_the_source_s_list_of_weights_and_blocks_is_followed(tmp_path):
    """Weights that were trained, of a source that left some modules in bf16."""

    def chosen(name, tensor):
        return quantized_models.is_quantized(name, tensor) and "q_proj" not in name

    source = quantized_models.fp8(FP8_BLOCKS["llama"](tmp_path / "plain"), tmp_path / "hf", block=64, chosen=chosen)
    tensors, before = quantized(source, tmp_path, "fp8-block"), quantized_models.load(source / "model.safetensors")
    kinds = [{name: (tensor.shape, tensor.dtype) for name, tensor in each.items()} for each in (tensors, before)]
    assert kinds[0] == kinds[1]
    assert settings(tmp_path / "out") == settings(source)


def test_mxfp4_experts_are_near_and_transformers_reads_them(tmp_path, notes, reporter):
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    source = save_small("gpt_oss", tmp_path / "hf", intermediate_size=64)
    tensors, before = quantized(source, tmp_path, "mxfp4", reporter), quantized_models.load(source / "model.safetensors")
    experts = [name for name in before if name.endswith(("gate_up_proj", "down_proj"))]
    for name in experts:
        blocks, scales = (torch.from_numpy(tensors[f"{name}_{part}"]) for part in ("blocks", "scales"))
        theirs = _convert_moe_packed_tensors(blocks, scales).float().numpy()
        numbers = before[name].astype(np.float32)
        groups = np.abs(numbers).reshape(numbers.shape[0], -1, 32, numbers.shape[2]).max(axis=2)
        assert np.array_equal(scales.numpy(), np.floor(np.log2(groups)).swapaxes(1, 2) - 2 + 127)
        step = np.repeat(2 ** np.floor(np.log2(groups)), 32, axis=1).reshape(numbers.shape)
        assert np.all(np.abs(theirs - numbers) <= step / 2)  # half of the widest step, or what is cut off above 6
    assert settings(tmp_path / "out")["quant_method"] == "mxfp4"
    overall, worst = errors(notes)
    assert 0.05 < overall <= worst < 0.2
    hf_to_mcore(tmp_path / "out", tmp_path / "m2", verify=True)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"quantize": "mxfp4"}, "`--quantize mxfp4` finds no weights to quantize in a `llama`"),
        ("gpt_oss", {"quantize": "nf4"}, "quantize `nf4` is not one of fp8-block, mxfp4"),
        ("llama", {"quantize": "fp8-block", "dtype": "fp16"}, "`--quantize fp8-block` is for weights in bf16, `--dtype` is fp16"),
    ],
)
def test_what_cannot_be_quantized_is_refused(tmp_path, family, options, message):
    hf_to_mcore(save_small(family, tmp_path / "hf"), tmp_path / "m")
    with pytest.raises(UserError, match=message):
        mcore_to_hf(tmp_path / "m", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("method", "bands"), [("fp8-block", 9), (None, 4)])
def test_a_dry_run_counts_what_each_thread_holds(tmp_path, method, bands):
    source = quantized_models.fp8(FP8_BLOCKS["llama"](tmp_path / "plain"), tmp_path / "hf", block=64)
    hf_to_mcore(source, tmp_path / "m")
    words = ["mcore-to-hf", tmp_path / "m", tmp_path / "out", *(["--quantize", method] if method else [])]
    few, many = (expected_memory(*words, "--workers", workers) for workers in (2, 8))
    assert many - few == pytest.approx(6 * bands << 20, abs=4 << 20)
