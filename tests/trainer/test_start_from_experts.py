"""A run that starts from a mixture of experts in FP8 which is not whole is refused before a weight of the model changes."""

from __future__ import annotations

import shutil

import pytest

from tests import quantized_models
from tests.trainer import test_start

EXPERT = "model.layers.3.mlp.experts.5.down_proj"
EP2 = {"model__expert_model_parallel_size": 2}
LACKING = {
    "a router's bias": ("model.layers.2.mlp.gate.e_score_correction_bias", "the source lacks `{}`"),
    "an expert": (f"{EXPERT}.weight", "`{}_scale_inv` belongs to no quantized weight"),
    "an expert with its scales": (f"{EXPERT}.", f"the source lacks `{EXPERT}.weight`"),
    "scales": (f"{EXPERT}.weight_scale_inv", f"`{EXPERT}.weight` is fp8_e4m3 and its `{{}}` is missing"),
    "a layer of prediction": (
        "model.layers.4.",
        "`num_nextn_predict_layers` is `1`, and it has no layers of multi-token",
    ),
}
"""The name that is taken out, or the beginning of names with a dot at its end; and what is said."""


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """A DeepSeek-V3 in FP8, with a layer of multi-token prediction."""
    folder = tmp_path_factory.mktemp("deepseek")
    return quantized_models.fp8(quantized_models.deepseek_v3(folder / "plain"), folder / "hf")


@pytest.mark.parametrize("lacking", LACKING)
def test_what_is_missing_is_named_on_every_rank_before_a_weight_changes(lacking, deepseek, ranks, tmp_path):
    source, (start, message) = shutil.copytree(deepseek, tmp_path / "hf"), LACKING[lacking]

    def take_out(tensors):
        gone = {name for name in tensors if name == start or (start.endswith(".") and name.startswith(start))}
        assert gone
        for name in gone:
            del tensors[name]

    quantized_models.edit(source, take_out)
    for error, _, changed in ranks.run(test_start._refused, 2, str(deepseek), EP2, str(source)):
        assert message.format(start) in error
        assert not changed
