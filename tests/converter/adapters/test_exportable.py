"""What PEFT could not hold is refused before it is trained."""

from __future__ import annotations

from collections import defaultdict

import pytest

from converter import UserError, families
from converter.adapters.adapter import Description
from converter.adapters.exportable import refuse_unexportable
from converter.adapters.names import adapted_modules
from converter.config import make_model, to_megatron
from tests.converter.family_suite import small_config
from trainer.peft.fused_layers import part_names

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
LATENT = ("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj")


def _check(name, *, trains_mtp=False, changes=None, **description):
    family = families.find(name).as_modules()
    config = small_config(name).to_dict() | (changes or {})
    described = Description(**{"method": "lora", "target_modules": LINEARS} | description)
    refuse_unexportable(family.RULES, make_model(family.CONFIG, config), described, trains_mtp=trains_mtp)


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("llama", {"canonical": True}),
        ("phi3", {}),
        ("phi3", {"canonical": True, "target_modules": ("linear_proj", "linear_fc2")}),
        ("gpt_neox", {"canonical": True, "exclude_modules": ("linear_qkv",)}),
        ("qwen3_moe", {"canonical": True, "target_modules": (*LINEARS, "router")}),
        ("qwen3_moe", {"method": "dora", "target_modules": ("linear_qkv", "linear_proj")}),
        ("deepseek_v3", {"method": "dora", "target_modules": LATENT}),
        ("gpt_oss", {"target_modules": (*LINEARS, "router")}),
        ("gpt_oss", {"method": "dora", "exclude_modules": ("*.experts.*",)}),
        ("gpt_oss", {"canonical": True, "exclude_modules": ("*.experts.linear_fc1",)}),
        ("llama4_text", {"target_modules": (*LINEARS, "router")}),
        ("llama4_text", {"method": "dora", "exclude_modules": ("*.mlp.experts.*",)}),
        ("granitemoe", {}),
        ("dbrx", {"exclude_modules": ("*.experts.*",)}),
    ],
)
def test_what_peft_can_hold_is_not_refused(name, description):
    _check(name, **description)


FAMILIES = [(name, layout) for name in families.names() for layout in families.find(name).LAYOUTS]


@pytest.mark.parametrize(("name", "layout"), FAMILIES, ids=[f"{name}-{layout}" for name, layout in FAMILIES])
def test_separate_adapters_are_refused_exactly_where_an_export_would_not_know_them(name, layout):
    """Of every family, whatever of query, key, value, gate and up is one tensor in its files."""
    family, config = families.find(name, layout).as_modules(), small_config(name).to_dict()
    model = make_model(family.CONFIG, config)
    gated = to_megatron(family.CONFIG, config).get("gated_linear_unit", False)
    known = defaultdict[str, set[str]](set)
    for part in adapted_modules(family.RULES, model, canonical=True):
        known[part.module].add(part.prefix)
    for module in adapted_modules(family.RULES, model, canonical=False):
        last = module.module.rpartition(".")[2]
        if last == "linear_qkv" or (last == "linear_fc1" and gated):
            trained = {f"{module.prefix}.adapter_{part}" for part in part_names(module.module)}
            assert _is_refused(family, model, module.target) == (trained != known[module.module]), module.target


def _is_refused(family, model, target):
    described = Description("lora", canonical=True, target_modules=(target,))
    try:
        refuse_unexportable(family.RULES, model, described, trains_mtp=False)
    except UserError as error:
        assert "`peft.canonical` makes several adapters" in str(error)  # noqa: PT017
        return True
    return False


@pytest.mark.parametrize(
    ("name", "description", "message"),
    [
        ("phi3", {"canonical": True}, r"several adapters of `decoder.layers.0.self_attention.linear_qkv`.*`.*qkv_proj.weight`"),
        ("phi3", {"canonical": True, "target_modules": ("linear_fc1_up",)}, r"several adapters of `.*linear_fc1`.*gate_up_proj"),
        ("gpt_neox", {"canonical": True, "target_modules": ("linear_q",)}, r"one tensor for all, `.*query_key_value.weight`"),
        ("qwen3_moe", {"method": "dora"}, r"targets `decoder.layers.1.mlp.linear_fc1`, for which PEFT has LoRA alone"),
        (
            "qwen3_moe",
            {"method": "dora", "target_modules": ("*.experts.*",)},
            r"`decoder.layers.0.mlp.experts.linear_fc1`, for which",
        ),
        ("qwen3_moe", {"method": "dora", "target_modules": ("router",)}, r"mlp.router`, for which PEFT has LoRA alone"),
        ("deepseek_v3", {"method": "dora", "target_modules": ("*.shared_experts.*",)}, r"shared_experts.linear_fc1`, for which"),
        ("gpt_oss", {"method": "dora"}, r"targets `decoder.layers.0.mlp.experts.linear_fc1`, for which PEFT has LoRA alone"),
        ("gpt_oss", {"method": "dora", "target_modules": ("router",)}, r"mlp.router`, for which PEFT has LoRA alone"),
        ("gpt_oss", {"canonical": True}, r"several adapters of `.*experts.linear_fc1`, but .*`.*gate_up_proj\[0\]`"),
        (
            "glm4",
            {"canonical": True},
            r"several adapters of `.*mlp.linear_fc1`, but this family has one tensor .*`.*gate_up_proj",
        ),
        (
            "afmoe",
            {"canonical": True},
            r"linear_qkv`, but this family has 4 tensors there, not 3: `.*q_proj.weight`, .* and 1 more",
        ),
        (
            "dbrx",
            {},
            r"`decoder.layers.0.mlp.experts.linear_fc1`, and the rows of all experts are one matrix, `.*mlp.w1`, for which",
        ),
        (
            "deepseek_v3",
            {"trains_mtp": True, "changes": {"num_nextn_predict_layers": 1}},
            r"targets `mtp.layers.0.*`, and PEFT has no layers of multi-token prediction",
        ),
    ],
)
def test_what_peft_cannot_hold_is_named(name, description, message):
    with pytest.raises(UserError, match=message):
        _check(name, **description)
