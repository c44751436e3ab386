"""The layer of multi-token prediction (MTP) of Qwen3-Next and Qwen3.5, under its published names, beside transformers'
`MtpModel`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import UserError, families, hf_to_mcore, mcore_to_hf
from converter.config import make_model, to_megatron
from tests import prediction_models
from tests.converter import prediction
from tests.converter.family_suite import LAYOUTS, PP, TOKENS, TP, save_small, small_config
from tests.models import model_tree

FIELDS = {"qwen3_next": "num_nextn_predict_layers", "qwen3_5_text": "mtp_num_hidden_layers"}
TYPES = ["linear_attention", "full_attention"] * 2  # transformers takes the kind of its norms from the last layer
AROUND = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "post_norm": "norm"}


def published(further):
    """The tensors of the layer under their published names."""
    tensors = {}
    for name, tensor in further.layers[0].state_dict().items():
        head, _, rest = name.partition(".")
        own = f"mtp.{AROUND[head]}.{rest}" if head in AROUND else f"mtp.layers.0.{rest}"
        tensors |= prediction._separate(own, tensor)
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


@pytest.fixture(scope="module", params=FIELDS)
def made(request, tmp_path_factory):
    """A family, its model and layer as transformers builds them, and both as they are published, in fp32."""
    main, further = prediction.made(request.param, layer_types=TYPES, mtp_layer_types=TYPES[1:2])
    folder = tmp_path_factory.mktemp("prediction") / "hf"
    main.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | published(further)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return request.param, main, further, configured(folder, {FIELDS[request.param]: 1})


def configured(folder, fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_comes_back_to_the_bit(made, tmp_path, layout):
    hf_to_mcore(made[3], tmp_path / "m", verify=True, **layout)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(made[3])


def test_megatron_core_s_computes_what_transformers_computes(made, ranks, tmp_path):
    _, main, further, folder = made
    hf_to_mcore(folder, tmp_path / "m", tp=2)
    config, iteration = json.loads((folder / "config.json").read_text()), str(tmp_path / "m" / "iter_0000000")
    with torch.no_grad():
        expected = torch.stack(prediction.logits(main, further, torch.tensor(TOKENS))).numpy()
    for settings in ({}, {TP: 2, PP: 2}):
        answers = ranks.run(prediction_models.logits_of, 4 if settings else 1, config, settings, iteration, TOKENS)
        assert all("_extra_state" in key for left, _ in answers for key in left)
        logits = next(output for _, output in answers if output is not None)
        for layer, reference in enumerate(expected):
            read = slice(0, reference.shape[1] - layer)  # what follows the last tokens is made up
            np.testing.assert_allclose(
                logits[layer, :, read, : reference.shape[-1]], reference[:, read], atol=1e-4 * np.abs(reference).max(), rtol=0
            )


def test_it_travels_where_config_json_does_not_name_it(made, tmp_path):
    family, *_, folder = made
    copy = tmp_path / "hf"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    configured(copy, {FIELDS[family]: 0})
    hf_to_mcore(copy, tmp_path / "m", tp=2, verify=True)
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(copy)


@pytest.mark.parametrize("family", FIELDS)
def test_more_layers_than_one_are_refused(family):
    config = small_config(family).to_dict() | {FIELDS[family]: 2}
    with pytest.raises(UserError, match=f"`{FIELDS[family]}` is `2`; only 1 is supported"):
        to_megatron(families.find(family).CONFIG, config)


@pytest.mark.parametrize("alike", [True, False], ids=["stacked too", "single experts"])
def test_qwen_3_5_s_files_may_have_a_tensor_of_all_experts(tmp_path, alike):
    """As published: of the model's layers always, of the layer of multi-token prediction in some files."""
    folder = save_small("qwen3_5_moe", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    configured(folder, config)
    family = families.find("qwen3_5_moe")
    tensors, model = load_file(folder / "model.safetensors"), make_model(family.CONFIG, config)
    layer = {
        name.replace("model.language_model.layers.1.", "mtp.layers.0."): tensor.clone()
        for name, tensor in tensors.items()
        if ".layers.1." in name and "visual" not in name
    }
    size = model.hidden
    around = {"fc": (size, 2 * size), "norm": (size,), "pre_fc_norm_embedding": (size,), "pre_fc_norm_hidden": (size,)}
    ahead = layer | {f"mtp.{name}.weight": torch.randn(shape).bfloat16() for name, shape in around.items()}
    tensors = stacked(tensors) | (stacked(ahead) if alike else ahead)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for layout in ({}, {"tp": 2, "pp": 2, "ep": 2, "etp": 1}):
        work = tmp_path / f"{len(layout)}"
        hf_to_mcore(folder, work / "m", verify=True, **layout)
        mcore_to_hf(work / "m", work / "back", verify=True)
        assert model_tree(work / "back") == model_tree(folder)


def stacked(tensors):
    """The tensors with one of all experts in the place of those of single ones."""
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for start in sorted({name.partition(".experts.")[0] for name in tensors.keys() - rest.keys()}):
        experts = range(sum(name.startswith(f"{start}.experts.") for name in tensors) // 3)
        gate, up, down = (
            [tensors[f"{start}.experts.{expert}.{kind}_proj.weight"] for expert in experts] for kind in ("gate", "up", "down")
        )
        rest[f"{start}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        rest[f"{start}.experts.down_proj"] = torch.stack(down)
    return rest
