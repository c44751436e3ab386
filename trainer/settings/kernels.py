"""Choose fused kernels for what a run computes on: those that the device has and that compute the model's functions."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from megatron.core.transformer import transformer_config
from megatron.core.transformer.enums import AttnBackend

from trainer.settings import architecture, cross_entropy, experts
from trainer.settings.defaults import Default
from trainer.settings.precision import Machine

WITHOUT_CUDA: dict[str, Any] = {
    "attention_backend": AttnBackend.local,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "cross_entropy_loss_fusion": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "gradient_accumulation_fusion": False,
    "use_cpu_initialization": True,
}
"""megatron-core's CUDA kernels, switched off."""

KERNELS: dict[str, Any] = {
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "masked_softmax_fusion": True,
    "apply_rope_fusion": True,
    "persist_layer_norm": True,
    "cross_entropy_loss_fusion": True,
    "cross_entropy_fusion_impl": cross_entropy.TE,
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
    "gradient_accumulation_fusion": True,
}
"""Faster kernels, as a recent Transformer Engine has them."""


def fused(transformer_engine: str | None) -> dict[str, Any]:
    """Return the faster kernels of a version of Transformer Engine."""
    return {**KERNELS, "cross_entropy_fusion_impl": cross_entropy.implementation(transformer_engine)}


def defaults(model: Any, machine: Machine) -> list[Default]:
    """Choose the kernels of a model, before megatron-core checks its fields."""
    if machine.device == "cpu":
        why = "the CPU has none of CUDA's kernels"
        without = _of_model(model, WITHOUT_CUDA)
        return [Default(f"model.{name}", value, why) for name, value in without.items() if hasattr(model, name)]
    chosen: list[Default] = []
    if not getattr(model, "bf16", False):
        chosen.append(Default("model.cross_entropy_loss_fusion", False, "the fused kernels round gradients to bf16"))
    elif getattr(model, "deterministic_mode", False):
        chosen.append(Default("model.cross_entropy_loss_fusion", False, "`model.deterministic_mode`"))
    chosen += [
        Default(f"model.{name}", False, why)
        for name, why in architecture.other_kernels(model).items()
        if getattr(model, name, False) is None
    ]
    installed = importlib.util.find_spec("transformer_engine")  # megatron-core refuses settings for what it cannot import
    faster = fused(machine.transformer_engine) if installed else {"moe_grouped_gemm": True}  # which it does not look for
    return chosen + _kernels(model, {default.setting for default in chosen}, faster)


def _kernels(model: Any, decided: set[str], faster: Mapping[str, Any]) -> list[Default]:
    """Choose the faster kernel for each field that is still None and not among the `decided` settings."""
    faster = _of_model(model, faster)
    open_fields = {f"model.{name}": value for name, value in faster.items() if getattr(model, name, False) is None}
    return [Default(setting, value, "a fused kernel") for setting, value in open_fields.items() if setting not in decided]


def _of_model(model: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the fields of experts for a model that has none."""
    return {name: value for name, value in fields.items() if not name.startswith("moe_") or experts.has_experts(model)}


def elsewhere(model: Any, machine: Machine) -> list[Default]:
    """Return the kernels that a run on GPUs will choose, on a machine without them."""
    return _kernels(model, set(), KERNELS) if _is_dry_run(machine) else []


def _is_dry_run(machine: Machine) -> bool:
    """Tell whether a run for GPUs is only shown: without Transformer Engine it cannot start here."""
    return machine.device == "gpu" and not importlib.util.find_spec("transformer_engine")


@contextmanager
def hidden(model: Any, machine: Machine) -> Iterator[None]:
    """Set requested kernels to None while this is entered, and say that Transformer Engine is recent: megatron-core refuses
    kernels that it cannot import, even if a run is only shown."""
    if not _is_dry_run(machine):
        yield
        return
    requested = [name for name in KERNELS if name != "moe_grouped_gemm" and getattr(model, name, None) is True]
    for name in requested:
        setattr(model, name, None)
    with mock.patch.object(transformer_config, "is_te_min_version", return_value=True):
        yield
    for name in requested:
        setattr(model, name, True)
