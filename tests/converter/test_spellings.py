"""What transformers takes in a `config.json` is taken, with the same meaning; what it refuses is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from converter import UserError, families
from converter.config import make_model, to_megatron

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 128,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
TYPE = {"type": "llama3", **{name: value for name, value in SCALED.items() if name != "rope_type"}}


def without(name):
    return {"rope_scaling": {key: value for key, value in SCALED.items() if key != name}}


def by_transformers(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    parsed = AutoConfig.from_pretrained(tmp_path)
    with torch.no_grad():
        LlamaForCausalLM(parsed)(torch.tensor([[1, 2, 3]]))
    return parsed


def by_us(config):
    family = families.find(config["model_type"])
    return make_model(family.CONFIG, config), to_megatron(family.CONFIG, config)


@pytest.mark.parametrize("fields", [
    {"num_key_value_heads": None}, {"head_dim": None}, {"hidden_act": "swish"}, {"rope_scaling": None}, {"rope_parameters": None},
    {"rope_scaling": {}}, {"rope_scaling": {"type": "default"}}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}, {"rope_scaling": TYPE}, {"rope_scaling": SCALED},
    without("original_max_position_embeddings"), {"rope_theta": 10000}, {"attention_dropout": 0}, {"torch_dtype": "bfloat16"},
    {"dtype": "bfloat16"},
], ids=str)  # fmt: skip
def test_what_transformers_takes_is_taken_as_it_takes_it(tmp_path, fields):
    theirs, (model, megatron) = by_transformers({**LLAMA, **fields}, tmp_path), by_us({**LLAMA, **fields})
    assert (model.groups, model.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    rope = theirs.rope_parameters
    assert megatron["rotary_base"] == rope["rope_theta"]
    assert megatron["rope_scaling"] == (rope["rope_type"] == "llama3")
    assert megatron.get("rope_scaling_factor") == (rope["factor"] if rope["rope_type"] == "llama3" else None)
    assert megatron.get("seq_len_interpolation_factor") == (rope["factor"] if rope["rope_type"] == "linear" else None)


@pytest.mark.parametrize(("fields", "message"), [
    (without("factor"), "has rope type `llama3` without `factor`"),
    (without("low_freq_factor"), "has rope type `llama3` without `low_freq_factor`"),
    (without("high_freq_factor"), "has rope type `llama3` without `high_freq_factor`"),
    ({"rope_scaling": {**SCALED, "factor": None}}, "`factor` is `None`"),
    ({"rope_scaling": {**SCALED, "low_freq_factor": None}}, "`low_freq_factor` is `None`"),
    ({"rope_scaling": {"type": "linear"}}, "has rope type `linear` without `factor`"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "`factor` is `2`, which should be a number"),
    ({"rope_scaling": {"type": "no such"}}, "rope type `no such`"),
    ({"hidden_act": "SiLU"}, "`hidden_act` is `SiLU`"), ({"hidden_act": None}, "`hidden_act` is `None`"),
    ({"rms_norm_eps": None}, "`rms_norm_eps` is `None`"), ({"rms_norm_eps": "1e-5"}, "`rms_norm_eps` is `1e-5`"),
    ({"max_position_embeddings": None}, "`max_position_embeddings` is `None`"), ({"hidden_size": 64.0}, "`hidden_size`: `64.0`"),
    ({"num_key_value_heads": 0}, "`num_query_groups`: `0`"), ({"tie_word_embeddings": None}, "`tie_word_embeddings` is `None`"),
], ids=str)  # fmt: skip
def test_what_transformers_refuses_is_refused_by_name(tmp_path, fields, message):
    with pytest.raises(Exception):  # noqa: B017, PT011 - of many kinds, from reading it to the first forward
        by_transformers({**LLAMA, **fields}, tmp_path)
    with pytest.raises(UserError) as error:
        by_us({**LLAMA, **fields})
    assert message in str(error.value)
