"""A quantized model gives the Megatron checkpoint of what it means, and a damaged one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import Reporter, UserError, hf_to_mcore, mcore_to_hf
from converter.adapters.fingerprint import fingerprint
from converter.dequantization import dequantized
from formats.dcp_index import METADATA
from formats.folder import LocalFolder
from formats.huggingface import HuggingFaceReader
from formats.quantized.reader import DequantizedReader
from tests.programs import expected_memory
from tests.quantized import FILE, SCHEMES, change, describe, plain_of, quantize

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "llama": {**SIZES, **HEADS},
    "mixtral": {**SIZES, **HEADS, **EXPERTS},
    "gpt_oss": {**SIZES, **HEADS, **EXPERTS, "layer_types": ["full_attention"] * 2},
}


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A tiny model in bf16, by its family."""
    known = {}

    def make(family):
        if family not in known:
            from transformers import AutoConfig, AutoModelForCausalLM

            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **MODELS[family]), dtype=torch.bfloat16)
            known[family] = tmp_path_factory.mktemp(family) / "hf"
            model.save_pretrained(known[family])
        return known[family]

    return make


@pytest.fixture
def source(plain, tmp_path):
    """A Llama in FP8 blocks."""
    return quantize(plain("llama"), tmp_path / "quantized", "blocks")


def weights(checkpoint):
    """The bytes of a checkpoint's tensors, and its index."""
    return {path.name: path.read_bytes() for path in checkpoint.rglob("*") if path.suffix == ".distcp" or path.name == METADATA}


def experts(name):
    return "experts." in name


CASES = [("llama", scheme) for scheme in SCHEMES if scheme != "mxfp4"]
CASES += [("mixtral", "blocks"), ("mixtral", "int4"), ("gpt_oss", "mxfp4")]


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_the_megatron_checkpoint_is_that_of_the_plain_model(plain, tmp_path, family, scheme):
    layout = {"tp": 2, "ep": 2} if family != "llama" else {"tp": 2, "pp": 2}
    quantized = quantize(plain(family), tmp_path / "q", scheme, only=experts if family != "llama" else lambda _: True)
    notes = []
    hf_to_mcore(quantized, tmp_path / "m", reporter=Reporter(notes.append), verify=True, **layout)
    hf_to_mcore(plain_of(quantized), tmp_path / "expected", **layout)
    assert weights(tmp_path / "m") == weights(tmp_path / "expected")
    assert "weights are dequantized to bf16" in notes[0]
    carried = json.loads(next((tmp_path / "m").rglob("huggingface/files/config.json")).read_text())
    assert carried["quantization_config"] == SCHEMES[scheme][1]


@pytest.mark.parametrize(("family", "scheme", "options"), [
    ("llama", "blocks", "FineGrainedFP8Config"), ("gpt_oss", "mxfp4", "Mxfp4Config"),
])  # fmt: skip
def test_the_plain_model_is_the_one_that_transformers_loads(plain, tmp_path, family, scheme, options):
    import transformers

    quantized = quantize(plain(family), tmp_path / "q", scheme, only=experts if family != "llama" else lambda _: True)
    wanted = getattr(transformers, options)(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(quantized, quantization_config=wanted).state_dict()
    ours = load_file(plain_of(quantized) / FILE)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_cast_comes_after(source, tmp_path, dtype):
    hf_to_mcore(source, tmp_path / "m", dtype=dtype)
    hf_to_mcore(plain_of(source), tmp_path / "expected", dtype=dtype)
    assert weights(tmp_path / "m") == weights(tmp_path / "expected")


def test_a_model_of_one_fp16_scale_is_fp16(plain, tmp_path):
    source = quantize(plain("llama"), tmp_path / "q", "rows")
    stored = load_file(source / FILE)
    halves = {name: tensor.half() if tensor.dtype != torch.float8_e4m3fn else tensor for name, tensor in stored.items()}
    save_file(halves, source / FILE)
    hf_to_mcore(source, tmp_path / "m")
    meant = {
        name: (tensor.float() * halves[f"{name}_scale"].float()).half() if f"{name}_scale" in halves else tensor
        for name, tensor in halves.items()
        if not name.endswith("_scale")
    }
    save_file(meant, plain_of(source) / FILE)
    hf_to_mcore(plain_of(source), tmp_path / "expected")
    assert weights(tmp_path / "m") == weights(tmp_path / "expected")


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_the_text_model_of_another_says_it(plain, tmp_path, field):
    """Models with towers may describe the quantization of their text model in `text_config`."""
    source = quantize(plain("llama"), tmp_path / "q", "blocks")
    config = json.loads((source / "config.json").read_text())
    inside = {"text_config": {field: config.pop("quantization_config")}}
    assert isinstance(dequantized(HuggingFaceReader(LocalFolder(source)), inside), DequantizedReader)


def test_the_memory_of_decoding_is_estimated(source, tmp_path):
    plain, quantized = (expected_memory("hf-to-mcore", folder, tmp_path / "m") for folder in (plain_of(source), source))
    assert quantized - plain == pytest.approx(32 << 20, abs=4 << 20)


def test_an_export_gives_the_plain_weights(source, tmp_path):
    hf_to_mcore(source, tmp_path / "m")
    mcore_to_hf(tmp_path / "m", tmp_path / "back", dtype="bf16")
    ours, expected = load_file(tmp_path / "back" / FILE), load_file(plain_of(source) / FILE)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_the_fingerprint_is_that_of_the_plain_model(source, tmp_path):
    hf_to_mcore(source, tmp_path / "m")
    assert fingerprint(source) == fingerprint(plain_of(source)) == fingerprint(tmp_path / "m")


SCALE = "model.layers.0.mlp.up_proj.weight_scale_inv"
WEIGHT = "model.layers.0.mlp.up_proj.weight"
ANOTHER = "hint: either the weights or `config.json` are of another model, or a file was not fetched"


def problem(source, tmp_path):
    with pytest.raises(UserError) as error:
        hf_to_mcore(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    return str(error.value)


def test_missing_scales_are_named(source, tmp_path):
    change(source, **{SCALE: None})
    assert problem(source, tmp_path) == f"`{WEIGHT}` is fp8_e4m3 and its `{SCALE}` is missing\n\n{ANOTHER}"


def test_scales_of_another_grid_are_named_with_both_shapes(source, tmp_path):
    describe(source, weight_block_size=[128, 128])
    assert problem(source, tmp_path).startswith(
        "`model.layers.0.mlp.down_proj.weight_scale_inv` has shape [2, 3], which is not that of blocks of 128 x 128 of "
        "`model.layers.0.mlp.down_proj.weight`, [64, 96]"
    )


def test_a_grid_where_one_scale_is_meant_is_refused(source, tmp_path):
    describe(source, weight_block_size=None)
    assert "which is not that of one for the tensor or one for each row of" in problem(source, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_found_on_the_way(source, tmp_path, value):
    change(source, **{SCALE: torch.tensor([[1, 1], [1, value], [1, 1.0]])})
    assert problem(source, tmp_path).startswith(f"`{SCALE}` holds scales that are not finite\n\nhint: the file is damaged")


def test_scales_of_whole_numbers_are_refused(source, tmp_path):
    change(source, **{SCALE: torch.ones(3, 2, dtype=torch.int32)})
    assert problem(source, tmp_path).startswith(f"`{SCALE}` is int32, and scales are fp32, bf16, fp16, uint8, fp8_e8m0")


def test_scales_of_no_weight_are_refused(source, tmp_path):
    more = {"model.norm.weight_scale_inv": torch.ones(1, 1)}
    save_file({**load_file(source / FILE), **more}, source / FILE)
    assert problem(source, tmp_path) == f"`model.norm.weight_scale_inv` belongs to no quantized weight\n\n{ANOTHER}"


def test_scales_of_a_plain_weight_are_refused(source, tmp_path):
    change(source, **{"0.mlp.up_proj.weight": torch.ones(96, 64, dtype=torch.bfloat16)})
    assert problem(source, tmp_path).startswith(f"`{SCALE}` belongs to no quantized weight")


def test_a_second_scale_of_a_weight_is_refused(source, tmp_path):
    more = {f"{WEIGHT}_scale": torch.ones(1)}
    save_file({**load_file(source / FILE), **more}, source / FILE)
    assert problem(source, tmp_path).startswith(f"`{WEIGHT}_scale` belongs to no quantized weight")


@pytest.mark.parametrize("entry", ["model.layers.0.mlp", "up_proj", "mlp.up_proj", "model.layers.0.mlp.up_proj"])
def test_a_quantized_weight_that_is_listed_as_plain_is_refused(source, tmp_path, entry):
    describe(source, modules_to_not_convert=[entry, "re:.*"])
    assert f"is quantized, but `quantization_config` lists `{entry}` as not quantized" in problem(source, tmp_path)


def test_names_that_only_begin_alike_are_not_listed(source, tmp_path):
    describe(source, modules_to_not_convert=["model.layers.0.mlp.up", "proj", "lm_head", 7])
    hf_to_mcore(source, tmp_path / "m")


@pytest.mark.parametrize("value", ["128", [128], [128, 0], [128, -1], [1.5, 2], {"a": 1}])
def test_a_block_size_that_is_none_is_refused(source, tmp_path, value):
    describe(source, weight_block_size=value)
    assert problem(source, tmp_path).startswith("`weight_block_size` in `quantization_config` is `")


@pytest.mark.parametrize("value", [0, "16", None, True])
def test_a_group_size_that_is_none_is_refused(plain, tmp_path, value):
    source = quantize(plain("llama"), tmp_path / "q", "int4")
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": value}
    describe(source, config_groups={"group_0": {"weights": weights}})
    assert problem(source, tmp_path).startswith("`group_size` in `quantization_config` is `")


def test_int4_with_scales_of_other_groups_is_refused(plain, tmp_path):
    source = quantize(plain("llama"), tmp_path / "q", "int4")
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    describe(source, config_groups={"group_0": {"weights": weights}})
    assert "which is not that of groups of 32 columns of" in problem(source, tmp_path)


def test_int4_without_zero_points_is_refused_where_they_are_said_to_be(plain, tmp_path):
    source = quantize(plain("llama"), tmp_path / "q", "int4")
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False}
    describe(source, config_groups={"group_0": {"weights": weights}})
    assert "weight_zero_point` is missing" in problem(source, tmp_path)


def test_a_stored_shape_of_another_weight_is_found_on_the_way(plain, tmp_path):
    source = quantize(plain("llama"), tmp_path / "q", "int4")
    change(source, **{"0.mlp.up_proj.weight_shape": torch.tensor([96, 63])})
    assert "weight_shape` holds [96, 63], but codes and scales are of a weight of [96, 64]" in problem(source, tmp_path)


def test_groups_of_different_grids_are_refused(plain, tmp_path):
    source = quantize(plain("llama"), tmp_path / "q", "int4")
    groups = {
        str(size): {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size}} for size in (16, 32)
    }
    describe(source, config_groups=groups)
    assert "has groups of int weights with different grids of scales" in problem(source, tmp_path)


@pytest.mark.parametrize("weights", [{"num_bits": 8, "type": "int"}, {"num_bits": 4, "type": "float"}, {"num_bits": "4"}, None])
def test_kinds_of_compressed_tensors_that_are_not_read_are_refused_by_name(plain, tmp_path, weights):
    source = quantize(plain("llama"), tmp_path / "q", "int4")
    describe(source, config_groups={"group_0": {"weights": weights}})
    assert f"`{source}` is quantized (compressed-tensors): it holds `" in problem(source, tmp_path)


@pytest.mark.parametrize(("name", "value", "shown"), [
    ("gate_up_proj_scales", torch.ones(4, 192, 1, dtype=torch.uint8), "is uint8 of shape [4, 192, 1]"),
    ("gate_up_proj_scales", torch.ones(4, 192, 2, dtype=torch.float32), "is fp32 of shape [4, 192, 2]"),
    ("gate_up_proj_blocks", torch.ones(4, 192, 2, 8, dtype=torch.uint8), "is uint8 of shape [4, 192, 2, 8]"),
    ("gate_up_proj_scales", None, "_scales` is missing"),
])  # fmt: skip
def test_mxfp4_of_another_grid_is_refused(plain, tmp_path, name, value, shown):
    source = quantize(plain("gpt_oss"), tmp_path / "q", "mxfp4", only=experts)
    change(source, **{f"layers.0.mlp.experts.{name}": value})
    assert shown in problem(source, tmp_path)


def test_weights_that_are_quantized_unsaid_are_refused_with_what_to_do(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    message = problem(source, tmp_path)
    assert message.startswith(f"`{source}` is quantized (FP8 with a scale for each block): it holds `")
    assert "hint: `config.json` does not say so: with the `quantization_config` that the model was published with" in message


def test_a_killed_run_is_resumed(source, tmp_path, monkeypatch):
    read, left = DequantizedReader.read, [8]

    def fail(self, *arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        read(self, *arguments)

    monkeypatch.setattr(DequantizedReader, "read", fail)
    with pytest.raises(KeyboardInterrupt):
        hf_to_mcore(source, tmp_path / "m", workers=1)
    monkeypatch.setattr(DequantizedReader, "read", read)
    hf_to_mcore(source, tmp_path / "m", resume=True)
    hf_to_mcore(plain_of(source), tmp_path / "expected")
    assert weights(tmp_path / "m") == weights(tmp_path / "expected")


GOLDEN = Path(__file__).parents[1] / "golden" / "compressed_tensors.safetensors"
CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}
GROUPS = {
    "int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
    "int4_zero_points": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    "fp8_rows": CHANNEL,
    "fp8_tensor": {**CHANNEL, "strategy": "tensor"},
    "fp8_blocks": {**CHANNEL, "strategy": "block", "block_structure": [16, 16]},
}


@pytest.mark.parametrize("kind", GROUPS)
def test_what_compressed_tensors_wrote_is_read_as_it_reads_it(tmp_path, kind):
    held = {name.removeprefix(f"{kind}."): tensor for name, tensor in load_file(GOLDEN).items() if name.startswith(f"{kind}.")}
    meant = held.pop("meant")
    save_file({f"m.{name}": tensor for name, tensor in held.items()}, tmp_path / FILE)
    described = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": GROUPS[kind]}}}
    reader = dequantized(HuggingFaceReader(LocalFolder(tmp_path)), {"quantization_config": described})
    assert list(reader.specs) == ["m.weight"]
    out = np.empty(tuple(meant.shape), reader.specs["m.weight"].dtype)
    reader.read("m.weight", reader.specs["m.weight"].full_region, out)
    assert np.array_equal(out.view("uint16"), meant.view(torch.uint16).numpy())
