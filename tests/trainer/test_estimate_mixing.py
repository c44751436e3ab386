"""What Mamba-2, gated delta nets and sparse attention take in estimates."""

from __future__ import annotations

from typing import Any

import pytest

from tests.converter.family_suite import small_config
from tests.trainer.peft.test_estimate import kept, parts
from tests.trainer.settings import settings
from trainer.config import RunConfig
from trainer.model import from_hf_config
from trainer.peft import LoRA

RANK = 4


def of_family(family: str, **changes: Any) -> RunConfig:
    model = from_hf_config(small_config(family).to_dict() | {"vocab_size": 384})
    return settings(model=model, mixed_precision="fp32", **changes)


@pytest.mark.parametrize("family", ["mamba2", "qwen3_5_text"])
@pytest.mark.parametrize("left_out", ["in_proj", "out_proj"])
def test_an_adapter_of_a_projection_keeps_its_input_and_what_it_makes_of_it(family, left_out, ranks) -> None:
    """The first layer has both adapters each time, so that gradients reach the same layers."""
    both = ["in_proj", "out_proj"]
    first = [f"*.layers.0.*{name}" for name in both]
    whole, less = (
        of_family(family, peft=LoRA(dim=RANK, target_modules=[*first, *(name for name in both if name != left)]))
        for left in (None, left_out)
    )
    from trainer.settings.resolve import resolve

    with_it, without = (ranks.run(kept, 1, resolve(each, world_size=1, device="cpu").config)[0] for each in (whole, less))
    estimated = parts(whole, device="cpu")["activations"] - parts(less, device="cpu")["activations"]
    assert with_it - without == estimated > 0


def test_a_mamba_layer_keeps_what_goes_into_kernels_and_comes_out_of_them() -> None:
    """Per token: the input of the norm and its deviation, what `in_proj` reads and makes, outputs before the gate and after it,
    two deviations, and what `out_proj` reads."""
    hidden, inner, made = 64, 128, 2 * 128 + 2 * 2 * 16 + 8
    each = 4 * (hidden + 1) + 4 * hidden + 4 * (made + 2 * inner) + 2 * 4 + 4 * inner
    assert parts(of_family("mamba2"))["activations"] == 4 * 128 * each


def test_a_hybrids_layers_keep_what_each_of_its_kinds_keeps() -> None:
    """A feed-forward layer of squared ReLU, from 64 channels to 96, has one norm."""
    found = [
        parts(of_family("nemotron_h", model__num_layers=len(kinds), model__hybrid_layer_pattern=kinds))
        for kinds in ("ME*", "ME*-")
    ]
    assert found[1]["activations"] - found[0]["activations"] == 128 * 4 * (64 + 1 + 64 + 2 * 96)


def test_what_sparse_attention_keeps_is_not_counted() -> None:
    assert parts(of_family("deepseek_v32"))["activations"] == 0
