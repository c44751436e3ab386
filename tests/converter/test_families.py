"""Every family in the directory: its names and shapes are those of the model transformers builds."""

from __future__ import annotations

import json

import pytest
import torch

from converter import UserError, families
from converter.config import make_model, to_huggingface, to_megatron
from converter.console import show_families
from converter.planner import huggingface_tensors
from converter.unsupported_families import REASONS
from tests.converter.family_suite import (
    EP,
    ETP,
    TP,
    check_config,
    check_logits,
    check_names,
    check_round_trip,
    more_runs,
    save_small,
)
from tests.converter.remote_code import TWINS
from tests.family_models import AS_A_RUN
from tests.models import BASE, VARIANTS


def meta_model(family, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**BASE, **changes}))


CASES = [
    (family, variant) for family in ("llama", "mistral") for variant in VARIANTS if family == "llama" or "rope" not in variant
]
"""Mistral's rotary embedding has no scaled forms."""


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_rules_name_every_weight_of_the_model_with_its_shape_and_no_other(family, variant):
    made = meta_model(family, **VARIANTS[variant])
    config = made.config.to_dict()
    definition = families.find(family)
    model = make_model(definition.CONFIG, config)
    tied = ["lm_head.weight"] if model.tied else []
    expected = {name: tuple(t.shape) for name, t in made.state_dict().items() if name not in tied}
    assert dict(huggingface_tensors(definition.RULES, model, dict.fromkeys(range(10_000)))) == expected


WITH_EXPERTS = [
    name for name in families.names() if families.find(name).trains and any(r.is_expert for r in families.find(name).RULES)
]


@pytest.fixture(scope="module", params=families.names())
def saved(request, tmp_path_factory):
    """A family, and a small model of it as transformers saves it, in fp32."""
    return request.param, save_small(request.param, tmp_path_factory.mktemp("family") / "hf", dtype="float32")


def test_a_family_names_every_weight_that_transformers_saves(saved):
    check_names(*saved)


def test_a_family_s_weights_come_back_to_the_bit(saved, tmp_path):
    check_round_trip(saved[1], tmp_path)


@pytest.mark.slow
def test_a_family_s_weights_come_back_to_the_bit_at_more_layouts(saved, tmp_path):
    check_round_trip(saved[1], tmp_path, slow=True)


def test_a_family_s_logits_are_those_of_transformers_where_megatron_core_computes_it(saved, ranks, tmp_path):
    if families.find(saved[0]).trains:
        check_logits(ranks, saved[1], tmp_path)


@pytest.mark.slow
def test_a_family_s_logits_are_the_same_at_more_layouts(saved, ranks, tmp_path):
    if families.find(saved[0]).trains:
        check_logits(ranks, saved[1], tmp_path, runs=more_runs(saved[0]))


@pytest.mark.parametrize("family", [
    family if family in ("deepseek_v3", "qwen3_moe") else pytest.param(family, marks=pytest.mark.slow) for family in WITH_EXPERTS
])  # fmt: skip
def test_a_run_starts_from_experts_of_another_layout(family, ranks, tmp_path):
    folder = save_small(family, tmp_path / "hf", dtype="float32")
    check_logits(ranks, folder, tmp_path, runs={"ep2": {EP: 2}, "tp2 ep2 etp1": {TP: 2, EP: 2, ETP: 1}}, load=AS_A_RUN)


@pytest.mark.parametrize("family", families.names())
def test_a_config_survives_the_way_to_megatron_and_back(family):
    check_config(family)


WITHOUT_DEFAULT = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
}
"""Fields that are null by default in transformers, and with which its model then fails."""


@pytest.mark.parametrize("family", [name for name in families.names() if name not in TWINS])
def test_a_field_that_config_json_lacks_is_what_transformers_takes_it_for(family):
    from transformers import AutoConfig

    config, definition = AutoConfig.for_model(family, **WITHOUT_DEFAULT.get(family, {})).to_dict(), families.find(family)
    config |= {"num_nextn_predict_layers": 0}  # 1 in transformers, whose models have no such layers: files say if there are some
    expected, needed = to_megatron(definition.CONFIG, config), []
    tied = (
        {"tie_word_embeddings"} if "text_config" in config else set()
    )  # published files lack it beside `text_config`, and mean no
    for name in config.keys() - tied:
        try:
            actual = to_megatron(definition.CONFIG, {key: value for key, value in config.items() if key != name})
        except UserError:
            needed.append(name)
        else:
            assert actual == expected, name
    most = (11 if expected.get("multi_latent_attention") else 6) + (3 if expected["num_moe_experts"] else 0)
    assert len(needed) <= most, needed


def test_a_family_is_known_to_transformers_or_has_a_twin_there():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert {name for name in families.names() if name not in CONFIG_MAPPING_NAMES} == TWINS.keys()


def test_every_model_of_text_in_transformers_is_a_family_or_unsupported_with_a_reason():
    from transformers.models.auto import modeling_auto as auto

    kinds = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM")
    known = {name for kind in kinds for name in getattr(auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")}
    assert known - {*families.names()} - REASONS.keys() == set()
    assert REASONS.keys() & {*families.names()} == set()


REMOTE = """
    baichuan bailing_moe bailing_moe_linear bailing_moe_v2 chatglm deci deepseek grok grok-1 hunyuan internlm internlm2
    internvl_chat kimi_k2 kimi_vl mimo minicpm minicpmo minicpmv minimax_m1 minimax_text_01 nemotron-nas openelm phi-msft
    phi3small qwen rwkv6 rwkv7
"""
"""Model types of published models that come with code of their own, and that transformers has no class for."""


@pytest.mark.parametrize("model_type", REMOTE.split())
def test_a_model_type_of_remote_code_is_a_family_or_unsupported_with_a_reason(model_type):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert model_type not in CONFIG_MAPPING_NAMES
    assert (model_type in families.names()) != (model_type in REASONS)


@pytest.mark.parametrize("model_type", sorted(REASONS))
def test_an_unsupported_model_type_is_refused_with_its_reason_whatever_else_it_says(model_type):
    for layout in (None, "gpt", "hybrid"):
        with pytest.raises(UserError) as error:
            families.find(model_type, layout)
        assert error.value.args[0] == (
            f"`config.json` has the model type `{model_type}`, which is not supported: {REASONS[model_type]}"
        )


def test_unsupported_model_types_are_listed_with_their_reasons(capsys):
    show_families(every=True)
    listed = capsys.readouterr().out.split("not supported:\n")[1].splitlines()
    assert dict(line.split(maxsplit=1) for line in listed) == REASONS
    show_families(every=True, as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert {name: entry["unsupported"] for name, entry in report.items() if "unsupported" in entry} == REASONS


def test_every_family_says_what_it_can(capsys):
    show_families(as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(families.names())]] == families.names()
    show_families(as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert {name: (family["trains"], family["needs"], family["layouts"]) for name, family in report.items()} == {
        name: (family.trains, [*family.PROVIDER], [*family.LAYOUTS])
        for name in families.names()
        if (family := families.find(name))
    }
    assert (report["llama"]["layouts"], report["mamba2"]["layouts"]) == (["gpt", "hybrid"], ["hybrid"])


def test_llama31_scaling_is_kept_when_a_config_is_rebuilt():
    from transformers import LlamaConfig

    family = families.find("llama")
    config = meta_model("llama", **VARIANTS["rope31"]).config.to_dict()
    back = to_huggingface(family.CONFIG, to_megatron(family.CONFIG, config))
    assert LlamaConfig(**back).rope_parameters == config["rope_parameters"]


def test_transformers_4_and_5_spell_the_same_rope():
    from converter.config_rope import rope_numbers

    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    assert rope_numbers(old) == rope_numbers(new)
    assert rope_numbers({}) == {"rope_type": "default", "rope_theta": 10000.0}
