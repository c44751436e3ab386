"""Experts and routers that are not whole, or that nothing can choose from: refused by name, or carried as they are."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import UserError, families, hf_to_mcore, mcore_to_hf
from converter.config import to_huggingface, to_megatron
from formats.folder import LocalFolder
from formats.torch_dist import TorchDistReader
from tests.converter.family_suite import save_small, small_config
from tests.models import model_tree

BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small DeepSeek-V3 in bf16, whose router and its bias transformers keeps in fp32."""
    return save_small("deepseek_v3", tmp_path_factory.mktemp("experts") / "hf")


def changed(saved, folder, change):
    """The same model with other tensors."""
    folder.mkdir()
    (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "name",
    [BIAS, "model.layers.3.mlp.experts.5.down_proj.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"],
)
def test_what_a_mixture_lacks_is_named(saved, tmp_path, name):
    folder = changed(saved, tmp_path / "hf", lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"the source lacks `{name}`"):
        hf_to_mcore(folder, tmp_path / "m")


def test_an_expert_too_many_is_named(saved, tmp_path):
    extra = "model.layers.1.mlp.experts.8.up_proj.weight"
    folder = changed(saved, tmp_path / "hf", lambda tensors: tensors.update({extra: torch.ones(48, 64)}))
    with pytest.raises(UserError, match=f"the source holds `{extra}`, for which this family has no place"):
        hf_to_mcore(folder, tmp_path / "m")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_router_s_bias_is_fp32_in_megatron_and_what_it_was_afterwards(saved, tmp_path, dtype):
    def cast(tensors):
        tensors |= {
            name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items() if name.endswith("correction_bias")
        }

    folder = changed(saved, tmp_path / "hf", cast)
    hf_to_mcore(folder, tmp_path / "m", dtype="bf16")
    specs = TorchDistReader(LocalFolder(tmp_path / "m" / "iter_0000000")).specs
    assert specs["decoder.layers.2.mlp.router.expert_bias"].dtype.name == "float32"
    assert specs["decoder.layers.2.mlp.router.weight"].dtype.name == "bfloat16"
    for options in ({}, {"dtype": "bf16"}):
        mcore_to_hf(tmp_path / "m", tmp_path / f"back{len(options)}", **options)
        back = load_file(tmp_path / f"back{len(options)}" / "model.safetensors")[BIAS]
        assert torch.equal(back, load_file(folder / "model.safetensors")[BIAS])


def test_a_bias_comes_back_to_the_bit_in_either_dtype(saved, tmp_path):
    folder = changed(saved, tmp_path / "hf", lambda tensors: tensors.update({BIAS: tensors[BIAS].bfloat16()}))
    hf_to_mcore(folder, tmp_path / "m", verify=True)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(folder)


GROUPS = [
    ({"n_group": 3}, "8 experts cannot be divided evenly into 3 groups"),
    ({"n_group": 8}, "a group of 1 experts is rated by its 2 best"),
    ({"topk_group": 5}, "5 groups are chosen of 4"),
    ({"topk_group": 1}, "3 experts are chosen in 1 groups of 2"),
    ({"topk_group": None}, "`topk_group`: `None`, which should be a whole number above 0"),
]


@pytest.mark.parametrize(("fields", "message"), GROUPS, ids=str)
def test_groups_that_no_router_chooses_from_are_refused(fields, message):
    config = {**small_config("deepseek_v3").to_dict(), **fields}
    with pytest.raises(UserError, match=message):
        to_megatron(families.find("deepseek_v3").CONFIG, config)


def test_groups_that_are_rated_otherwise_are_refused_on_the_way_back():
    fields = to_megatron(families.find("deepseek_v3").CONFIG, small_config("deepseek_v3").to_dict())
    with pytest.raises(UserError, match="a group of experts is rated by its `1` best, and in this family by its `2` best"):
        to_huggingface(families.find("deepseek_v3").CONFIG, {**fields, "moe_router_group_score": None})


@pytest.mark.parametrize(("family", "fields", "message"), [
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "`topk_method` is `noaux_tc`"),
    ("deepseek_v3", {"topk_method": "greedy"}, "`topk_method` is `greedy`; only `noaux_tc`"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "`moe_layer_freq` is `2`; only `1`"),
    ("glm4_moe_lite", {"mlp_layer_types": ["dense", "sparse"]}, "should have `dense` or `sparse` for each layer"),
    ("glm4_moe_lite", {"first_k_dense_replace": 3}, "`config.json` says two things"),
])  # fmt: skip
def test_what_the_family_s_models_do_not_do_is_refused_by_name(family, fields, message):
    with pytest.raises(UserError, match=message):
        to_megatron(families.find(family).CONFIG, {**small_config(family).to_dict(), **fields})


def test_dense_layers_after_sparse_ones_are_no_deepseek():
    fields = to_megatron(families.find("deepseek_v3").CONFIG, small_config("deepseek_v3").to_dict())
    with pytest.raises(UserError, match="dense layers follow layers with experts"):
        to_huggingface(families.find("deepseek_v3").CONFIG, {**fields, "moe_layer_freq": [1, 0, 1, 1]})


def test_the_numbers_of_yarn_mean_the_same_to_transformers_on_the_way_back():
    family = families.find("deepseek_v3")
    config = small_config("deepseek_v3").to_dict()
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 16}
    for more in ({}, {"mscale": 0.7}, {"mscale_all_dim": 0.7}, {"mscale": 0.7, "mscale_all_dim": 1.0}, {"attention_factor": 1.2},
                 {"attention_factor": 0.9, "mscale_all_dim": 1.0}):  # fmt: skip
        fields = to_megatron(family.CONFIG, {**config, "rope_parameters": {**yarn, **more}})
        assert (fields["rope_type"], fields["position_embedding_type"]) == ("yarn", "rope")
        assert _factors(yarn | more) == pytest.approx(_megatron_core_s(fields))
        back = to_huggingface(family.CONFIG, fields)
        written = {**back["rope_scaling"], "rope_theta": back["rope_theta"]}
        assert _factors(written) == pytest.approx(_factors(yarn | more))
        again = to_megatron(family.CONFIG, {**config, **back, "rope_parameters": None})
        assert again.pop("mscale") == pytest.approx(fields.pop("mscale"))
        assert again == fields


def _factors(numbers):
    """What transformers multiplies positions, and scores, by."""
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    config = DeepseekV3Config(rope_parameters=dict(numbers))
    return ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[1], yarn_apply_mscale(config.rope_parameters, 1.0)


def _megatron_core_s(fields):
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor, _yarn_get_mscale

    scores = _yarn_get_mscale(fields["rotary_scaling_factor"], fields["mscale_all_dim"]) ** 2
    return _yarn_get_concentration_factor(fields["rotary_scaling_factor"], fields["mscale"], fields["mscale_all_dim"]), scores
