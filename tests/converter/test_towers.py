"""Language models beside other models: `config.json` describes them in `text_config`, and the other models pass through."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from converter import families, hf_to_mcore, mcore_to_hf
from converter.config import make_model, to_megatron
from formats.errors import UserError
from tests.converter.family_suite import save_small
from tests.models import model_tree

GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
}  # fmt: skip
"""What transformers 4 wrote where a field has its default: nothing."""


def read(config):
    return to_megatron(families.find(config["model_type"]).CONFIG, config)


def test_fields_that_a_published_config_leaves_out_are_those_of_transformers():
    from transformers import Gemma3Config

    whole = Gemma3Config(**json.loads(json.dumps(GEMMA_3_4B))).to_dict()
    assert read(GEMMA_3_4B) == read(whole)
    model = make_model(families.find("gemma3").CONFIG, GEMMA_3_4B)
    assert (model.heads, model.groups, model.head_dim, model.vocab, model.tied) == (8, 4, 256, 262208, True)


SIZES = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("outside", "inside", "tied"), [(None, None, False), (None, True, True), (True, False, True), (False, False, False)]
)
def test_the_word_beside_the_language_model_decides_whether_embeddings_are_tied(outside, inside, tied):
    text = {**SIZES, **({} if inside is None else {"tie_word_embeddings": inside})}
    config = {"model_type": "mistral3", "text_config": text, **({} if outside is None else {"tie_word_embeddings": outside})}
    assert read(config)["share_embeddings_and_output_weights"] is tied


def test_embeddings_tied_inside_alone_are_refused():
    text = {**SIZES, "tie_word_embeddings": True}
    with pytest.raises(UserError, match=r"says two things: `tie_word_embeddings` is `False`, .* in `text_config` is `True`"):
        read({"model_type": "mistral3", "text_config": text, "tie_word_embeddings": False})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has no object `text_config`"),
        ({"text_config": {**SIZES, "model_type": "llama"}}, "`model_type` in `text_config` is"),
    ],
)
def test_a_language_model_that_is_not_described_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        read({"model_type": "mistral3", **config})


def test_names_that_transformers_5_has_in_memory_come_back_too(tmp_path):
    folder = save_small("mistral3", tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    save_file({_in_memory(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    hf_to_mcore(folder, tmp_path / "megatron", tp=2, verify=True)
    mcore_to_hf(tmp_path / "megatron", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(folder)


def _in_memory(name):
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.")
    return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"


def test_a_trained_language_model_s_fields_go_back_into_text_config():
    from trainer.model import from_hf_config
    from trainer.settings.hf_config import follow

    config = {"model_type": "mistral3", "text_config": {**SIZES, "model_type": "mistral", "sliding_window": None}, "more": 1}
    before = json.loads(json.dumps(config))
    provider = from_hf_config(config)
    provider.seq_length, provider.rotary_base = 512, 5e5
    assert {change.setting for change in follow(provider)} >= {"model.hf_config.text_config.max_position_embeddings"}
    assert read(provider.hf_config)["rotary_base"] == 5e5
    assert read(provider.hf_config)["seq_length"] == 512
    assert (provider.hf_config["more"], {*provider.hf_config}) == (1, {*before})
    assert config == before
