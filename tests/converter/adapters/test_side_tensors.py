"""A merged model has the tensors that an export has, and not the original values that a checkpoint stores beside its weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file

from converter import adapter_to_mcore, families, hf_to_mcore, mcore_to_hf, merge, verify
from converter.adapters.names import Factor, adapted_modules, module_of, peft_name
from converter.config import make_model
from tests.converter.family_suite import save_small
from tests.models import model_tree

TENSORS = "model.safetensors"
OUTPUTS = ("linear_proj", "out_proj")
"""Last names of the modules that end attention, a gated delta net or a Mamba layer."""


def save_adapter(base, folder):
    """An adapter of the outputs of all such layers, in PEFT's files; and how many weights it changes."""
    config = json.loads((base / "config.json").read_text())
    family = families.find(config["model_type"]).as_modules()
    every = adapted_modules(family.RULES, make_model(family.CONFIG, config), canonical=False)
    modules = [module for module in every if module.module.endswith(OUTPUTS)]
    rng, tensors = np.random.default_rng(0), {}
    for module in modules:
        (weight,), (rows,) = module.weights, module.rows
        for factor, shape in ((Factor.A, (2, module.columns)), (Factor.B, (rows, 2))):
            tensors[peft_name(weight, factor)] = rng.standard_normal(shape, np.float32)
    folder.mkdir()
    save_numpy(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = [module_of(weight) for module in modules for weight in module.weights]
    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets}
    described["fan_in_fan_out"] = any(module.transposed for module in modules)
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder, len(targets)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", families.names())
def test_a_merged_model_has_the_tensors_of_an_export_and_the_bytes_of_those_that_no_adapter_changes(tmp_path, family, dtype):
    base = save_small(family, tmp_path / "hf", dtype=dtype)
    hf_to_mcore(base, tmp_path / "m", tp=2, pp=2)
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    adapter, changed = save_adapter(base, tmp_path / "peft")
    merge(tmp_path / "m", adapter, tmp_path / "merged", to="hf")
    merged, plain = load_file(tmp_path / "merged" / TENSORS), load_file(tmp_path / "back" / TENSORS)
    assert merged.keys() == plain.keys()
    assert sum(not merged[name].equal(plain[name]) for name in merged) == changed > 0
    merge(base, adapter, tmp_path / "expected")
    assert model_tree(tmp_path / "merged") == model_tree(tmp_path / "expected")


@pytest.mark.parametrize("family", families.names())
def test_an_adapter_of_either_format_is_merged_into_a_base_of_the_other(tmp_path, family):
    """Its base is recognized: both have one fingerprint."""
    base = save_small(family, tmp_path / "hf", dtype="float32")
    hf_to_mcore(base, tmp_path / "m", tp=2)
    adapter, _ = save_adapter(base, tmp_path / "peft")
    merge(base, adapter, tmp_path / "expected")
    for made_on, other in ((base, tmp_path / "m"), (tmp_path / "m", base)):
        adapter_to_mcore(adapter, tmp_path / "a", base=made_on, overwrite=True)
        merge(other, tmp_path / "a", tmp_path / "merged", to="mcore", tp=2, overwrite=True)
        assert verify(tmp_path / "merged", tmp_path / "expected").same
        mcore_to_hf(tmp_path / "merged", tmp_path / "back", overwrite=True)
        assert model_tree(tmp_path / "back") == model_tree(tmp_path / "expected")
