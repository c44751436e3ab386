"""An adapter is merged into a base of any kind as into its twin: the same files, bit for bit."""

from __future__ import annotations

import shutil

import pytest
from safetensors.numpy import load_file

from converter import adapter_to_mcore, merge
from tests.converter import stored_kinds
from tests.models import tree

BASES = {**stored_kinds.MEGATRON, **stored_kinds.HUGGINGFACE}
DESCRIBED = {"torch", "fsdp_dtensor"}
"""Those that hold a `config.json`."""


@pytest.fixture(scope="module")
def adapter(base, peft_folder, tmp_path_factory):
    """An adapter that knows the fingerprint of its base."""
    folder = tmp_path_factory.mktemp("adapter") / "a"
    adapter_to_mcore(peft_folder(), folder, base=base)
    return folder


def merged(base, adapter, target, *, to, hf_config):
    """The weights of a merged model."""
    merge(base, adapter, target, to=to, tp=2 if to == "mcore" else 1, hf_config=hf_config)
    if to == "hf":
        return {name: value.tobytes() for name, value in load_file(target / "model.safetensors").items()}
    return {name: data for name, data in tree(target).items() if name.endswith((".distcp", ".metadata"))}


@pytest.fixture(scope="module")
def expected(base, adapter, tmp_path_factory):
    """What the twin of all others becomes."""
    folder = tmp_path_factory.mktemp("twin")
    twin = stored_kinds.torch_dist(base, folder)
    return {to: merged(twin, adapter, folder / to, to=to, hf_config=None) for to in ("hf", "mcore")}


@pytest.mark.parametrize("kind", BASES)
def test_a_base_of_any_kind_is_merged_into_as_its_twin(base, adapter, expected, tmp_path, kind):
    stored, config = BASES[kind](base, tmp_path), tmp_path / "config"
    config.mkdir()
    shutil.copy(base / "config.json", config)
    for to in ("hf", "mcore"):
        made = merged(stored, adapter, tmp_path / to, to=to, hf_config=None if kind in DESCRIBED else config)
        assert made == expected[to] != {}
