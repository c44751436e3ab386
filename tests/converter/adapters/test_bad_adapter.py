"""Adapters that cannot be converted are refused by name before anything is written."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from converter import UserError, hf_to_mcore, mcore_to_hf
from converter.adapters.convert import adapter_to_hf, adapter_to_mcore
from converter.adapters.merge import open_adapter
from converter.sources import open_source
from tests.refusal import refused

Q = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter(peft_folder, tmp_path):
    """A PEFT folder, free to be damaged."""
    shutil.copytree(peft_folder(), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def checkpoint(peft_folder, base, tmp_path):
    """A Megatron adapter checkpoint, free to be damaged."""
    adapter_to_mcore(peft_folder(use_dora=True), tmp_path / "m", base=base)
    return tmp_path / "m"


def edit(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS, {"format": "pt"})


def configure(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


DAMAGED = {
    "B is missing": (lambda w: w.pop(f"{Q}.lora_B.weight"), rf"lacks `{Q}.lora_B.weight`"),
    "A is missing": (lambda w: w.pop(f"{Q}.lora_A.weight"), rf"lacks `{Q}.lora_A.weight`"),
    "both are missing": (
        lambda w: [w.pop(f"{Q}.lora_{letter}.weight") for letter in "AB"],
        r"requests an adapter for `model.layers.0.self_attn.q_proj.weight`, but `adapter_model.safetensors` holds none",
    ),
    "rank of A": (
        lambda w: w.update({f"{Q}.lora_A.weight": torch.ones(3, 64)}),
        r"lora_A.weight` has shape \[3, 64\], with rank 4 it should be \[4, 64\]",
    ),
    "rank of B": (
        lambda w: w.update({f"{Q}.lora_B.weight": torch.ones(64, 5)}),
        r"lora_B.weight` has shape \[64, 5\], with rank 4 it should be \[64, 4\]",
    ),
    "rows of B": (
        lambda w: w.update({f"{Q}.lora_B.weight": torch.ones(65, 4)}),
        r"lora_B.weight` has shape \[65, 4\], by the base model's `config.json` it should be \[64, 4\]",
    ),
    "columns of A": (
        lambda w: w.update({f"{Q}.lora_A.weight": torch.ones(4, 32)}),
        r"lora_A.weight` has shape \[4, 32\], by the base model's `config.json` it should be \[4, 64\]",
    ),
    "no dimensions": (lambda w: w.update({f"{Q}.lora_A.weight": torch.ones(())}), r"lora_A.weight` has shape \[\]"),
    "no rows": (lambda w: w.update({f"{Q}.lora_A.weight": torch.ones(0, 64)}), r"lora_A.weight` has shape \[0, 64\]"),
    "a stray tensor": (lambda w: w.update(stray=torch.ones(2)), r"holds `stray`, which is not a tensor of a LoRA"),
    "a bias": (
        lambda w: w.update({f"{Q}.lora_B.bias": torch.ones(64)}),
        r"q_proj.lora_B.bias`, which is not a tensor of a LoRA",
    ),
    "an embedding": (
        lambda w: w.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 384)}),
        r"lora_embedding_A`, which is not a tensor of a LoRA on a linear layer",
    ),
    "a magnitude": (
        lambda w: w.update({f"{Q}.lora_magnitude_vector": torch.ones(64)}),
        r"holds `.*lora_magnitude_vector`, which a lora does not have",
    ),
    "a module that is no target": (
        lambda w: w.update({f"base_model.model.lm_head.lora_{letter}.weight": torch.ones(4, 4) for letter in "AB"}),
        r"an adapter for `lm_head`, which `target_modules` in `adapter_config.json` leaves out",
    ),
    "a fifth layer": (
        lambda w: w.update(
            {f"{Q.replace('.0.', '.4.')}.lora_{letter}.weight": w[f"{Q}.lora_{letter}.weight"].clone() for letter in "AB"}
        ),
        r"adapter for `model.layers.4.self_attn.q_proj.weight`, which Megatron has no adapter for",
    ),
    "nothing": (lambda w: w.clear(), r"`adapter_model.safetensors` holds no tensors"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_tensors(adapter, base, tmp_path, damage):
    change, message = DAMAGED[damage]
    edit(adapter, change)
    refused(adapter_to_mcore, adapter, tmp_path, message, base=base)


CONFIGURED = {
    "another method": ({"peft_type": "IA3"}, r"`peft_type` in `adapter_config.json` is `IA3`"),
    "no method": ({"peft_type": None}, r"`peft_type` in `adapter_config.json` is `None`"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, r"`modules_to_save: \[lm_head\]`, which is not supported"),
    "lora bias": ({"lora_bias": True}, r"`lora_bias: True`, which is not supported"),
    "bias": ({"bias": "lora_only"}, r"`bias: lora_only`, which is not supported"),
    "replication": ({"layer_replication": [[0, 4], [2, 4]]}, r"`layer_replication: .*, which is not supported"),
    "tokens": ({"trainable_token_indices": [1]}, r"`trainable_token_indices: \[1\]`, which is not supported"),
    "parameters": ({"target_parameters": ["a"]}, r"`target_parameters` in `.*` has `a`, for which .* holds no tensors"),
    "transposed": (
        {"fan_in_fan_out": "yes"},
        r"`fan_in_fan_out` in `adapter_config.json` is `yes`, which should be true or false",
    ),
    "a variant": ({"alora_invocation_tokens": [1]}, r"`alora_invocation_tokens: \[1\]`, which is not supported"),
    "a feature of tomorrow": ({"use_better_lora": {"x": 1}}, r"`use_better_lora: a dict`, which is not supported"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, r"`init_lora_weights: pissa_niter_4`, with which PEFT changes"),
    "rank 0": ({"r": 0}, r"`r` in `adapter_config.json` is `0`, which should be a whole number, 1 or more"),
    "rank in words": ({"r": "four"}, r"`r` in `adapter_config.json` is `four`"),
    "alpha": ({"lora_alpha": [1]}, r"`lora_alpha` in `adapter_config.json` is `\[1\]`"),
    "infinite alpha": (
        {"lora_alpha": float("inf")},
        r"`lora_alpha` in `adapter_config.json` is `inf`, which should be a finite number",
    ),
    "a flag": ({"use_dora": "yes"}, r"`use_dora` in `adapter_config.json` is `yes`, which should be true or false"),
    "targets": (
        {"target_modules": [1]},
        r"`target_modules` in `adapter_config.json` is `\[1\]`, which should be a string or a list of strings",
    ),
    "a broken pattern": (
        {"target_modules": "(q_proj"},
        r"`adapter_config.json` holds `.*`, which is not a regular expression: the fault is at character",
    ),
    "a broken rank pattern": (
        {"rank_pattern": {"(": 2}},
        r"`adapter_config.json` holds `.*`, which is not a regular expression: the fault is at character",
    ),
    "a rank in words": (
        {"rank_pattern": {"q_proj": "2"}},
        r"`rank_pattern` in .* is `a dict`, which should be an object of ranks",
    ),
    "DoRA without magnitudes": ({"use_dora": True}, r"lacks `.*lora_magnitude_vector`"),
    "excluded": ({"exclude_modules": ["q_proj"]}, r"an adapter for `.*q_proj`, which `target_modules`"),
    "other alphas": ({"alpha_pattern": {"q_proj": 3}}, r"has alpha 8 and `.*q_proj` has 3, by `alpha_pattern`"),
}


@pytest.mark.parametrize("what", CONFIGURED)
def test_configurations(adapter, base, tmp_path, what):
    fields, message = CONFIGURED[what]
    configure(adapter / CONFIG, **fields)
    refused(adapter_to_mcore, adapter, tmp_path, message, base=base)


def test_other_ranks_have_no_place_in_megatron(peft_folder, base, tmp_path):
    folder = peft_folder(rank_pattern={"down_proj": 2})
    refused(adapter_to_mcore, folder, tmp_path, r"has rank 2 and `.*` has 4, by `rank_pattern`", base=base)


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b'{"r": 1, "r": 2}'])
def test_a_configuration_that_is_no_json(adapter, base, tmp_path, text):
    (adapter / CONFIG).write_bytes(text)
    refused(adapter_to_mcore, adapter, tmp_path, "`adapter_config.json`", base=base)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_file(adapter, base, tmp_path, length):
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:length])
    refused(adapter_to_mcore, adapter, tmp_path, "`adapter_model.safetensors`", base=base)


def test_a_pickle_is_not_opened(adapter, base, tmp_path):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError) as error:
        open_adapter(open_source(adapter))
    assert str(error.value) == (
        f"`{adapter}` has its weights in `adapter_model.bin`, a pickle, which can run any program when it is opened\n\n"
        "hint: if you trust it, load it with PEFT and save it again: `save_pretrained` writes safetensors"
    )
    refused(adapter_to_mcore, adapter, tmp_path, "a pickle", base=base)


def test_another_base_model(adapter, model_folder, tmp_path):
    refused(adapter_to_mcore, adapter, tmp_path, r"k_proj.lora_B.weight` has shape \[32, 4\]", base=model_folder("mha"))


def test_a_model_is_no_adapter(base, tmp_path):
    refused(adapter_to_mcore, base, tmp_path, "is a Hugging Face model, not a PEFT adapter", base=base)


def test_a_checkpoint_of_a_model_is_no_adapter(base, tmp_path):
    hf_to_mcore(base, tmp_path / "m")
    refused(adapter_to_hf, tmp_path / "m", tmp_path, "has no `adapter.json`, so it is not an adapter")


DESCRIBED = {
    "another method": ({"method": "my.Method"}, r"is an adapter of the method `my.Method`, which only its author can convert"),
    "no method": ({"method": None}, r"`method` in `adapter.json` is `None`, which should be a string"),
    "rank 0": ({"dim": 0}, r"`dim` in `adapter.json` is 0"),
    "another rank": ({"dim": 5}, r"linear_in.weight` has shape \[4, 64\], .* rank 5 .* should be \[5, 64\]"),
    "rank in words": ({"dim": "4"}, r"`dim` in `adapter.json` is `4`, which should be a whole number, 0 or more"),
    "an unknown field": ({"new": 1}, r"has an unknown field `new`"),
    "a flag": ({"canonical": 1}, r"`canonical` in `adapter.json` is `1`"),
    "a base in words": ({"base": "llama"}, r"`base` in `adapter.json` is `llama`, which should be an object"),
    "a base of numbers": ({"base": {"name": 1}}, r"`name` in `base` of `adapter.json` is `1`"),
    "not alpha": ({"alpha": float("nan")}, r"`alpha` in `adapter.json` is `nan`"),
    "targets": ({"target_modules": "all"}, r"`target_modules` in `adapter.json` is `all`"),
    "magnitudes left over": ({"method": "lora"}, r"weight_magnitude`.*which a lora with `canonical` does not have"),
    "not canonical": (
        {"canonical": False},
        r"adapter_gate.linear_in.weight`, .* which a dora without `canonical` does not have",
    ),
}


@pytest.mark.parametrize("what", DESCRIBED)
def test_descriptions(checkpoint, tmp_path, what):
    fields, message = DESCRIBED[what]
    configure(checkpoint / "iter_0000000" / "adapter.json", **fields)
    refused(adapter_to_hf, checkpoint, tmp_path, message)


def test_a_checkpoint_of_another_model(checkpoint, tmp_path):
    configure(checkpoint / "iter_0000000" / "huggingface" / "files" / "config.json", intermediate_size=128)
    refused(adapter_to_hf, checkpoint, tmp_path, r"linear_fc1.adapter.adapter_gate.linear_out.weight` has shape \[96, 4\]")


def test_more_layers_than_could_be_counted(checkpoint, tmp_path):
    configure(checkpoint / "iter_0000000" / "huggingface" / "files" / "config.json", num_hidden_layers=10**12)
    refused(adapter_to_hf, checkpoint, tmp_path, r"`config.json` says 1000000000000 layers")


def test_a_checkpoint_with_fewer_layers_in_its_configuration(checkpoint, tmp_path):
    configure(checkpoint / "iter_0000000" / "huggingface" / "files" / "config.json", num_hidden_layers=2)
    refused(adapter_to_hf, checkpoint, tmp_path, r"holds `decoder.layers.2.mlp.linear_fc1.adapter")


def test_an_adapter_is_no_model(adapter, checkpoint, tmp_path):
    refused(hf_to_mcore, adapter, tmp_path, f"`{adapter}` is an adapter without its model\n\nhint: `mbconvert adapter-to-hf`")
    refused(mcore_to_hf, checkpoint, tmp_path, "iter_0000000` is an adapter without its model")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats() | st.text("qlr_.*([{\\\\d0é", max_size=6),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text("qr._(", max_size=4), inside, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_a_configuration_says_it_is_understood_or_refused(peft_folder, data):
    good = json.loads((peft_folder() / CONFIG).read_text())
    name = data.draw(st.sampled_from([*good, "other"]))
    with TemporaryDirectory() as folder, contextlib.suppress(UserError):
        shutil.copy(peft_folder() / WEIGHTS, folder)
        Path(folder, CONFIG).write_text(json.dumps({**good, name: data.draw(ANYTHING)}))
        with contextlib.closing(open_adapter(open_source(folder))) as adapter:
            adapter.read_delta("model.layers.3.mlp.up_proj.weight")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_a_description_says_it_is_understood_or_refused(checkpoint, data):
    file = checkpoint / "iter_0000000" / "adapter.json"
    good = json.loads(file.read_text())
    name = data.draw(st.sampled_from([*good, "other"]))
    try:
        file.write_text(json.dumps({**good, name: data.draw(ANYTHING)}))
        with contextlib.suppress(UserError), contextlib.closing(open_adapter(open_source(checkpoint))) as adapter:
            adapter.read_delta("model.layers.3.mlp.up_proj.weight")
    finally:
        file.write_text(json.dumps(good))
