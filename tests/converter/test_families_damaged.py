"""Damaged values in any field of any family's `config.json` are refused by name, or mean what they say: never a traceback."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from itertools import product

import pytest

from converter import UserError, families
from converter.config import make_model, to_huggingface, to_megatron
from tests.converter.family_suite import small_config

DAMAGED = (
    None, "", "text", "4", -1, -0.5, 0, 1.5, 10**400, 1e300, 1e-300, math.nan, math.inf, True, [], {}, [1], ["text"], [None],
    [-1, 0],
    [math.nan] * 4, {"text": 1}, {"rope_type": []}, {"full_attention": 1}, {"full_attention": {"rope_theta": "text"}}, [[1], {}],
)  # fmt: skip

FEW = (None, "text", -1, 0, math.nan, 10**400, [], [1, None], {"text": 1})

ROPE = {
    "rope_type": "yarn", "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0, "truncate": True, "short_factor": [1.0] * 4,
    "long_factor": [1.0] * 4, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5,
    "llama_4_scaling_beta": 0.1,
}  # fmt: skip


KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope", "su", "other")


def read(family: str, config: dict) -> None:
    """There and back, or a refusal."""
    fields = families.find(family).CONFIG
    with suppress(UserError):
        json.dumps(to_huggingface(fields, to_megatron(fields, config)))


def sized(family: str, config: dict) -> None:
    """The sizes, or a refusal."""
    with suppress(UserError):
        make_model(families.find(family).CONFIG, config)


def plain(family: str) -> dict:
    return json.loads(json.dumps(small_config(family).to_dict()))


SHARE = 4


def a_share(values: tuple, family: str, position: int) -> tuple:
    """Every fourth value, others at each place and in the next family: families share most of what reads their fields."""
    return values[(families.names().index(family) + position) % SHARE :: SHARE]


def every(values: tuple, *_) -> tuple:
    return values


@pytest.fixture(params=[a_share, pytest.param(every, marks=pytest.mark.slow)])
def chosen(request):
    """Which of the damaged values to try at a place of a family's configuration."""
    return request.param


@pytest.mark.parametrize("family", families.names())
def test_a_damaged_value_is_refused_or_read(family, chosen):
    config = plain(family)
    without = {key: entry for key, entry in config.items() if key != "layer_types"}
    names = (*config, "rope_theta", "rope_scaling", "sliding_window", "layer_types", "use_sliding_window", "head_dim")
    for position, name in enumerate(names):
        for value in chosen(DAMAGED, family, position):
            read(family, {**config, name: value})
            read(family, {**without, name: value})
            sized(family, {**config, name: value})


@pytest.mark.parametrize("family", families.names())
def test_a_damaged_scaling_of_rotary_embeddings_is_refused_or_read(family, chosen):
    config = plain(family)
    older = {key: entry for key, entry in config.items() if key != "rope_parameters"}
    for position, (kind, name) in enumerate(product(KINDS, ROPE)):
        for value in chosen(FEW, family, position):
            rope = {**ROPE, "rope_type": kind, "type": kind, name: value}
            read(family, {**config, "rope_parameters": rope})
            read(family, {**older, "rope_scaling": rope})


@pytest.mark.parametrize("family", families.names())
def test_damaged_fields_of_megatron_are_refused_or_written(family, chosen):
    fields = families.find(family).CONFIG
    megatron = to_megatron(fields, plain(family))
    for position, name in enumerate(megatron):
        for value in chosen(DAMAGED, family, position):
            with suppress(UserError):
                to_huggingface(fields, {**megatron, name: value})


def without(config: dict, name: str) -> dict:
    return {key: value for key, value in config.items() if key != name}


@pytest.mark.parametrize("family", families.names())
def test_a_field_that_is_absent_is_refused_or_has_a_default(family):
    config, fields = plain(family), families.find(family).CONFIG
    for name in config:
        read(family, without(config, name))
        sized(family, without(config, name))
    megatron = to_megatron(fields, config)
    for name in megatron:
        with suppress(UserError):
            to_huggingface(fields, without(megatron, name))


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaling_of_rotary_embeddings_without_a_length_is_refused_or_read(kind):
    config = without(plain("llama"), "max_position_embeddings")
    for name in ROPE:
        read("llama", {**config, "rope_parameters": without({**ROPE, "rope_type": kind, "type": kind}, name)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"window_attn_skip_freq": [1, 0]},
            "`window_attn_skip_freq` is `[1, 0]`, which should have 0 or 1 for each of 4 layers",
        ),
        ({"window_attn_skip_freq": 0.5}, "`window_attn_skip_freq` is `0.5`, which should have 0 or 1 for each of 4 layers"),
        ({"activation_func": ["silu"]}, "`activation_func` is `[silu]`, not silu"),
    ],
)
def test_marks_of_layers_and_functions_that_are_none_are_named(fields, message):
    family = families.find("qwen2").CONFIG
    with pytest.raises(UserError) as refused:
        to_huggingface(family, {**to_megatron(family, plain("qwen2")), **fields})
    assert str(refused.value) == message


def test_a_rope_type_that_is_no_word_is_named():
    with pytest.raises(UserError) as refused:
        to_megatron(families.find("qwen2").CONFIG, {**plain("qwen2"), "rope_parameters": {"rope_type": ["yarn"]}})
    assert str(refused.value) == "the rope type in `rope_parameters` is `[yarn]`, which should be a word"


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe"])
def test_a_number_of_layers_that_slide_that_is_none_is_named(family):
    with pytest.raises(UserError, match="`max_window_layers` is `None`, which should be a number"):
        to_megatron(families.find(family).CONFIG, {**plain(family), "use_sliding_window": True, "max_window_layers": None})


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "smollm3", "cohere2"])
def test_a_billion_layers_are_refused_before_a_list_is_made_for_each(family):
    with pytest.raises(UserError, match="is 1000000000, more layers than any model has"):
        to_megatron(families.find(family).CONFIG, {**plain(family), "num_hidden_layers": 10**9, "layer_types": None})
