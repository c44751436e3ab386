"""Whose fused cross entropy computes the loss: Transformer Engine's where its version is right and exact, else megatron-core's.

On an H200 Transformer Engine's gave a model of 1B shape 6 % more tokens per second than megatron-core's own, in 12 GiB less
(2.20.2; docs/performance.md).
"""

from __future__ import annotations

import re
from typing import Any

from formats.errors import UserError
from trainer.settings.precision import Machine

TE, NATIVE = "te", "native"

CORRECT_FROM = (2, 14)
"""Transformer Engine before this reads logits that are not contiguous as if they were, and returns another loss."""

PRECISE_FROM = (2, 18)
"""Transformer Engine before this rounds the gradients of bf16 logits more than bf16 does."""


def implementation(transformer_engine: str | None) -> str:
    """The value of `model.cross_entropy_fusion_impl` for a version of Transformer Engine; None where there is none."""
    return TE if _is_from(PRECISE_FROM, transformer_engine) else NATIVE


def check(model: Any, machine: Machine) -> None:
    """UserError where Transformer Engine's cross entropy was asked for and this version computes a wrong loss."""
    version = machine.transformer_engine
    if _computes(model, TE) and version is not None and not _is_from(CORRECT_FROM, version):
        raise UserError(
            f"`model.cross_entropy_fusion_impl` is `te`, and the loss of Transformer Engine `{version}` is wrong where logits "
            "are not contiguous",
            hint=f"leave it out, set it to `native`, or install Transformer Engine {_dotted(PRECISE_FROM)} or newer",
        )


def notes(model: Any, machine: Machine) -> tuple[str, ...]:
    """What to say of the implementation in a resolved model, where this version of Transformer Engine is older than `EXACT`."""
    version = machine.transformer_engine
    if machine.device == "cpu" or version is None or _is_from(PRECISE_FROM, version):
        return ()
    lossy = f"Transformer Engine `{version}` loses precision of bf16 gradients; install {_dotted(PRECISE_FROM)} or newer"
    if _computes(model, NATIVE):
        return (f"the loss is computed by megatron-core's own fused cross entropy: that of {lossy} for the faster one",)
    return (f"the cross entropy of {lossy}",) if _computes(model, TE) else ()


def _computes(model: Any, implementation: str) -> bool:
    fused = getattr(model, "cross_entropy_loss_fusion", False)
    return bool(fused) and getattr(model, "cross_entropy_fusion_impl", None) == implementation


def _is_from(least: tuple[int, int], version: str | None) -> bool:
    """Is there a version, and is it `least` or newer?"""
    return version is not None and tuple(map(int, re.findall(r"\d+", version)[:2])) >= least


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
