"""A model has one fingerprint whatever its format, layout and writer, and another after training."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import UserError, hf_to_mcore
from converter.adapters.fingerprint import fingerprint
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


def changed(folder, target, change):
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, target / "model.safetensors", {"format": "pt"})
    return target


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
