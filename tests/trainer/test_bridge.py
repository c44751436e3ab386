"""The short way between Hugging Face directories and Megatron."""

from __future__ import annotations

from pathlib import Path

import pytest

import converter
from formats.errors import UserError
from trainer import recipes
from trainer.bridge import AutoBridge


def test_a_directory_gives_the_provider_of_its_model(golden: Path) -> None:
    folder = golden / "bridge_llama_tiny" / "hf"
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    assert (provider.num_layers, provider.hidden_size) == (bridge.config["num_hidden_layers"], bridge.config["hidden_size"])
    assert provider.hf_source == provider.pretrained_from == str(folder)
    assert bridge.to_megatron_provider(load_weights=False).pretrained_from is None


def test_the_provider_fits_into_any_recipe(golden: Path) -> None:
    config = recipes.find("llama32_1b").pretrain_config()
    config.model = AutoBridge.from_hf_pretrained(golden / "bridge_llama_tiny" / "hf").to_megatron_provider()
    config.model.apply_rope_fusion = False  # needs Transformer Engine
    config.model.finalize()
    assert config.model.kv_channels


def test_weights_go_to_megatron_and_back(golden: Path, tmp_path: Path) -> None:
    source = golden / "bridge_llama_tiny" / "hf"
    AutoBridge.import_ckpt(source, tmp_path / "megatron", tp=2)
    AutoBridge.export_ckpt(tmp_path / "megatron", tmp_path / "hf")
    assert converter.verify(source, tmp_path / "hf").same


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        AutoBridge.from_hf_pretrained(tmp_path)
    assert str(refused.value) == f"`{tmp_path}` has no `config.json`\n\nhint: point at a Hugging Face model directory"
