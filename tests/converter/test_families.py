"""Every family in the directory: its names and shapes are those of the model transformers builds."""

from __future__ import annotations

import pytest
import torch

from converter import families
from converter.config import make_model, to_huggingface, to_megatron
from converter.planner import huggingface_tensors
from tests.models import BASE, VARIANTS


def meta_model(family, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**BASE, **changes}))


CASES = [(family, variant) for family in families.names() for variant in VARIANTS if family == "llama" or "rope" not in variant]
"""Mistral's rotary embedding has no scaled forms."""


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_rules_name_every_weight_of_the_model_with_its_shape_and_no_other(family, variant):
    made = meta_model(family, **VARIANTS[variant])
    config = made.config.to_dict()
    one = families.find(family)
    model = make_model(one.CONFIG, config)
    tied = ["lm_head.weight"] if model.tied else []
    expected = {name: tuple(t.shape) for name, t in made.state_dict().items() if name not in tied}
    assert dict(huggingface_tensors(one.RULES, model, dict.fromkeys(range(10_000)))) == expected


@pytest.mark.parametrize("family", families.names())
def test_a_config_survives_the_way_to_megatron_and_back(family):
    one = families.find(family)
    config = meta_model(family).config.to_dict()
    back = to_huggingface(one.CONFIG, to_megatron(one.CONFIG, config))
    rope = config.pop("rope_parameters")
    assert back.pop("rope_theta") == rope["rope_theta"]
    assert back.pop("rope_scaling") is None
    assert {name: config[name] for name in back} == back


def test_llama31_scaling_is_kept_when_a_config_is_rebuilt():
    from transformers import LlamaConfig

    one = families.find("llama")
    config = meta_model("llama", **VARIANTS["rope31"]).config.to_dict()
    back = to_huggingface(one.CONFIG, to_megatron(one.CONFIG, config))
    assert LlamaConfig(**back).rope_parameters == config["rope_parameters"]


def test_transformers_4_and_5_spell_the_same_rope():
    from converter.config import rope_numbers

    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    assert rope_numbers(old) == rope_numbers(new)
    assert rope_numbers({}) == {"rope_type": "default", "rope_theta": 10000.0}
