"""What Mamba-2, gated delta nets and sparse attention take in estimates."""

from __future__ import annotations

from typing import Any

import pytest

from tests.converter.family_suite import small_config
from tests.trainer.peft.test_estimate import kept, parts
from tests.trainer.settings import settings
from trainer.config import RunConfig
from trainer.estimate.memory import memory
from trainer.model import from_hf_config
from trainer.peft import LoRA
from trainer.settings.resolve import resolve

RANK = 4


def of_family(family: str, **changes: Any) -> RunConfig:
    model = from_hf_config(small_config(family).to_dict() | {"vocab_size": 384})
    return settings(model=model, mixed_precision="fp32", **changes)


@pytest.mark.parametrize("family", ["mamba2", "qwen3_5_text"])
def test_an_adapter_of_a_projection_keeps_its_input_and_what_it_makes_of_it(family, ranks) -> None:
    """The first layer has an adapter each time, so that gradients reach the same layers."""
    some, every = (
        resolve(of_family(family, peft=LoRA(dim=RANK, target_modules=targets)), world_size=1, device="cpu").config
        for targets in (["*.layers.0.*.out_proj"], ["out_proj"])
    )
    with_it, without = (ranks.run(kept, 1, each)[0] for each in (every, some))
    estimated, before = (
        sum(part.size for part in memory(each, world_size=1).parts if part.name == "activations") for each in (every, some)
    )
    assert with_it - without == estimated - before > 0


def test_a_mamba_layer_keeps_what_goes_into_kernels_and_comes_out_of_them() -> None:
    """Per token: the input of the norm and its deviation, what `in_proj` reads and makes, outputs before the gate and after it,
    two deviations, and what `out_proj` reads."""
    hidden, inner, made = 64, 128, 2 * 128 + 2 * 2 * 16 + 8
    each = 4 * (hidden + 1) + 4 * hidden + 4 * (made + 2 * inner) + 2 * 4 + 4 * inner
    assert parts(of_family("mamba2"))["activations"] == 4 * 128 * each


def test_a_hybrids_layers_keep_what_each_of_its_kinds_keeps() -> None:
    """A feed-forward layer of squared ReLU, from 64 channels to 96, has one norm."""
    sizes = [
        parts(of_family("nemotron_h", model__num_layers=len(kinds), model__hybrid_layer_pattern=kinds))
        for kinds in ("ME*", "ME*-")
    ]
    assert sizes[1]["activations"] - sizes[0]["activations"] == 128 * 4 * (64 + 1 + 64 + 2 * 96)


def test_what_sparse_attention_keeps_is_not_counted() -> None:
    assert parts(of_family("deepseek_v32"))["activations"] == 0
