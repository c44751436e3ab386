"""Quantized weights come back as the same bytes where they are unchanged, and as plain numbers where they are not."""

from __future__ import annotations

import json
import shutil
import signal

import ml_dtypes
import numpy as np
import pytest

from converter import UserError, hf_to_mcore, mcore_to_hf
from converter.dequantization import settings_of
from converter.execution import Reporter
from tests import quantized_models
from tests.converter.family_suite import save_small
from tests.interrupted import PIECE_BYTES, Conversion, journaled
from tests.models import model_tree
from tests.quantized import SCHEMES, quantize

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def plain(model_folder):
    return model_folder("gqa", dtype="bfloat16")


@pytest.fixture(scope="module")
def source(plain, tmp_path_factory):
    """A Llama in FP8."""
    return quantized_models.fp8(plain, tmp_path_factory.mktemp("fp8") / "hf")


@pytest.fixture
def copy(source, tmp_path):
    """The same, free to be changed."""
    return shutil.copytree(source, tmp_path / "hf")


@pytest.fixture
def notes():
    return []


@pytest.fixture
def reporter(notes):
    return Reporter(note=notes.append)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 4, "pp": 2}], ids=str)
def test_unchanged_weights_come_back_as_the_same_bytes(source, tmp_path, layout, notes, reporter):
    hf_to_mcore(source, tmp_path / "m", verify=True, **layout)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True, reporter=reporter)
    assert model_tree(tmp_path / "back") == model_tree(source)
    assert "28 weights are written as they came: FP8 in blocks of 32 x 32" in notes


def packed(name, **how):
    return lambda folder: quantized_models.int4(save_small(name, folder / "plain"), folder / "hf", **how)


OTHERS = {
    "mxfp4": lambda folder: quantized_models.mxfp4(save_small("gpt_oss", folder / "plain", intermediate_size=64), folder / "hf"),
    "int4": packed("qwen3"),
    "int4 with zero points": packed("qwen3", symmetric=False),
}


@pytest.mark.parametrize("scheme", OTHERS)
def test_other_schemes_come_back_as_the_same_bytes(tmp_path, scheme):
    made = OTHERS[scheme](tmp_path)
    hf_to_mcore(made, tmp_path / "m", tp=2, verify=True)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(made)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A small Qwen3 in bf16."""
    return save_small("qwen3", tmp_path_factory.mktemp("qwen") / "hf")


EACH = [scheme for scheme in SCHEMES if scheme != "mxfp4"]
"""Of linear weights, as their publishers write them."""


@pytest.mark.parametrize("scheme", EACH)
def test_each_scheme_comes_back_as_the_same_bytes(qwen, tmp_path, scheme):
    made = quantize(qwen, tmp_path / "hf", scheme)
    hf_to_mcore(made, tmp_path / "m", tp=2, verify=True)
    assert not kept(tmp_path / "m")
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(made)


@pytest.mark.parametrize("scheme", EACH)
def test_scales_of_zero_and_codes_that_are_no_number_come_back_in_each_scheme(qwen, tmp_path, scheme):
    made = quantize(qwen, tmp_path / "hf", scheme)
    codes = GATE + "_packed" * scheme.startswith("int4")

    def change(tensors):
        own = [name for name in tensors if name.startswith(GATE.removesuffix("weight"))]
        (scales,) = (name for name in own if name.endswith(("weight_scale_inv", "weight_scale", "qscale_weight")))
        tensors[scales] = tensors[scales].copy()
        tensors[scales].reshape(-1)[0] = 0  # of ue8m0, 2 to the power of -127
        if tensors[codes].dtype == E4M3:
            tensors[codes].view(np.uint8)[-1, -3:] = [0x7F, 0xFF, 0x80]  # two that are no number, and -0

    quantized_models.edit(made, change)
    hf_to_mcore(made, tmp_path / "m", tp=2, verify=True)
    assert kept(tmp_path / "m") == [f"{codes}.as_stored"]
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(made)


def kept(checkpoint):
    """The names of codes that travel as they were stored."""
    extras = quantized_models.load(checkpoint / "iter_0000000" / "huggingface" / "extras.safetensors")
    return [name for name in extras if name.endswith(".as_stored")]


def test_codes_that_nothing_else_gives_back_travel(copy, tmp_path):
    def change(tensors):
        scales = tensors[GATE.removesuffix(".weight") + quantized_models.SCALES]
        scales[0, 0] = 0
        scales[1, 1] = 1e-38
        tensors[GATE].view(np.uint8)[:2, :2] = [[0x7F, 0xFF], [0x80, 0x11]]  # two that are no number, and -0
        tensors["model.layers.0.mlp.up_proj.input_scale"] = np.ones(1, np.float32)

    quantized_models.edit(copy, change)
    hf_to_mcore(copy, tmp_path / "m", tp=2, verify=True)
    extras = quantized_models.load(tmp_path / "m" / "iter_0000000" / "huggingface" / "extras.safetensors")
    assert [name for name in extras if "scale" not in name] == [f"{GATE}.as_stored"]
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(copy)


def without_record(checkpoint):
    """Take away what says that a checkpoint is as it was imported, as training leaves it."""
    (checkpoint / "iter_0000000" / "conversion.json").unlink()
    (checkpoint / "iter_0000000" / "integrity.json").unlink()


def trained(source, checkpoint, work, *, change):
    """Write the checkpoint that training makes of one of a quantized source: other weights, and the same side files."""
    mcore_to_hf(checkpoint, work / "numbers", dtype="bf16")
    quantized_models.edit(work / "numbers", change)
    hf_to_mcore(work / "numbers", work / "trained", tp=2)
    target = work / "trained" / "iter_0000000" / "huggingface"
    shutil.rmtree(target)
    shutil.copytree(checkpoint / "iter_0000000" / "huggingface", target)
    without_record(work / "trained")
    return work / "trained"


def one_bit(tensors):
    tensors[GATE].view(np.uint16)[-1, -1] ^= 1


def test_without_a_record_every_weight_is_compared(source, tmp_path, notes, reporter):
    hf_to_mcore(source, tmp_path / "m")
    same = trained(source, tmp_path / "m", tmp_path, change=lambda tensors: None)
    mcore_to_hf(same, tmp_path / "back", reporter=reporter)
    assert model_tree(tmp_path / "back") == model_tree(source)


def test_trained_weights_come_back_as_plain_numbers(source, tmp_path, notes, reporter):
    hf_to_mcore(source, tmp_path / "m")
    changed = trained(source, tmp_path / "m", tmp_path, change=one_bit)
    mcore_to_hf(changed, tmp_path / "back", verify=True, reporter=reporter)
    tensors, numbers = (quantized_models.load(tmp_path / name / "model.safetensors") for name in ("back", "numbers"))
    assert {name: tensor.tobytes() for name, tensor in tensors.items()} == {
        name: tensor.tobytes() for name, tensor in numbers.items()
    }
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert after == {name: value for name, value in before.items() if name != "quantization_config"}
    assert (
        "weights that came quantized are written as plain numbers: "
        f"`{GATE}` is not what it was when its scales were stored" in notes
    )
    assert "`config.json` changed: without `quantization_config`, for the weights are not quantized" in notes


def test_what_text_config_says_of_quantization_is_left_out_of_plain_numbers(tmp_path, notes, reporter):
    source = quantized_models.fp8(save_small("gemma3", tmp_path / "plain"), tmp_path / "hf")
    plain = json.loads((source / "config.json").read_text())
    settings = plain.pop("quantization_config")
    inside = {**plain, "text_config": {**plain["text_config"], "quantization_config": settings}}
    (source / "config.json").write_text(json.dumps(inside, indent=2) + "\n")
    hf_to_mcore(source, tmp_path / "m")
    mcore_to_hf(tmp_path / "m", tmp_path / "same")
    assert model_tree(tmp_path / "same") == model_tree(source)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", dtype="bf16", reporter=reporter)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == plain
    assert "`config.json` changed: without `text_config.quantization_config`, for the weights are not quantized" in notes
    mcore_to_hf(tmp_path / "m", tmp_path / "anew", quantize="fp8-block")
    assert settings_of(json.loads((tmp_path / "anew" / "config.json").read_text())) == settings


def test_a_record_that_is_wrong_is_an_error_and_never_a_mixture(source, tmp_path):
    hf_to_mcore(source, tmp_path / "m", tp=2)
    changed = trained(source, tmp_path / "m", tmp_path, change=one_bit)
    shutil.copy(tmp_path / "m" / "iter_0000000" / "conversion.json", changed / "iter_0000000")
    with pytest.raises(UserError, match=f"`{GATE}` is not what it was when its scales were stored\n\nhint: "):
        mcore_to_hf(changed, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    mcore_to_hf(changed, tmp_path / "back", dtype="bf16")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


@pytest.mark.parametrize("options", [{"dtype": "fp32"}, {"dtype": "bf16"}], ids=str)
def test_an_import_in_another_dtype_comes_back_as_plain_numbers(source, tmp_path, notes, reporter, options):
    hf_to_mcore(source, tmp_path / "m", verify=True, **options)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", reporter=reporter)
    dtypes = {tensor.dtype for tensor in quantized_models.load(tmp_path / "back" / "model.safetensors").values()}
    if options["dtype"] == "fp32":
        assert dtypes == {np.dtype(np.float32)}
        assert any("written as plain numbers" in text and "was cast" in text for text in notes)
    else:
        assert model_tree(tmp_path / "back") == model_tree(source)


def test_a_checkpoint_without_its_scales_comes_back_as_plain_numbers(source, tmp_path, notes, reporter):
    hf_to_mcore(source, tmp_path / "m")
    (tmp_path / "m" / "iter_0000000" / "huggingface" / "extras.safetensors").unlink()
    mcore_to_hf(tmp_path / "m", tmp_path / "back", reporter=reporter)
    assert E4M3 not in {tensor.dtype for tensor in quantized_models.load(tmp_path / "back" / "model.safetensors").values()}
    assert any("is missing" in text for text in notes)


LAYOUTS = ({}, {"tp": 2, "pp": 2, "vpp": 2}, {"tp": 2, "pp": 2, "pp_layout": "3,1"})


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """A DeepSeek-V3 in FP8, with a layer of multi-token prediction."""
    folder = tmp_path_factory.mktemp("deepseek")
    return quantized_models.fp8(quantized_models.deepseek_v3(folder / "plain"), folder / "hf")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_deepseek_v3_in_fp8_killed_and_resumed_comes_back_as_the_same_bytes(deepseek, tmp_path, monkeypatch, layout):
    options = [text for name, value in layout.items() for text in (f"--{name.replace('_', '-')}", value)]
    kill(tmp_path / "log", "hf-to-mcore", deepseek, tmp_path / "m", *options)
    monkeypatch.setattr("converter.worker.PIECE_BYTES", PIECE_BYTES)
    assert hf_to_mcore(deepseek, tmp_path / "m", resume=True, verify=True, **layout).reused_bytes > 0
    kill(tmp_path / "log-back", "mcore-to-hf", tmp_path / "m", tmp_path / "back")
    assert mcore_to_hf(tmp_path / "m", tmp_path / "back", resume=True, verify=True).reused_bytes > 0
    assert model_tree(tmp_path / "back") == model_tree(deepseek)


def kill(log, command, source, target, *options):
    """Begin a conversion, and kill it with some pieces done."""
    process = Conversion(command, source, target, *options, log=log, pause=0, hold={"write": 60})
    process.until("write", 60)
    assert process.stop()[0] == -signal.SIGKILL
    assert journaled(target)


@pytest.mark.parametrize("layout", [{"ep": 2}, {"tp": 2, "ep": 4, "etp": 1}], ids=str)
def test_experts_in_fp8_come_back_as_the_same_bytes(deepseek, tmp_path, layout):
    hf_to_mcore(deepseek, tmp_path / "m", **layout)
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert model_tree(tmp_path / "back") == model_tree(deepseek)
