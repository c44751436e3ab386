"""Configurations of every family, there and back: what comes back means the same to transformers' own class.

Random ones, those that the class makes of nothing, and those that say sizes alone: a family's defaults are its class's.
"""

from __future__ import annotations

import json
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from converter import UserError, families
from converter.config import ACTIVATIONS as FUNCTIONS
from converter.config import TEXT, make_model, to_huggingface, to_megatron

REMOTE_CODE = {
    "baichuan", "bailing_moe_v2", "chatglm", "exaone", "hyperclovax", "internlm2", "internlm3", "kimi_k2", "mimo", "minicpm3",
    "mpt_remote", "orion", "yi",
}  # fmt: skip
"""Families whose configuration class comes with the weights: transformers has none."""

FAMILIES = [name for name in families.names() if name in CONFIG_MAPPING]

_BASE = {field.name for field in fields(PreTrainedConfig)}
IGNORED = (_BASE - {"tie_word_embeddings"}) | {
    "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "output_attentions", "pretraining_tp", "rope_parameters", "use_cache", "max_window_layers", "use_sliding_window",
}  # fmt: skip
"""Fields that do not change what a decoder computes; `rope_parameters`, of which what follows is compared; and those that
`layer_types` follows from, where it comes back itself."""


def test_a_family_without_a_class_of_transformers_is_known():
    assert {*families.names()} - {*FAMILIES} <= REMOTE_CODE


@cache
def names(family: str) -> dict[str, str]:
    """What the class calls the fields that all classes know under one name."""
    kind = CONFIG_MAPPING[family]
    own = {field.name for field in fields(kind)}
    return {name: kind.attribute_map.get(name, name) for name in (*own, *kind.attribute_map)}


def plain(config) -> dict:
    """A `config.json` as it is written."""
    return json.loads(json.dumps(config.to_dict()))


@st.composite
def sizes(draw) -> dict:
    groups, ratio, half = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([4, 8]))
    layers = draw(st.integers(1, 9))
    return {
        "vocab_size": draw(st.integers(10, 500)),
        "hidden_size": groups * ratio * half * 2,
        "intermediate_size": draw(st.integers(1, 40)) * 8,
        "num_hidden_layers": layers,
        "num_attention_heads": groups * ratio,
        "num_key_value_heads": groups,
        "max_position_embeddings": draw(st.integers(16, 4096)),
        "mamba_n_heads": 2 * groups * ratio,
    }


ROPES = st.sampled_from(
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 16, "beta_fast": 16.0, "beta_slow": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.25},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.5},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False},
    ]
)  # fmt: skip


@st.composite
def options(draw) -> dict:
    """Fields that some families have."""
    switches = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "use_sliding_window")
    chosen = {name: draw(st.booleans()) for name in switches if draw(st.booleans())}
    if draw(st.booleans()):
        chosen["head_dim"] = draw(st.sampled_from([4, 12, 32]))
    if draw(st.booleans()):
        chosen["rope_parameters"] = {**draw(ROPES), "rope_theta": draw(st.sampled_from([10000.0, 1e6, 5e5]))}
    numbers = {
        "sliding_window": st.none() | st.integers(1, 100), "max_window_layers": st.integers(0, 9),
        "initializer_range": st.floats(0.001, 1), "rms_norm_eps": st.floats(1e-8, 1e-3), "layer_norm_eps": st.floats(1e-8, 1e-3),
        "attention_dropout": st.floats(0, 0.9),
    }  # fmt: skip
    return chosen | {name: draw(strategy) for name, strategy in numbers.items() if draw(st.booleans())}


ACTIVATIONS = st.sampled_from(["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2"])


def make(family: str, given: dict) -> PreTrainedConfig:
    """The class's own configuration of those of the fields that it has; what it refuses is no model."""
    try:
        return AutoConfig.for_model(family, **known(family, given))
    except Exception:
        assume(False)
        raise


def known(family: str, given: dict) -> dict:
    """Those of the fields that the class has, as it calls them; of a model beside others, in `text_config`."""
    known_fields = {names(family)[name]: value for name, value in given.items() if name in names(family)}
    if family == "mamba2":  # whose heads are as wide as the layer
        known_fields |= {"num_heads": 2 * given["hidden_size"] // 8, "head_dim": 8, "n_groups": 1}
    if TEXT not in names(family):
        return known_fields
    text = AutoConfig.for_model(family).get_text_config().model_type
    tied = {"tie_word_embeddings": bool(given.get("tie_word_embeddings"))}
    return {TEXT: {"model_type": text, **known(text, given | tied)}, **tied}


def check(family: str, config: dict) -> None:
    """There and back: all fields that matter, as the class reads them, and as Megatron does."""
    definition = families.find(family)
    back = to_huggingface(definition.CONFIG, to_megatron(definition.CONFIG, config))
    again = plain(AutoConfig.for_model(family, **back))
    assert meant(again, config) == meant(config, config)
    assert rotations(family, again) == rotations(family, config)
    assert to_megatron(definition.CONFIG, again) == to_megatron(definition.CONFIG, config) == to_megatron(definition.CONFIG, back)
    assert make_model(definition.CONFIG, back) == make_model(definition.CONFIG, config)


def meant(config: dict, like: dict) -> dict[str, Any]:
    """The fields that matter in the configuration `like`; of activations that have several names, the function; of null, the
    number that it stands for; of a language model beside others, the same, but for the switch that is said beside it too."""
    values = {name: filled(config).get(name) for name in mattering(like) if name != TEXT}
    values = {name: FUNCTIONS.get(value, value) if isinstance(value, str) else value for name, value in values.items()}
    if TEXT not in like:
        return values
    text = meant(config[TEXT], like[TEXT])
    return {**values, TEXT: {name: value for name, value in text.items() if name != "tie_word_embeddings"}}


def filled(config: dict) -> dict:
    """The configuration with numbers for nulls, and no more dense layers than there are layers."""
    whole = {**config, **{name: number(config) for name, number in NULLS.items() if name in config and config[name] is None}}
    dense, listed = "first_k_dense_replace", "mlp_only_layers"
    if isinstance(whole.get(listed), list):
        whole[listed] = [layer for layer in whole[listed] if layer < config["num_hidden_layers"]]
    return {**whole, dense: min(whole[dense], config["num_hidden_layers"])} if dense in whole else whole


NULLS = {
    "head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"],
    "num_key_value_heads": lambda config: config["num_attention_heads"],
    "n_inner": lambda config: 4 * config["n_embd"],
    "n_group": lambda _config: 1,
    "topk_group": lambda _config: 1,
    "position_embedding_type": lambda _config: "nope",
}
"""What transformers' models take where a field is null."""


def mattering(config: dict) -> list[str]:
    """The fields that change what is computed: a window does only where a layer slides, and of two norms the one that it is."""
    still = ("sliding_window",) if "sliding_attention" not in config.get("layer_types", ["sliding_attention"]) else ()
    unused = ("layer_norm_eps",) if config.get("rms_norm_eps") is not None else ()
    return [name for name in config if name not in IGNORED and name not in (*still, *unused)]


def rotations(family: str, config: dict) -> list[Any]:
    """What transformers computes of `rope_parameters`: for each type of layer, what they say where it is not scaled, or the
    frequencies and the factor of attention."""
    whole = AutoConfig.for_model(family, **{name: value for name, value in filled(config).items() if name != "model_type"})
    parameters = config.get("rope_parameters") or {}
    nested = {name: rope for name, rope in parameters.items() if isinstance(rope, dict)}
    return [
        [name, rope]
        if rope.get("rope_type", "default") == "default"
        else [name, *rounded(ROPE_INIT_FUNCTIONS[rope["rope_type"]](whole, "cpu", **({"layer_type": name} if name else {})))]
        for name, rope in sorted((nested or {"": parameters}).items())
    ]


def rounded(computed: tuple[Any, float]) -> tuple[list[float], float]:
    """To what single precision holds: a factor that is computed back differs in its last digits."""
    frequencies, factor = computed
    return [float(f"{frequency:.6g}") for frequency in frequencies.tolist()], float(f"{factor:.9g}")


def older(config: dict) -> dict:
    """The same as transformers 4 wrote it: the base beside the scaling."""
    rope = dict(config.get("rope_parameters") or {})
    kept = {name: value for name, value in config.items() if name != "rope_parameters"}
    if not rope or any(isinstance(value, dict) for value in rope.values()):
        return config
    outside = {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    kind = rope.pop("rope_type")
    return {**kept, **outside, "rope_scaling": None if kind == "default" else {"type": kind, **rope}}


def check_random(family: str, data: Any) -> None:
    """A random configuration that the family takes means the same after the way there and back."""
    given = {**data.draw(sizes()), **data.draw(options())}
    if data.draw(st.integers(0, 3)) == 0:
        given[
            next((name for name in ("hidden_act", "activation_function", "hidden_activation") if name in names(family)), "")
        ] = data.draw(ACTIVATIONS)
    if "mlp_bias" in names(family):  # Megatron has one switch for both: a bias that only one has is zero in the other
        given |= dict.fromkeys(("attention_bias", "attention_out_bias"), given.setdefault("mlp_bias", False))
    given |= {**ONE_SWITCH.get(family, {}), **WITHOUT_DEFAULT.get(family, {})}
    config = plain(make(family, given))
    try:
        expected = to_megatron(families.find(family).CONFIG, config)
    except UserError:
        assume(False)
        raise
    check(family, config)
    if family not in SCALED or config["rope_parameters"]["rope_type"] != "default":
        assert to_megatron(families.find(family).CONFIG, older(config)) == expected


FEW, MANY = (
    settings(max_examples=count, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]) for count in (10, 100)
)


@pytest.mark.parametrize("family", FAMILIES)
@FEW
@given(data=st.data())
def test_a_random_config_means_the_same_after_the_way_there_and_back(family, data):
    check_random(family, data)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@MANY
@given(data=st.data())
def test_many_random_configs_mean_the_same_after_the_way_there_and_back(family, data):
    check_random(family, data)


ONE_SWITCH = {"gpt_neox": {"attention_bias": True}, "granitemoehybrid": {"position_embedding_type": "rope"}}
"""Switches that Megatron has not: a GPT-NeoX without biases of attention has zeros there. And the one without which a Granite 4
has no rotary embeddings, whatever is said of them."""

SCALED = ("apertus", "cwm", "gpt_oss", "ministral3")
"""Families whose class takes a scaling of its own for the null that transformers 4 wrote where there is none."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_of_a_family_are_those_of_its_class(family):
    whole = without_prediction(AutoConfig.for_model(family, **WITHOUT_DEFAULT.get(family, {})))
    check(family, whole)
    sized = sizes_alone(names(family), whole)
    if isinstance(text := whole.get(TEXT), dict):
        sized[TEXT] = {"model_type": text["model_type"], **sizes_alone(names(text["model_type"]), text)}
    sized |= {name: whole[name] for name in NO_DEFAULTS.get(family, ())}
    sized |= {part: {name: whole[part][name] for name in inside} for part, inside in SIZES_WITHIN.get(family, {}).items()}
    filled = without_prediction(AutoConfig.for_model(family, **sized))
    assert to_megatron(families.find(family).CONFIG, sized) == to_megatron(families.find(family).CONFIG, filled)


def without_prediction(config) -> dict:
    """By some classes there is one layer of multi-token prediction, and their models have none."""
    saved = plain(config)
    return {**saved, **{name: 0 for name, layers in saved.items() if name == "num_nextn_predict_layers" and layers}}


WITHOUT_DEFAULT = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
}
"""Fields that are null by default, or missing, and with which transformers' model then fails."""

NO_DEFAULTS = {"mistral3": ("tie_word_embeddings",)}
"""Fields that a test must say: by Mistral 3's class embeddings are tied, by that of its `text_config` they are not."""


def sizes_alone(names: dict[str, str], whole: dict) -> dict:
    return {name: whole[name] for name in (names.get(size, size) for size in SIZES) if name in whole}


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "intermediate_size_mlp", "num_hidden_layers", "num_attention_heads",
    "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts",
    "shared_expert_intermediate_size",
)  # fmt: skip
"""What every `config.json` says; transformers fills in the rest."""

SIZES_WITHIN = {"dbrx": {"attn_config": ("rope_theta",), "ffn_config": ("ffn_hidden_size", "moe_num_experts", "moe_top_k")}}
"""The same in objects of their own."""
