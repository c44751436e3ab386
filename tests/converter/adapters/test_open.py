"""The changes of an open adapter equal PEFT's, in both formats."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from converter.adapters.convert import adapter_to_mcore
from converter.adapters.merge import open_adapter
from converter.sources import open_source
from tests.converter.adapters.made import deltas, with_adapter

PATTERNS = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 2, "^model.layers.0.mlp.*": 3, "down_proj": 6},
    "alpha_pattern": {"q_proj": 3, r"model\.layers\.[23]\.mlp\.up_proj": 20},
}
KINDS = [{}, {"use_rslora": True}, PATTERNS, {**PATTERNS, "use_rslora": True}, {"use_dora": True, "dtype": "bfloat16"}]


def check(path, adapted):
    expected = deltas(adapted)
    with closing(open_adapter(open_source(path))) as adapter:
        assert adapter.parts.keys() == set(expected)
        for name in adapter.parts:
            delta = adapter.read_delta(name)
            np.testing.assert_allclose(delta.scale * (delta.b @ delta.a), expected[name].detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_deltas_of_a_peft_folder(peft_folder, base, kind):
    check(peft_folder(**kind), with_adapter(base, peft_folder(**kind)))


@pytest.mark.parametrize("canonical", [True, False])
def test_deltas_of_a_checkpoint(peft_folder, base, tmp_path, canonical):
    folder = peft_folder(equal_a=True, use_rslora=True)
    adapter_to_mcore(folder, tmp_path / "m", base=base, canonical=canonical)
    check(tmp_path / "m", with_adapter(base, folder))


@pytest.mark.parametrize("canonical", [True, False])
def test_magnitudes(peft_folder, base, tmp_path, canonical):
    folder = peft_folder(equal_a=True, use_dora=True)
    adapter_to_mcore(folder, tmp_path / "m", base=base, canonical=canonical)
    adapted = with_adapter(base, folder)
    with closing(open_adapter(open_source(tmp_path / "m"))) as adapter:
        for name in adapter.parts:
            module = adapted.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
            expected = module.lora_magnitude_vector["default"].weight.detach().numpy()
            np.testing.assert_array_equal(adapter.read_delta(name).magnitude, expected)
