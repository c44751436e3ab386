"""Mixtures of experts whose weights and `config.json` do not fit each other are refused by name."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from converter import UserError, families, hf_to_mcore
from converter.config import to_megatron
from tests.converter.family_suite import save_small, small_config

LACKING = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w2.weight",
    "gpt_oss": "model.layers.0.mlp.router.bias",
    "afmoe": "model.layers.2.mlp.expert_bias",
    "qwen2_moe": "model.layers.0.mlp.shared_expert_gate.weight",
}


@pytest.mark.parametrize("family", LACKING)
def test_an_expert_a_bias_or_a_gate_that_is_missing_is_named(family, tmp_path):
    folder, name = save_small(family, tmp_path / "hf"), LACKING[family]
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as refused:
        hf_to_mcore(folder, tmp_path / "m")
    assert str(refused.value.args[0]) == f"the source lacks `{name}`"


EXPERTS = "model.layers.0.block_sparse_moe.experts"
OTHER_NUMBERS = [
    ("mixtral", {"num_local_experts": 5}, f"the source lacks `{EXPERTS}.4.w1.weight`"),
    ("mixtral", {"num_local_experts": 3}, f"the source holds `{EXPERTS}.3.w1.weight`"),
    ("mixtral", {"num_experts_per_tok": 9}, "`num_experts_per_tok` is 9, and `num_local_experts` only 4"),
    ("gpt_oss", {"num_local_experts": 5}, r"`model.layers.0.mlp.router.weight` has shape \[4, 64\], by `config.json`"),
    ("qwen3_moe", {"num_experts": 8}, "says two things: `num_local_experts` is `4`, `num_experts` is `8`"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "the source lacks `model.layers.0.mlp.gate_proj.weight`"),
    ("qwen3_moe", {"mlp_only_layers": "1"}, "`mlp_only_layers` is `1`, which should be a list of layers"),
]


@pytest.mark.parametrize(("family", "change", "message"), OTHER_NUMBERS)
def test_numbers_of_experts_that_the_weights_do_not_have_are_refused(family, change, message, tmp_path):
    folder = save_small(family, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        hf_to_mcore(folder, tmp_path / "m")


@pytest.mark.parametrize("layers", ["full_attention", "sliding_attention"])
def test_heads_that_are_turned_in_part_in_some_layers_are_refused(layers):
    config = small_config("mellum").to_dict()
    config["rope_parameters"][layers]["partial_rotary_factor"] = 0.5
    with pytest.raises(UserError, match=r"`partial_rotary_factor` is `0.5`, but models of this family turn whole heads"):
        to_megatron(families.find("mellum").CONFIG, config)
