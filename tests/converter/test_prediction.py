"""Layers of multi-token prediction (MTP): names, bytes, and what they compute, beside transformers' `MtpModel`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import UserError, hf_to_mcore, mcore_to_hf, verify
from converter.execution import Reporter
from formats.folder import LocalFolder
from formats.huggingface import HuggingFaceReader
from tests import prediction_models
from tests.converter import prediction
from tests.converter.family_suite import LAYOUT, LAYOUTS, PP, TOKENS, TP
from tests.converter.test_golden import stored_keys
from tests.models import model_tree
from trainer.checkpoints.live import plan_of


@pytest.fixture(scope="module", params=prediction.FAMILIES)
def saved(request, tmp_path_factory):
    """A model with two layers of multi-token prediction, as it is published, in fp32."""
    folder = tmp_path_factory.mktemp("prediction") / "hf"
    return prediction.save(folder, *prediction.made(request.param, 2))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_they_come_back_to_the_bit_with_the_copies_of_the_model_s_own(saved, tmp_path, layout):
    hf_to_mcore(saved, tmp_path / "m", verify=True, **layout)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(saved)


RUNS = {"tp1": {}, "tp2": {TP: 2, "sequence_parallel": True}, "tp2 pp2": {TP: 2, PP: 2}, "uneven": {PP: 2, LAYOUT: "Et|tttmmL"}}


def test_megatron_core_s_compute_what_transformers_computes(saved, ranks, tmp_path):
    hf_to_mcore(saved, tmp_path / "m", tp=2)
    config, iteration = json.loads((saved / "config.json").read_text()), str(tmp_path / "m" / "iter_0000000")
    with torch.no_grad():
        expected = torch.stack(prediction.logits(*prediction.opened(saved, 2), torch.tensor(TOKENS))).numpy()
    for name, settings in RUNS.items():
        world = settings.get(TP, 1) * settings.get(PP, 1)
        answers = ranks.run(prediction_models.logits_of, world, config, settings, iteration, TOKENS)
        assert all("_extra_state" in key for left, _ in answers for key in left), name
        logits = next(output for _, output in answers if output is not None)
        for layer, reference in enumerate(expected):
            read = slice(0, reference.shape[1] - layer)  # what follows the last tokens is made up
            np.testing.assert_allclose(
                logits[layer, :, read, : reference.shape[-1]],
                reference[:, read],
                atol=1e-4 * np.abs(reference).max(),
                rtol=0,
                err_msg=name,
            )


@pytest.mark.parametrize("configured", [0, 1])
def test_layers_that_config_json_does_not_name_travel_and_are_noted(saved, tmp_path, configured):
    folder = changed(saved, tmp_path / "hf", {prediction.FIELD: configured})
    notes: list[str] = []
    hf_to_mcore(folder, tmp_path / "m", tp=2, reporter=Reporter(notes.append))
    layer = sum(name.startswith("model.layers.5.") for name in tensors_of(folder))
    message = f"{(2 - configured) * layer} tensors of layers of multi-token prediction pass through untouched"
    assert any(message in note and f"`{prediction.FIELD}` is `{configured}`" in note for note in notes), notes
    assert verify(folder, tmp_path / "m").same
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(folder)
    plan = plan_of(HuggingFaceReader(LocalFolder(folder)))
    assert len(plan.extras) == (2 - configured) * layer
    assert any(tensor.spec.name.startswith("mtp.") for tensor in plan.tensors) == bool(configured)


def test_a_config_json_without_the_field_names_none(saved, tmp_path):
    folder = changed(saved, tmp_path / "hf", {prediction.FIELD: None})
    hf_to_mcore(folder, tmp_path / "m")
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert model_tree(tmp_path / "back") == model_tree(folder)


def test_layers_without_copies_of_the_model_s_own_come_back_without(tmp_path):
    folder = prediction.save(tmp_path / "hf", *prediction.made("deepseek_v3"), copies=False)
    hf_to_mcore(folder, tmp_path / "m", verify=True)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(folder)


def test_layers_that_config_json_names_and_files_lack_are_named(saved, tmp_path):
    without = {
        name: tensor for name, tensor in tensors_of(saved).items() if not name.startswith(("model.layers.4.", "model.layers.5."))
    }
    folder = changed(saved, tmp_path / "hf", {}, without)
    with pytest.raises(
        UserError, match=r"lacks `model\.layers\.4\..*`num_nextn_predict_layers` is `2`, and it has no layers of mu"
    ):
        hf_to_mcore(folder, tmp_path / "m")
    with pytest.raises(UserError, match=r"the source lacks `model\.layers\.6\.") as error:
        hf_to_mcore(changed(saved, tmp_path / "three", {prediction.FIELD: 3}), tmp_path / "m")
    assert "model.layers.5" not in str(error.value)


@pytest.mark.parametrize("configured", [0, 2])
def test_a_layer_that_is_not_whole_is_refused_whether_it_is_named_or_not(saved, tmp_path, configured):
    tensors = tensors_of(saved)
    del tensors["model.layers.4.mlp.experts.3.up_proj.weight"]
    folder = changed(saved, tmp_path / "hf", {prediction.FIELD: configured}, tensors)
    expected = "the source holds `model.layers.4." if not configured else "the source lacks `model.layers.4.mlp.experts.3.up_proj"
    with pytest.raises(UserError, match=expected):
        hf_to_mcore(folder, tmp_path / "m")


@pytest.mark.parametrize(("copy", "own"), [("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")])
def test_a_copy_that_is_none_is_refused(saved, tmp_path, copy, own):
    tensors = tensors_of(saved)
    tensors[f"model.layers.5.{copy}.weight"][3, 1] += 1
    folder = changed(saved, tmp_path / "hf", {}, tensors)
    with pytest.raises(UserError, match=f"`model.layers.5.{copy}.weight` differs from `{own}.weight`"):
        hf_to_mcore(folder, tmp_path / "m")


def test_a_copy_of_a_tied_output_layer_is_one_of_the_embedding(tmp_path):
    main, further = prediction.made("deepseek_v3", tie_word_embeddings=True)
    folder = prediction.save(tmp_path / "hf", main, further)
    hf_to_mcore(folder, tmp_path / "m", verify=True)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(folder)


def test_keys_are_those_that_megatron_core_asks_for(golden, tmp_path):
    """`deepseek_v3_mtp` of the golden keys, taken with Transformer Engine on a GPU."""
    asked = json.loads((golden / "golden_keys.json").read_text())["deepseek_v3_mtp"]
    sizes = {
        "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128,
        "pad_token_id": 0,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "v_head_dim": 16,
    }  # fmt: skip
    main, further = prediction.made("deepseek_v3", **sizes)
    folder = prediction.save(tmp_path / "hf", main.bfloat16(), further.bfloat16())
    hf_to_mcore(folder, tmp_path / "m", dtype="bf16")
    tensors, objects = stored_keys(tmp_path / "m" / "iter_0000000")
    assert {key: [list(t.size), str(t.properties.dtype)] for key, t in tensors.items()} == {
        key: [t["global_shape"], t["dtype"]] for key, t in asked["tensors"].items()
    }
    assert objects == {*asked["objects"], "common_state/shard_0_1"}


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def changed(saved, folder, fields, tensors=None):
    """The same model with other fields in `config.json` (None: without), and other tensors."""
    folder.mkdir()
    config = json.loads((saved / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    save_file(tensors_of(saved) if tensors is None else tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
