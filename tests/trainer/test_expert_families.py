"""A few steps of families with experts, divided over ranks, are those of transformers and torch's AdamW: what trainer pieces add
to a mixture of experts has the right gradients too."""

from __future__ import annotations

import pytest

from converter.families import gpt_oss
from tests.converter.family_suite import small_model
from tests.trainer.small import STEPS
from tests.trainer.test_family_training import FEW, saved, steps_are_those_of_transformers

FAMILIES = (
    "qwen3_next",
    "gpt_oss",
    "flex_olmo",
    "afmoe",
    "cohere2_moe",
    "flint",
    "granitemoeshared",
    "llama4_text",
    "mellum",
    "qwen2_moe",
)
QUICK = ("gpt_oss", "flex_olmo", "qwen3_next")
NO_TIES = {"gpt_oss": {"rope_parameters": {**gpt_oss.SMALL["rope_parameters"], "rope_theta": 150000.0}}}
"""Changes after which no token has two experts so near each other (6e-6 of a logit) that rounding chooses between them."""
SHORT = {
    "train__train_iters": FEW, "scheduler__lr_decay_iters": STEPS,
    "model__moe_router_bias_update_rate": 0.0,  # transformers has none
}  # fmt: skip


@pytest.mark.parametrize("family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES])
def test_a_few_steps_are_those_of_transformers_and_adamw(family, ranks, tmp_path):
    folder = saved(small_model(family, dtype="float32", **NO_TIES.get(family, {})), tmp_path / "hf")
    steps_are_those_of_transformers(folder, ranks, SHORT)
