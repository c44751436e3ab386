"""Settings of mixtures of experts: fill in what training them needs, and refuse dispatchers that are not installed.

A model of the user's own is checked in the fields it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.core.transformer.moe import fused_a2a

from trainer.settings.checks import EP, ETP, TP, parallel_size
from trainer.settings.defaults import Default
from trainer.settings.precision import Machine
from trainer.settings.rules import Rule, enforce


def defaults(model: Any) -> list[Default]:
    """Divide activations along the sequence where experts are trained with tensor parallelism: megatron-core refuses to train
    them otherwise."""
    if not has_experts(model) or parallel_size(model, TP) == 1:
        return []
    return [Default("model.sequence_parallel", True, "experts are trained with tensor parallelism only so")]


def has_experts(model: Any) -> bool:
    """Tell whether some layers of a model are mixtures of experts."""
    return bool(getattr(model, "num_moe_experts", None))


def check(model: Any, machine: Machine) -> None:
    """Refuse a dispatcher that needs a GPU, several ranks, or a package that is not installed; and settings of a dispatcher that
    is not the chosen one."""
    if has_experts(model) and getattr(model, "moe_token_dispatcher_type", None) == "flex":
        enforce(_flex_rules(model, machine))
    else:
        enforce(_unread_rules(model))


def _unread_rules(model: Any) -> Iterator[Rule]:
    for name, default in (("moe_flex_dispatcher_backend", "deepep"), ("moe_flex_dispatcher_num_sms", None)):
        value = getattr(model, name, default)
        message = f"`model.{name}` is `{value}`, and only `model.moe_token_dispatcher_type=flex` of a model with experts reads it"
        yield value != default, message, f"leave `model.{name}` out"


_INSTALLED = {"deepep": fused_a2a.HAVE_DEEP_EP, "hybridep": fused_a2a.HAVE_HYBRIDEP}
_PACKAGES = {
    "deepep": "DeepEP (https://github.com/deepseek-ai/DeepEP)",
    "hybridep": "HybridEP (the branch `hybrid-ep` of https://github.com/deepseek-ai/DeepEP)",
}


def _flex_rules(model: Any, machine: Machine) -> Iterator[Rule]:
    setting, other = "`model.moe_token_dispatcher_type` is `flex`", "set `model.moe_token_dispatcher_type=alltoall`"
    backend = model.moe_flex_dispatcher_backend
    yield machine.device == "cpu", f"{setting}, whose kernels need a GPU; this run is on the CPU", other
    yield (
        backend not in _PACKAGES,
        f"`model.moe_flex_dispatcher_backend` is `{backend}`, which is not supported",
        f"choose one of: {', '.join(_PACKAGES)}",
    )
    tensor, experts = getattr(model, ETP, None) or parallel_size(model, TP), parallel_size(model, EP)
    yield (
        tensor * experts == 1,
        f"{setting}, which sends tokens between ranks; `model.{EP}` is `1` and expert TP is `1`",
        f"{other}, or `model.{EP}` to 2 or more",
    )
    yield (
        machine.capability is not None and not _INSTALLED[backend],
        f"{setting} and `model.moe_flex_dispatcher_backend` is `{backend}`, whose package `deep_ep` is not installed here",
        f"install {_PACKAGES[backend]}, or {other}",
    )
