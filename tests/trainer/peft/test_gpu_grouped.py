"""On a GPU: adapters of experts that Transformer Engine computes at once are trained as those of one layer for each expert."""

from __future__ import annotations

import pytest

from tests.trainer import small
from tests.trainer.peft.test_experts import train
from tests.trainer.peft.test_grouped import one_product_is_that_of_each
from tests.trainer.peft.test_moe_families import export_is_in_peft_what_it_is_here

pytestmark = pytest.mark.gpu

TARGETS = {"target_modules": ["linear_fc1", "linear_fc2", "linear_qkv", "router"]}


@pytest.mark.parametrize("canonical", [False, True], ids=["fused", "canonical"])
def test_grouped_experts_go_on_where_single_ones_stopped(canonical, ranks, tmp_path):
    start, saved, settings = str(tmp_path / "start"), str(tmp_path / "adapter"), {"canonical": canonical} | TARGETS
    ranks.run(train, 1, None, {}, None, {}, {"save": start})
    ((losses, norms, _),) = ranks.run(train, 1, start, {}, "LoRA", settings)
    ranks.run(train, 1, start, {}, "LoRA", settings, {"save": saved, "stop": 3})
    grouped = {"moe_grouped_gemm": True}
    ((resumed, resumed_norms, names),) = ranks.run(train, 1, start, grouped, "LoRA", settings, {"load": saved})
    assert resumed == pytest.approx(losses[3:], abs=2e-3)  # Transformer Engine's kernels, in fp32 without TF32
    assert resumed_norms == pytest.approx(norms[3:], rel=2e-2)
    assert any(".experts.linear_fc1.adapter." in name for name in names)


def test_one_product_for_all_experts_is_that_of_each(ranks, model_folder):
    one_product_is_that_of_each(ranks, model_folder, "gpu")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "granitemoe"])
def test_what_is_exported_is_in_peft_what_it_is_here(family, ranks, tmp_path):
    def run(path, settings):
        return ranks.run(small.train, 1, path, settings | {"dist__device": "gpu"})[0]

    export_is_in_peft_what_it_is_here(family, run, tmp_path, tolerance=1e-3)
