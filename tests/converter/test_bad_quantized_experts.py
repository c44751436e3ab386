"""DeepSeek-V3 in FP8: layers of multi-token prediction that `config.json` does not name travel in FP8, and whatever experts and
routers lack is named, in those layers too."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from converter import hf_to_mcore, mcore_to_hf, verify
from converter.execution import Reporter
from tests import quantized_models
from tests.converter.prediction import FIELD
from tests.converter.test_cli import mbconvert
from tests.models import model_tree
from tests.refusal import refused

LAYERS = 4
"""Of the model; its layer of multi-token prediction, number 4, is one more."""

SCALES = "model.layers.{}.mlp.experts.5.down_proj.weight_scale_inv"


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepseek")
    return quantized_models.fp8(quantized_models.deepseek_v3(folder / "plain"), folder / "hf")


@pytest.fixture
def copy(deepseek, tmp_path):
    """The same, free to be changed."""
    return shutil.copytree(deepseek, tmp_path / "hf")


def configure(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize("configured", [0, None])
@pytest.mark.parametrize("layout", [{}, {"tp": 2, "ep": 2}], ids=str)
def test_layers_that_config_json_does_not_name_come_back_in_fp8(copy, tmp_path, configured, layout):
    configure(copy, **{FIELD: configured})
    notes = []
    hf_to_mcore(copy, tmp_path / "m", verify=True, reporter=Reporter(notes.append), **layout)
    assert any("44 tensors of layers of multi-token prediction pass through untouched" in note for note in notes), notes
    assert verify(copy, tmp_path / "m").same
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(copy)


LACKING = {
    SCALES: "`{}` is fp8_e4m3 and its `{}` is missing",
    "model.layers.{}.mlp.experts.3.up_proj.weight": "`{}_scale_inv` belongs to no quantized weight",
    "model.layers.{}.mlp.gate.e_score_correction_bias": "the source lacks `{}`",
}


@pytest.mark.parametrize("layer", [2, LAYERS])
@pytest.mark.parametrize("name", LACKING)
def test_what_is_missing_is_named(copy, tmp_path, name, layer):
    gone = name.format(layer)
    quantized_models.edit(copy, lambda tensors: tensors.pop(gone))
    message = LACKING[name].format(gone.removesuffix("_scale_inv"), gone)
    refused(hf_to_mcore, copy, tmp_path, message, ep=2)


def test_an_expert_that_is_missing_with_its_scales_is_named(copy, tmp_path):
    gone = "model.layers.2.mlp.experts.3.up_proj.weight"
    quantized_models.edit(copy, lambda tensors: (tensors.pop(gone), tensors.pop(f"{gone}_scale_inv")))
    refused(hf_to_mcore, copy, tmp_path, f"the source lacks `{gone}`", ep=2)


@pytest.mark.parametrize("configured", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_not_finite_are_named_in_layers_of_prediction_too(copy, tmp_path, value, configured):
    configure(copy, **{FIELD: configured})
    scales = SCALES.format(LAYERS)
    quantized_models.edit(copy, lambda tensors: tensors[scales].__setitem__((0, 0), value))
    refused(hf_to_mcore, copy, tmp_path, f"`{scales}` holds scales that are not finite", ep=2)


@pytest.mark.parametrize("layer", [2, LAYERS])
def test_scales_of_another_grid_are_named(copy, tmp_path, layer):
    scales = SCALES.format(layer)
    quantized_models.edit(copy, lambda tensors: tensors.update({scales: np.ones((1, 2), np.float32)}))
    refused(hf_to_mcore, copy, tmp_path, rf"`{scales}` has shape \[1, 2\], which is not that of blocks of 32 x 32", ep=2)


@pytest.mark.parametrize("command", ["hf-to-mcore", "reshard"])
def test_a_layout_with_another_number_of_such_layers_is_refused(deepseek, tmp_path, command):
    source = deepseek
    if command == "reshard":
        source = tmp_path / "m"
        hf_to_mcore(deepseek, source)
    done = mbconvert(command, source, tmp_path / "out", "--pp", 2, "--pp-layout", "Et*3|tmmL")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: pipeline layout `Et*3|tmmL` has 2 layers of multi-token prediction, the model has 1\n\nhint: each is an `m`"
    )
    assert mbconvert(command, source, tmp_path / "out", "--pp", 2, "--pp-layout", "Et*3|tmL").returncode == 0


def test_layers_that_config_json_names_and_files_lack_are_named(copy, tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith(f"model.layers.{LAYERS}.")]:
            del tensors[name]

    quantized_models.edit(copy, drop)
    refused(hf_to_mcore, copy, tmp_path, r"lacks `model\.layers\.4\..*it has no layers of multi-token prediction", ep=2)
