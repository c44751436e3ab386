"""Weights that megatron-core has and Hugging Face's model has not are left as they are."""

from __future__ import annotations

import json

import pytest

from tests.trainer import small
from tests.trainer.small import STEPS
from trainer import absent_weights

SHORT = {"train__train_iters": 3, "scheduler__lr_decay_iters": STEPS}


@pytest.mark.parametrize(
    ("variant", "absent"),
    [
        ("gqa", set()),
        ("both_biases", set()),
        ("attention_bias", {"decoder.layers.mlp.linear_fc1.bias", "decoder.layers.mlp.linear_fc2.bias"}),
        ("mlp_bias", {"decoder.layers.self_attention.linear_qkv.bias", "decoder.layers.self_attention.linear_proj.bias"}),
    ],
)
def test_biases_of_zeros_stay_zeros_while_the_others_are_trained(variant, absent, model_folder, ranks, tmp_path):
    folder = model_folder(variant)
    assert set(absent_weights.keys(json.loads((folder / "config.json").read_text()))) == absent
    for layout in ({}, {"model__tensor_model_parallel_size": 2}):
        (history, *_) = ranks.run(small.train, 2 if layout else 1, str(folder), {**SHORT, **layout})
        of_layers = {name: weight for name, weight in history.weights.items() if "bias" in name}
        for name, bias in of_layers.items():
            is_absent = any(name.endswith(key.partition("layers.")[2]) for key in absent)
            assert bias.count_nonzero() == (0 if is_absent else bias.numel()), name
