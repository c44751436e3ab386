"""A configuration requests the modules that PEFT builds from it; an export writes one for any set of modules."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from converter.adapters import peft_config
from converter.adapters.adapter import Description
from formats.folder import LocalFolder

LAYERS = 12
MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in range(LAYERS)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]
OTHERS = ["lm_head", "model.embed_tokens", "model.layers.1.self_attn", "model.norm"]


def built_by_peft(config):
    return {module for module in [*MODULES, *OTHERS] if check_target_module_exists(config, module)}


@settings(deadline=None)
@given(st.sets(st.sampled_from(MODULES), min_size=1) | st.builds(
    lambda layers, names: {f"model.layers.{layer}.{name}" for layer in layers for name in names},
    st.sets(st.integers(0, LAYERS - 1), min_size=1),
    st.sets(st.sampled_from(["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]), min_size=1),
))  # fmt: skip
def test_peft_builds_exactly_the_modules_that_an_export_has(modules):
    targets = peft_config.choose_targets(sorted(modules), layers=LAYERS)
    document = json.loads(peft_config.encode(Description("lora", dim=4, alpha=8), targets, fan_in_fan_out=False))
    assert built_by_peft(LoraConfig(**document)) == modules


def test_short_names_where_they_say_it_all():
    every = [module for module in MODULES if module.endswith(("q_proj", "up_proj"))]
    assert peft_config.choose_targets(every, layers=LAYERS) == {
        "layers_to_transform": None,
        "target_modules": ["q_proj", "up_proj"],
    }
    some = [module for module in every if ".3." in module or ".11." in module]
    assert peft_config.choose_targets(some, layers=LAYERS) == {
        "layers_to_transform": [3, 11],
        "target_modules": ["q_proj", "up_proj"],
    }
    assert peft_config.choose_targets(some[1:], layers=LAYERS) == {
        "layers_to_transform": None,
        "target_modules": sorted(some[1:]),
    }


ASKED = [
    {"target_modules": ["q_proj", "up_proj"]},
    {"target_modules": ["layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "model.layers.5.mlp.up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
    {"target_modules": r".*layers\.[0-3]\..*_proj"},
    {"target_modules": r"model\.layers\.1"},
    {"target_modules": r".*_proj", "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    {"target_modules": "q_proj|.*up_proj"},
]


def read(tmp_path, **fields):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))
    return peft_config.read(LocalFolder(tmp_path))


@pytest.mark.parametrize("asked", ASKED)
def test_targets_are_those_that_peft_finds(tmp_path, asked):
    ours = read(tmp_path, **asked)
    assert {module for module in [*MODULES, *OTHERS] if ours.targets(module)} == built_by_peft(LoraConfig(**asked))


PATTERNS = [
    "q_proj",
    "layers.1.self_attn.q_proj",
    "^model.layers.1.*",
    r".*\.1\d?\..*",
    "proj",
    "self_attn",
    "up_proj|q_proj",
    ".*",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PATTERNS), unique=True))
def test_patterns_are_matched_as_peft_matches_them(patterns):
    table = {pattern: number for number, pattern in enumerate(patterns, start=100)}
    ours = peft_config.PeftConfig(8, 16, False, False, 0.0, "all-linear", rank_pattern=table, alpha_pattern=table)
    for module in MODULES:
        key = get_pattern_key(list(table), module)
        assert (ours.rank(module), ours.alpha(module)) == (table.get(key, 8), table.get(key, 16))


def test_a_configuration_without_numbers_has_those_of_peft(tmp_path):
    ours, theirs = read(tmp_path, target_modules=["q_proj"]), LoraConfig(target_modules=["q_proj"])
    for name in ("r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout"):
        assert getattr(ours, name) == getattr(theirs, name)
