"""`hf_config` follows the model's fields, against transformers' reading of it."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from formats.errors import UserError
from trainer.arguments import read_run
from trainer.settings.resolve import resolve


def resolved(recipe: str, *overrides: str) -> tuple[dict, list[str]]:
    run = resolve(read_run(recipe, overrides=overrides), world_size=1, device="cpu" if recipe == "llama_tiny" else "gpu")
    explained = [choice.setting for choice in run.explanations if choice.setting.startswith("model.hf_config")]
    return run.config.model.hf_config, explained


@pytest.mark.parametrize("recipe", ["llama_tiny", "llama32_1b"])
def test_a_recipe_as_it_is_keeps_its_config_json(recipe: str) -> None:
    assert resolved(recipe) == (read_run(recipe).model.hf_config, [])


def test_a_smaller_model_is_exported_as_what_it_is() -> None:
    described, explained = resolved("llama_tiny", "model.num_layers=2", "model.ffn_hidden_size=512", "model.vocab_size=300")
    config = AutoConfig.for_model(**described)
    assert (config.num_hidden_layers, config.intermediate_size, config.vocab_size) == (2, 512, 300)
    assert explained == ["model.hf_config.num_hidden_layers", "model.hf_config.intermediate_size", "model.hf_config.vocab_size"]


def test_other_numbers_of_a_scaled_rope_stay() -> None:
    was = read_run("llama32_1b").model.hf_config
    described, _ = resolved("llama32_1b", "model.rope_scaling_factor=16", "model.rotary_base=10000")
    assert described == was | {"rope_scaling": was["rope_scaling"] | {"factor": 16.0}, "rope_theta": 10000.0}
    described, _ = resolved("llama32_1b", "model.rope_scaling=false")
    assert described == was | {"rope_scaling": None}


def test_a_rope_can_become_scaled() -> None:
    described, _ = resolved("llama_tiny", "model.rope_scaling=true", "model.rope_scaling_factor=4")
    assert AutoConfig.for_model(**described).rope_parameters["factor"] == 4.0
    described, _ = resolved("llama_tiny", "model.seq_len_interpolation_factor=2")
    assert AutoConfig.for_model(**described).rope_parameters["rope_type"] == "linear"


def test_what_the_family_cannot_be_is_refused_or_not_described() -> None:
    with pytest.raises(UserError) as refused:
        resolved("llama_tiny", "model.qk_layernorm=true")
    assert str(refused.value) == (
        "a `llama` cannot be such a model: `qk_layernorm` is `True`, not `False`\n\n"
        "hint: `~model.hf_config` trains it all the same; its checkpoints cannot be exported to Hugging Face"
    )
    assert resolved("llama_tiny", "model.qk_layernorm=true", "~model.hf_config") == ({}, [])


def test_changing_the_description_alone_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        read_run("llama_tiny", overrides=["model.hf_config.num_hidden_layers=2"])
    assert str(refused.value) == (
        "`model.hf_config` makes `num_layers` `2`, and `model.num_layers` is `4`\n\n"
        "hint: set `model.num_layers`; `model.hf_config` follows it"
    )
    read_run("llama_tiny", overrides=["model.hf_config.num_hidden_layers=2", "model.num_layers=2"])
