"""What published `config.json` files say otherwise than transformers 5 writes it."""

from __future__ import annotations

import pytest

from converter import families
from converter.config import to_huggingface, to_megatron
from formats.errors import UserError

SIZES = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
LAYERS = {"num_hidden_layers": 4}


def read(family, **config):
    return to_megatron(families.find(family).CONFIG, {**SIZES, **config})


def test_exaone_s_own_names_are_read_and_written_beside_llama_s():
    found = read("exaone", num_layers=4, layer_norm_epsilon=1e-3, activation_function="silu")
    assert (found["num_layers"], found["layernorm_epsilon"]) == (4, 1e-3)
    back = to_huggingface(families.find("exaone").CONFIG, found)
    assert (back["num_layers"], back["num_hidden_layers"], back["layer_norm_epsilon"], back["rms_norm_eps"]) == (4, 4, 1e-3, 1e-3)
    with pytest.raises(UserError, match="two things: `num_layers` is `4`, `num_hidden_layers` is `3`"):
        read("exaone", num_layers=4, num_hidden_layers=3)


def test_gemma_s_gelu_is_by_tanh():
    assert read("gemma", **LAYERS, hidden_act="gelu")["activation_func"] == "fast_gelu"


@pytest.mark.parametrize(
    "family", ["cwm", "ministral3", "smollm3", "seed_oss", "helium", "ernie4_5", "arcee", "gemma", "ministral"]
)
def test_absent_fields_mean_what_transformers_fills_in(family):
    from transformers import AutoConfig

    whole = AutoConfig.for_model(family, **SIZES, **LAYERS).to_dict()
    assert read(family, **LAYERS) == to_megatron(families.find(family).CONFIG, whole)


def test_ministral_3_s_queries_grow_as_in_every_model_of_it():
    rope = families.find("ministral3").SMALL["rope_parameters"]
    assert read("ministral3", **LAYERS, rope_parameters=rope)["exact_sequence_length"] == 32
    with pytest.raises(UserError, match=r"`llama_4_scaling_beta` is `0\.5`"):
        read("ministral3", **LAYERS, rope_parameters={**rope, "llama_4_scaling_beta": 0.5})
