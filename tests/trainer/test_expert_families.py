"""A few steps of families with experts, divided over ranks, are those of transformers and torch's AdamW: what trainer pieces add
to a mixture of experts has the right gradients too."""

from __future__ import annotations

import pytest

from converter.families import gpt_oss
from tests import models
from tests.converter.family_suite import small_model
from tests.trainer import small, test_parity
from tests.trainer.small import STEPS
from tests.trainer.test_family_training import END, FEW, PP2, TP2

FAMILIES = (
    "qwen3_next",
    "gpt_oss",
    "flex_olmo",
    "afmoe",
    "cohere2_moe",
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


@pytest.mark.parametrize("family", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in FAMILIES])
def test_a_few_steps_are_those_of_transformers_and_adamw(family, ranks, tmp_path):
    model = small_model(family, dtype="float32", **NO_TIES.get(family, {}))
    model.config.eos_token_id = model.generation_config.eos_token_id = END
    folder = models.save(model, tmp_path / "hf")
    losses, norms = test_parity._reference(folder, FEW)
    for layout in (TP2, PP2):
        for history in ranks.run(small.train, 2, str(folder), {**SHORT, **layout}):
            assert history.losses == pytest.approx(losses, abs=test_parity.TOLERANCE)
            assert history.grad_norms[:2] == pytest.approx(norms[:2], rel=1e-4)  # those after are of weights that rounding parted
    assert len(set(losses)) == FEW
