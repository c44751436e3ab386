"""Layout `hybrid`: a GPT layer as two layers of a HybridModel, and the way back to the same bytes."""

from __future__ import annotations

import json

import pytest
import yaml

from converter import UserError, families, hf_to_mcore, mcore_to_hf, verify_checkpoints
from converter.config import make_model, to_huggingface, to_megatron
from converter.hybrid import GPT, HYBRID, in_gpt, in_hybrid, with_stages
from converter.rules import in_order
from formats.folder import LocalFolder
from formats.torch_dist import TorchDistReader
from tests.converter.family_suite import save_small, small_config
from tests.models import model_tree

ITERATION = "iter_0000000"
GPT_FAMILIES = [name for name in families.names() if GPT in families.find(name).LAYOUTS]


def model_section(folder):
    return yaml.safe_load((folder / ITERATION / "run_config.yaml").read_text())["model"]


def ranks_of(folder, name):
    """The files that hold a tensor."""
    return {chunk.location.file for chunk in TorchDistReader(LocalFolder(folder / ITERATION)).chunks(name)}


@pytest.mark.parametrize("family", GPT_FAMILIES)
def test_each_name_of_a_layout_is_made_from_the_other_s(family):
    gpt, hybrid = families.find(family, GPT), families.find(family, HYBRID)
    config = small_config(family, **({"num_nextn_predict_layers": 2} if family == "deepseek_v3" else {})).to_dict()
    pairs = zip(
        in_order(gpt.RULES, make_model(gpt.CONFIG, config)),
        in_order(hybrid.RULES, make_model(hybrid.CONFIG, config)),
        strict=True,
    )
    for (rule, indices), (other, others) in pairs:
        name, in_other = rule.names(indices)[0], other.names(others)[0]
        assert (in_hybrid(name), in_gpt(in_other)) == (in_other, name)
        assert rule.names(indices)[1] == other.names(others)[1]


@pytest.mark.parametrize("family", GPT_FAMILIES)
def test_the_fields_of_a_hybrid_model_come_back_as_those_of_the_gpt_model(family):
    config = small_config(family).to_dict()
    gpt, hybrid = families.find(family, GPT), families.find(family, HYBRID)
    fields = to_megatron(hybrid.CONFIG, config)
    assert fields["num_layers"] == 2 * to_megatron(gpt.CONFIG, config)["num_layers"] == len(fields["hybrid_layer_pattern"])
    assert to_megatron(gpt.CONFIG, to_huggingface(hybrid.CONFIG, fields)) == to_megatron(gpt.CONFIG, config)


PATTERNS = {
    "llama": "*-*-*-*-",
    "mixtral": "*E*E*E*E",
    "deepseek_v3": "+-+E+E+E",
    "gpt_oss": "*E*E*E*E",
}


@pytest.mark.parametrize("family", PATTERNS)
def test_gpt_to_hybrid_to_gpt_gives_the_same_bytes(family, tmp_path):
    source = save_small(family, tmp_path / "hf")
    hf_to_mcore(source, tmp_path / "gpt", tp=2)
    mcore_to_hf(tmp_path / "gpt", tmp_path / "from gpt")
    hf_to_mcore(tmp_path / "from gpt", tmp_path / "hybrid", layout="hybrid", tp=2, pp=2, pp_layout=[3, 5], verify=True)
    mcore_to_hf(tmp_path / "hybrid", tmp_path / "from hybrid")
    assert model_tree(tmp_path / "from hybrid") == model_tree(source)
    assert model_section(tmp_path / "hybrid")["hybrid_layer_pattern"] == with_stages(PATTERNS[family], [3, 5])
    assert verify_checkpoints(tmp_path / "gpt", tmp_path / "hybrid").same


def test_layers_of_stages_are_those_of_the_hybrid_model(tmp_path):
    source = save_small("llama", tmp_path / "hf")
    hf_to_mcore(source, tmp_path / "m", layout="hybrid", pp=2, vpp=2, pp_layout=[3, 1, 2, 2])
    qkv = [ranks_of(tmp_path / "m", f"decoder.layers.{layer}.self_attention.linear_qkv.weight") for layer in (0, 2, 4, 6)]
    fc2 = [ranks_of(tmp_path / "m", f"decoder.layers.{layer}.mlp.linear_fc2.weight") for layer in (1, 3, 5, 7)]
    first, last = {"__0_0.distcp"}, {"__1_0.distcp"}
    assert (qkv, fc2) == ([first, first, first, last], [first, last, first, last])
    assert ranks_of(tmp_path / "m", "embedding.word_embeddings.weight") == first
    assert ranks_of(tmp_path / "m", "decoder.final_norm.weight") == ranks_of(tmp_path / "m", "output_layer.weight") == last
    assert model_section(tmp_path / "m")["hybrid_layer_pattern"] == "*-*|-|*-|*-"


def test_a_checkpoint_says_its_layout(tmp_path):
    source = save_small("llama", tmp_path / "hf")
    for layout in (GPT, HYBRID):
        hf_to_mcore(source, tmp_path / layout, layout=layout)
        record = json.loads((tmp_path / layout / ITERATION / "conversion.json").read_text())
        assert record["options"]["layout"] == layout
        assert bool(model_section(tmp_path / layout).get("is_hybrid_model")) == (layout == HYBRID)


def test_a_layout_of_another_name_is_refused(tmp_path):
    with pytest.raises(UserError, match="layout `mamba` is not one of gpt, hybrid"):
        hf_to_mcore(save_small("llama", tmp_path / "hf"), tmp_path / "m", layout="mamba")
