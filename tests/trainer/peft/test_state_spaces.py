"""Adapters beside the output projections of Mamba-2 and gated delta nets are, merged and in PEFT, what they are in training."""

from __future__ import annotations

import pytest

from converter import adapter_to_hf, merge
from formats.errors import UserError
from tests import models
from tests.converter.family_suite import small_model
from tests.trainer import small, test_parity
from tests.trainer.small import STEPS
from tests.trainer.test_family_training import END, FEW, TP2, loss_in_peft
from trainer.peft import DoRA, LoRA

SHORT = {
    "train__train_iters": FEW,
    "scheduler__lr_decay_iters": STEPS,
    "model__moe_router_bias_update_rate": 0.0,
    "optimizer__lr": 2e-2,
}
NOT_IN_PEFT = ("mamba2", "nemotron_h")
"""PEFT refuses `out_proj` of these families, whose kernels take its weight without calling it."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    def made(family):
        model = small_model(family, dtype="float32")
        model.config.eos_token_id = model.generation_config.eos_token_id = END
        return models.save(model, tmp_path_factory.mktemp(family) / "hf")

    return made


@pytest.mark.parametrize(
    ("family", "method"),
    [("mamba2", LoRA), ("nemotron_h", DoRA), ("qwen3_5_text", LoRA), pytest.param("bamba", DoRA, marks=pytest.mark.slow)],
)
def test_what_is_merged_and_exported_is_what_it_is_here(family, method, folders, ranks, tmp_path):
    folder = folders(family)
    changes = {**SHORT, **TP2, "peft": method(dim=4, alpha=8, target_modules=["out_proj"])}
    whole, _ = ranks.run(small.train, 2, str(folder), changes)
    ranks.run(small.train, 2, str(folder), changes | {"checkpoint__save": str(tmp_path / "run"), "train__exit_interval": FEW - 1})
    merge(folder, tmp_path / "run", tmp_path / "merged")
    expected = pytest.approx(whole.losses[-1], abs=test_parity.TOLERANCE)
    assert loss_in_peft(tmp_path / "merged", None, FEW - 1) == expected
    if family not in NOT_IN_PEFT:
        adapter_to_hf(tmp_path / "run", tmp_path / "adapter")
        assert loss_in_peft(folder, tmp_path / "adapter", FEW - 1) == expected
    assert abs(loss_in_peft(folder, None, FEW - 1) - whole.losses[-1]) > 10 * test_parity.TOLERANCE


@pytest.mark.parametrize(("family", "module"), [("mamba2", "mixer"), ("qwen3_5_text", "self_attention")])
def test_a_layer_of_sections_is_refused_by_name(family, module, folders, ranks):
    changes = {**SHORT, "peft": LoRA(dim=4, target_modules=["in_proj", "out_proj"])}
    with pytest.raises(UserError, match=rf"no adapter can be added to `decoder\.layers\.0\.{module}\.in_proj`") as refused:
        ranks.run(small.train, 1, str(folders(family)), changes)
    assert "peft.exclude_modules=['in_proj']" in refused.value.hint
