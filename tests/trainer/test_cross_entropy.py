"""Transformer Engine's cross entropy is chosen from the version on that computes it right, and what is chosen is told."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from formats.errors import UserError
from tests.trainer.settings import HOPPER, settings
from trainer.settings.resolve import Resolved, resolve


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where Python finds Transformer Engine; megatron-core is not asked to import it."""
    find = importlib.util.find_spec
    spec = SimpleNamespace(name="transformer_engine")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: spec if name == "transformer_engine" else find(name, *more)
    )


def resolved(version: str, **changes: Any) -> Resolved:
    machine = replace(HOPPER, transformer_engine=version)
    return resolve(settings(model__apply_rope_fusion=False, **changes), world_size=1, device="gpu", machine=machine)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("version", ["2.10.0", "2.14", "2.17.3"])
def test_before_2_18_the_loss_is_megatron_cores_and_that_is_told(version: str) -> None:
    answer = resolved(version)
    assert (answer.config.model.cross_entropy_loss_fusion, answer.config.model.cross_entropy_fusion_impl) == (True, "native")
    (note,) = answer.warnings
    assert note == (
        f"the loss is computed by megatron-core's own fused cross entropy: that of Transformer Engine `{version}` loses "
        "precision of bf16 gradients; install 2.18 or newer for the faster one"
    )


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("version", ["2.18.0", "2.20.2", "3.0"])
def test_from_2_18_on_it_is_transformer_engines(version: str) -> None:
    answer = resolved(version)
    assert (answer.config.model.cross_entropy_loss_fusion, answer.config.model.cross_entropy_fusion_impl) == (True, "te")
    assert answer.warnings == ()


def test_a_version_that_computes_a_wrong_loss_is_refused_where_somebody_asks_for_it() -> None:
    with pytest.raises(UserError) as refused:
        resolved("2.13.1", model__cross_entropy_loss_fusion=True, model__cross_entropy_fusion_impl="te")
    assert str(refused.value) == (
        "`model.cross_entropy_fusion_impl` is `te`, and the loss of Transformer Engine `2.13.1` is wrong where logits are not "
        "contiguous\n\nhint: leave it out, set it to `native`, or install Transformer Engine 2.18 or newer"
    )


def test_a_version_that_rounds_too_much_is_told_of_where_somebody_asks_for_it() -> None:
    answer = resolved("2.14.0", model__cross_entropy_loss_fusion=True, model__cross_entropy_fusion_impl="te")
    assert answer.config.model.cross_entropy_fusion_impl == "te"
    assert answer.warnings == (
        "the cross entropy of Transformer Engine `2.14.0` loses precision of bf16 gradients; install 2.18 or newer",
    )
