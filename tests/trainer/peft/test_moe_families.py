"""Adapters beside experts, shared experts, routers and latent attention are in PEFT, once exported, what they are here."""

from __future__ import annotations

import pytest

from converter import adapter_to_hf, adapter_to_mcore
from tests import models
from tests.converter.adapters.made import save_adapter
from tests.converter.adapters.test_experts import EXPERTS
from tests.converter.family_suite import small_model
from tests.trainer import small, test_parity
from tests.trainer.peft import grouped_layers
from tests.trainer.peft.runs import ONE_STEP
from tests.trainer.small import STEPS
from tests.trainer.test_family_training import END, loss_in_peft

LATENT = [f"linear_{name}_proj" for name in ("q_down", "q_up", "kv_down", "kv_up")]
EVERY = ["linear_proj", "linear_fc1", "linear_fc2", "router"]
TARGETS = {
    "mixtral": ["linear_qkv", *EVERY],
    "qwen2_moe": ["linear_qkv", *EVERY],
    "deepseek_v3": [*LATENT, *EVERY],
    "gpt_oss": ["linear_qkv", *EVERY],
    "llama4_text": ["linear_qkv", *EVERY],
    "granitemoe": ["linear_qkv", *EVERY],
}
EP2 = {"model__expert_model_parallel_size": 2}
FEW = 4
SHORT = {"train__train_iters": FEW, "scheduler__lr_decay_iters": STEPS}


def _train(folder, changes, grouped):
    if grouped:
        grouped_layers.use()
    return small.train(folder, changes)


def export_is_in_peft_what_it_is_here(family, run, folder, tolerance=test_parity.TOLERANCE):
    """`run(path of a model, settings)` trains on some ranks and returns the history of one of them."""
    from trainer.peft import LoRA

    model = small_model(family, dtype="float32")
    model.config.eos_token_id = model.generation_config.eos_token_id = END
    base = models.save(model, folder / "hf")
    method = LoRA(dim=4, alpha=8, target_modules=TARGETS[family])
    settings = {**SHORT, "peft": method, "optimizer__lr": 2e-2}
    whole = run(str(base), settings)
    run(str(base), {**settings, "checkpoint__save": str(folder / "run"), "train__exit_interval": FEW - 1})
    adapter_to_hf(folder / "run", folder / "adapter")
    assert loss_in_peft(base, folder / "adapter", FEW - 1) == pytest.approx(whole.losses[-1], abs=tolerance)
    assert abs(loss_in_peft(base, None, FEW - 1) - whole.losses[-1]) > 10 * tolerance


@pytest.mark.parametrize("how", ["single", "grouped"])
@pytest.mark.parametrize("family", TARGETS)
def test_what_is_exported_is_in_peft_what_it_is_here(family, how, ranks, tmp_path):
    def run(path, settings):
        return ranks.run(_train, 2, path, settings | EP2, how == "grouped")[0]

    export_is_in_peft_what_it_is_here(family, run, tmp_path)


@pytest.mark.parametrize("canonical", [False, True], ids=["fused", "canonical"])
def test_training_starts_from_an_adapter_of_peft(canonical, ranks, tmp_path):
    """At expert parallelism 2, with experts that are computed at once; the first step is at learning rate 0."""
    from trainer.peft import LoRA

    folder = models.save(small_model("mixtral", dtype="float32"), tmp_path / "hf")
    adapter = save_adapter(folder, tmp_path / "adapter", **EXPERTS)
    adapter_to_mcore(adapter, tmp_path / "m", base=folder, canonical=canonical)
    method = LoRA(dim=4, alpha=8, canonical=canonical, target_modules=EVERY)
    changes = {**ONE_STEP, **EP2, "peft": method, "checkpoint__pretrained_adapter": str(tmp_path / "m")}
    for history in ranks.run(_train, 2, str(folder), changes, True):
        assert history.losses[0] == pytest.approx(loss_in_peft(folder, adapter, 0), abs=test_parity.TOLERANCE)
    assert abs(history.losses[0] - loss_in_peft(folder, None, 0)) > 10 * test_parity.TOLERANCE
