"""A model has one fingerprint whatever its format, layout and writer, and another after training."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import UserError, families, hf_to_mcore, mcore_to_hf, reshard
from converter.adapters.fingerprint import fingerprint
from formats.folder import LocalFolder
from tests.converter.adapters.made import changed
from tests.converter.family_suite import has_experts, save_small
from tests.locations import KINDS, served
from tests.megatron_cpu import Shape, save
from tests.models import tree


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("layout", [(1, 1), (4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("variant", ["gqa", "tied", "padded_vocab", "attention_bias", "mlp_bias"])
def test_a_conversion_keeps_it(model_folder, tmp_path, variant, layout):
    folder = model_folder(variant, dtype="bfloat16", max_shard_size="60KB")
    hf_to_mcore(folder, tmp_path / "m", tp=layout[0], pp=layout[1])
    assert fingerprint(tmp_path / "m") == fingerprint(folder)
    assert fingerprint(str(tmp_path / "m" / "iter_0000000")) == fingerprint(str(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", families.names())
def test_conversions_there_and_back_keep_it_in_every_family(tmp_path, family, dtype):
    folder = save_small(family, tmp_path / "hf", dtype=dtype)
    divided = {"tp": 2, "pp": 2} | ({"ep": 2, "etp": 1} if has_experts(folder) else {})
    for number, options in enumerate([divided, *({"layout": layout} for layout in families.find(family).LAYOUTS)]):
        hf_to_mcore(folder, tmp_path / str(number), **options)
        assert fingerprint(tmp_path / str(number)) == fingerprint(folder), options
    reshard(tmp_path / "0", tmp_path / "reshard", tp=1)
    mcore_to_hf(tmp_path / "reshard", tmp_path / "back")
    assert fingerprint(tmp_path / "reshard") == fingerprint(tmp_path / "back") == fingerprint(folder)
    hf_to_mcore(folder, tmp_path / "cast", dtype={"float32": "bf16", "bfloat16": "fp32"}[dtype])
    mcore_to_hf(tmp_path / "cast", tmp_path / "cast-back")
    assert fingerprint(tmp_path / "cast") == fingerprint(tmp_path / "cast-back")
    assert (fingerprint(tmp_path / "cast") == fingerprint(folder)) == (dtype == "bfloat16")


def test_a_config_that_is_given_changes_nothing(tmp_path):
    folder = save_small("qwen3_next", tmp_path / "hf", dtype="float32")
    hf_to_mcore(folder, tmp_path / "m")
    assert fingerprint(tmp_path / "m", given=LocalFolder(folder)) == fingerprint(folder)


def test_a_weight_that_an_offset_moves_counts_with_what_training_changed(tmp_path):
    """An export computes what differs from the original values, whatever these say."""
    folder = save_small("qwen3_next", tmp_path / "hf", dtype="float32")
    hf_to_mcore(folder, tmp_path / "m")
    extras = tmp_path / "m" / "iter_0000000" / "huggingface" / "extras.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(extras).items()}, extras)
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert fingerprint(tmp_path / "m") == fingerprint(tmp_path / "back") != fingerprint(folder)


RECORDED = {
    "llama": "0c17416103da2559cfa2926d197a80b43fbea399f43ebb92e87687c5712bfc36",
    "gpt2": "53580935a4405af402a9d5f92af6bc296b69dfcc1c7113441ae340ae2bcee67c",
    "falcon": "619eb88be849ac473f080f766177d6561ecd4e0924aa4304fc370f6e3087d768",
    "mixtral": "c40972fa23f376bc4ec2561076a47a08910ee7df388a27978f07280050bcaf80",
    "gpt_oss": "cfe965e0dfe0dcdad35849486892f4ebe8a31cb0282c41e66984dda1acd7f3e1",
    "deepseek_v3": "654f74b9608c9d410fabc36032b7b2b54de2aad96bc50d879ba99272eaf89605",
    "nemotron_h": "d25aa79715d15245d990a8f226a1f7cee86fbbb60fe541f22062f57a7131bde2",
    "qwen3_next": "61b5d45a4b2d026604f2bcc3ecd77922292e0651db541d4ef0346f2ee6c5d945",
}
"""What adapters hold that were made on models of these families whose weights count upwards."""


@pytest.mark.parametrize("family", RECORDED)
def test_what_adapters_recorded_stays_valid(tmp_path, family):
    def count(weights):
        for name, weight in weights.items():
            weights[name] = torch.arange(weight.numel()).remainder(509).div(512).view(weight.shape)

    folder = changed(save_small(family, tmp_path / "random", dtype="float32"), tmp_path / "hf", count)
    hf_to_mcore(folder, tmp_path / "m", tp=2)
    assert fingerprint(folder) == fingerprint(tmp_path / "m") == RECORDED[family]


def test_an_exact_copy_in_fp32_keeps_it(model_folder, tmp_path):
    folder = model_folder("gqa", dtype="bfloat16")
    copy = changed(folder, tmp_path / "fp32", lambda weights: weights.update({n: w.float() for n, w in weights.items()}))
    assert fingerprint(copy) == fingerprint(folder)


def test_a_tied_output_layer_that_is_stored_counts_once(model_folder, tmp_path):
    folder = model_folder("tied")
    twice = changed(
        folder,
        tmp_path / "twice",
        lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}),
    )
    assert len(load_file(twice / "model.safetensors")) == len(load_file(folder / "model.safetensors")) + 1
    assert fingerprint(twice) == fingerprint(folder)


def names(folder):
    return sorted(load_file(folder / "model.safetensors"))


def test_training_any_one_tensor_changes_it(model_folder, tmp_path):
    folder = model_folder("gqa")
    fingerprints = {fingerprint(folder)}
    for number, name in enumerate(names(folder)):
        copy = changed(folder, tmp_path / str(number), lambda weights, name=name: weights[name].add_(1e-4))
        fingerprints.add(fingerprint(copy))
    assert len(fingerprints) == len(names(folder)) + 1


def test_rows_that_change_places_change_it(model_folder, tmp_path):
    folder = model_folder("gqa")
    name = "model.layers.2.self_attn.k_proj.weight"
    flipped = changed(folder, tmp_path / "flipped", lambda weights: weights.update({name: torch.flip(weights[name], (0,))}))
    assert fingerprint(flipped) != fingerprint(folder)


@pytest.mark.parametrize("extra", [{"optimizer": True}, {"singleton": True, "optimizer": True}])
def test_of_what_megatron_core_saved_only_weights_count(ranks, model_folder, tmp_path, extra):
    folder = model_folder("gqa")
    hf_to_mcore(folder, tmp_path / "m")
    shape = Shape(config_of(folder), tp=2)
    saved = tmp_path / "iter_0000007"
    ranks.run(save, 2, shape, str(tmp_path / "m" / "iter_0000000"), str(saved), extra)
    shutil.copytree(tmp_path / "m" / "iter_0000000" / "huggingface", saved / "huggingface")
    assert fingerprint(saved) == fingerprint(folder)
    trained = tmp_path / "iter_0000008"
    ranks.run(save, 2, shape, str(tmp_path / "m" / "iter_0000000"), str(trained), {**extra, "add": 1e-4})
    shutil.copytree(saved / "huggingface", trained / "huggingface")
    assert fingerprint(trained) != fingerprint(folder)


def test_weights_of_another_shape_are_named(model_folder, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    broken = changed(model_folder("gqa"), tmp_path / "broken", lambda weights: weights.update({name: weights[name][:-1]}))
    with pytest.raises(UserError, match=r"`model.layers.1.mlp.up_proj.weight` has shape \[95, 64\], .* \[96, 64\]"):
        fingerprint(broken)


def test_missing_weights_are_named(model_folder, tmp_path):
    broken = changed(model_folder("gqa"), tmp_path / "broken", lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"lacks `model.norm.weight`"):
        fingerprint(broken)


@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_far_away_is_read_in_small_pieces(model_folder, monkeypatch, moto, kind):
    folder = model_folder("gqa")
    with served(kind, tree(folder), monkeypatch, moto) as server:
        assert fingerprint(server.url) == fingerprint(folder)
